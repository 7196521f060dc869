-- Export: all that is known of a user, the other half of erasure (84).
--
-- What a user owns is rows and files. Which tables have such rows is said by rows, too, so that a
-- part adds its own, and an app. Files are named, to be fetched from Storage. What the auth server
-- knows it tells itself.
--
-- A history may be of any length, so it comes in pages. Each goes on behind the last key of the one
-- before, whatever was added meanwhile.

create table private.exported_tables (
  name text primary key,
  owner text not null default 'user_id',
  left_out text[] not null default '{}'
);

comment on table private.exported_tables is
  'What export_user() answers: tables that have rows of users. An app may add its own.';
comment on column private.exported_tables.name is 'With its schema.';
comment on column private.exported_tables.owner is
  'The column that says whose a row is. generation_id: it is shown with the generation.';
comment on column private.exported_tables.left_out is
  'Columns that are not the user''s: providers'' words, costs, tokens of workers.';

insert into private.exported_tables (name, owner, left_out) values
('public.entitlements', 'user_id', '{}'),
('public.credit_ledger', 'user_id', '{}'),
('private.credit_buckets', 'user_id', '{}'),
('private.billing_customers', 'user_id', '{}'),
('private.billing_events', 'user_id', '{}'),
('private.billing_purchases', 'user_id', '{}'),
('private.billing_subscriptions', 'user_id', '{}'),
('private.merged_users', 'into_id', '{}'),
('public.batches', 'user_id', '{}'),
('public.generations', 'user_id', '{}'),
('public.images', 'generation_id', '{}'),
(
  'private.attempts', 'generation_id',
  '{token,worker_id,error_detail,provider_job_id,provider_seconds,provider_images,cost_usd}'
);

create function public.export_user(
  user_id uuid, after text[] default null, page_size integer default 500
) returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set jit = off as $$
declare
  v_with_each text;
  v_table record;
  v_found integer;
  v_rows jsonb;
  v_left integer := page_size;
  v_tables jsonb := '{}'::jsonb;
  v_files jsonb := '[]'::jsonb;
  v_next text[];
begin
  if coalesce(page_size not between 1 and 1000, true) then
    perform private.refuse_input('page_size: not between 1 and 1000');
  elsif after is not null and after[1] is distinct from 'storage.objects'
    and not exists (select from private.exported_tables as e where e.name = after[1]) then
    perform private.refuse_input('after: not what next_after was');
  end if;
  select string_agg(format(
    ' || jsonb_build_object(%L, array(select to_jsonb(c) - %L::text[] from %s as c'
    ' where c.generation_id = t.id))', split_part(e.name, '.', 2), e.left_out, e.name::regclass
  ), '') into v_with_each
  from private.exported_tables as e where e.owner = 'generation_id';
  for v_table in
    select e.*, key.names, key.columns, key.bounds
    from private.exported_tables as e
    cross join lateral (
      select
        array_agg(a.attname order by k.place) as names,
        string_agg(format('t.%I', a.attname), ', ' order by k.place) as columns,
        string_agg(
          format('$4[%s]::%s', k.place + 1, format_type(a.atttypid, null)), ', ' order by k.place
        ) as bounds
      from pg_index as i
      cross join unnest(i.indkey::smallint[]) with ordinality as k (attnum, place)
      inner join pg_attribute as a on a.attrelid = i.indrelid and a.attnum = k.attnum
      where i.indrelid = e.name::regclass and i.indisprimary
    ) as key
    where e.owner <> 'generation_id' and (after is null or e.name >= after[1])
    order by e.name
  loop
    exit when v_left = 0 or after[1] = 'storage.objects';
    begin
      execute format(
        'select count(*), jsonb_agg(r.row) from (select to_jsonb(t) - $1 %s as row from %s as t'
        ' where t.%I = $2 %s order by %s limit $3) as r',
        case when v_table.name = 'public.generations' then v_with_each end,
        v_table.name::regclass, v_table.owner,
        case when v_table.name = after[1] then
          format('and (%s) > (%s)', v_table.columns, v_table.bounds)
        end,
        v_table.columns
      ) into v_found, v_rows using v_table.left_out, user_id, v_left, after;
    exception when data_exception then
      perform private.refuse_input('after: not what next_after was');
    end;
    continue when v_found = 0;
    v_tables := v_tables || jsonb_build_object(split_part(v_table.name, '.', 2), v_rows);
    v_left := v_left - v_found;
    v_next := v_table.name || array(
      select v_rows -> -1 ->> n.name from unnest(v_table.names) with ordinality as n (name, place)
      order by n.place
    );
  end loop;
  -- In the order of the index that serves prefixes; one name may be in both buckets.
  if v_left > 0 and to_regclass('storage.objects') is not null then
    select
      count(*),
      coalesce(jsonb_agg(
        jsonb_build_object('bucket', o.bucket_id, 'path', o.name)
        order by o.name collate "C", o.bucket_id
      ), '[]'),
      array['storage.objects', max(o.name collate "C")]
    into v_found, v_files, v_next
    from (
      select each.bucket_id, each.name
      -- The folders of guests who became this user, too.
      from unnest(user_id || array(
        select m.user_id from private.merged_users as m where m.into_id = export_user.user_id
      )) as folder (id)
      cross join lateral (
        select f.bucket_id, f.name from storage.objects as f
        where f.name ~>~ greatest(
          concat(folder.id, '/'), case after[1] when 'storage.objects' then after[2] end
        ) and f.name ~<~ concat(folder.id, '0') and f.bucket_id in ('generations', 'inputs')
        order by f.name using ~<~ fetch first v_left rows with ties
      ) as each
      order by each.name using ~<~ fetch first v_left rows with ties
    ) as o;
    v_left := v_left - v_found;
  end if;
  if after is null and v_tables = '{}' and v_files = '[]' then
    perform private.refuse_missing('user_id: no such user', 'Use the id of auth.users.');
  end if;
  return json_build_object(
    'user_id', user_id,
    'entitlement', private.entitlement_json(user_id),
    'tables', v_tables,
    'files', v_files,
    'next_after', case when v_left <= 0 then v_next end
  );
end;
$$;

comment on function public.export_user is
  'All that is known of a user, page by page: {user_id, entitlement (as get_entitlement shows it), '
  'tables {name: rows, oldest first; generations with their images and attempts}, files [{bucket, '
  'path}: to be fetched from Storage], next_after}. Call again with after = next_after, until it '
  'is null; a page has at most page_size (1 to 1000) rows and files. What auth.users holds is not '
  'in it. Books and files of each of merged_users are told under its own id: call it for them, '
  'too. Errors: PT400 invalid_input, PT404 not_found.';
