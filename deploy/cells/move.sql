-- Moving a user from one cell to another, at once for the user and while all others work. In every
-- cell, as the last file. Variable of psql: number, the cell's own, 0 to 63: home is 0.
--
-- The cell that is left takes all rows of the user into one, and answers nothing more for the user;
-- the other unpacks them; the directory is changed; the first forgets. Each step is a transaction,
-- may be repeated, and leaves the user in one cell or, held, in none: so what is done for the user is
-- done once. While it lasts the API says 503 unavailable.
--
-- Where the other cell is lost for good, this takes the user back, in the cell that was to be left:
--   select cells.unpack_user(package) from cells.moves where user_id = …;

create table if not exists cells.moves (
  user_id uuid primary key,
  cell text not null,
  package jsonb not null,
  packed_at timestamptz not null default now()
);

comment on table cells.moves is 'Users who are on their way from here to a cell, with all their rows.';

create table if not exists cells.moved_tables (
  place integer primary key,
  name regclass not null,
  owner text not null default 'user_id',
  left_out text[] not null default '{}',
  on_conflict text not null default ''
);

comment on table cells.moved_tables is 'Tables with rows of users, in the order of unpacking.';
comment on column cells.moved_tables.owner is
  'user_id or into_id; generation_id, source_id or retry_of: whose the generation is.';
comment on column cells.moved_tables.on_conflict is
  'What is done where the cell has the row: a device that somebody signed in with there, say.';

truncate cells.moved_tables;
insert into cells.moved_tables (place, name, owner, left_out) values
(1, 'public.entitlements', 'user_id', '{}'),
(2, 'public.credit_ledger', 'user_id', '{}'),
(3, 'private.credit_buckets', 'user_id', '{}'),
(4, 'private.billing_customers', 'user_id', '{}'),
(5, 'private.billing_events', 'user_id', '{}'),
(6, 'private.billing_purchases', 'user_id', '{taken}'),
(7, 'private.billing_subscriptions', 'user_id', '{}'),
(8, 'private.merged_users', 'into_id', '{}'),
(9, 'public.batches', 'user_id', '{}'),
(10, 'public.generations', 'user_id', '{}'),
(11, 'public.images', 'generation_id', '{}'),
(12, 'private.attempts', 'generation_id', '{}'),
(13, 'private.purchases', 'generation_id', '{}'),
(14, 'private.retries', 'retry_of', '{}'),
(15, 'private.sources', 'source_id', '{}'),
(16, 'public.generation_tags', 'user_id', '{}'),
(17, 'public.image_likes', 'generation_id', '{}'),
(18, 'public.prompt_templates', 'user_id', '{}'),
(20, 'private.deliveries', 'generation_id', '{}'),
(21, 'private.expired_files', 'user_id', '{}'),
(22, 'private.ready_jobs', 'user_id', '{seq}');
insert into cells.moved_tables (place, name, on_conflict) values
(19, 'private.push_tokens', 'on conflict do nothing');

-- Which of a table's rows are these users'.
create function cells.rows_of(p_table cells.moved_tables) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select format('%s as t where %s', p_table.name, case
    when p_table.owner in ('user_id', 'into_id') then format('t.%I = any ($1)', p_table.owner)
    else format(
      't.%I in (select g.id from public.generations as g where g.user_id = any ($1))', p_table.owner
    )
  end)
$$;

-- Answers null where a job runs or a delivery is under way: ask again when it has ended. Triggers do
-- not see that the rows go: files stay where they are.
--
-- Locks: that of the user's calls (cells.answer), the live jobs, the entitlement.
create function cells.pack_user(p_user_id uuid, p_cell text) returns jsonb
language plpgsql security definer set search_path = pg_catalog, pg_temp
set session_replication_role = replica as $$
declare
  v_move cells.moves;
  v_ids uuid[];
  v_table cells.moved_tables;
  v_rows jsonb;
begin
  perform pg_advisory_xact_lock(hashtextextended(p_user_id::text, 0));
  select * into v_move from cells.moves where user_id = p_user_id;
  if v_move.cell = p_cell then
    return v_move.package;
  elsif found then
    raise exception 'the user is on the way to %', v_move.cell;
  end if;
  v_ids := private.folders_of(p_user_id);
  perform private.lock_jobs(p_user_id);
  if v_ids = '{}' or not exists (
    select from public.entitlements as e where e.user_id = p_user_id
  ) then
    perform private.refuse_missing(
      'user_id: no such user here', 'Move the one whom this one was merged into.'
    );
  elsif exists (select from private.running_jobs as j where j.user_id = p_user_id) or exists (
    select from private.deliveries as d
    inner join public.generations as g on g.id = d.generation_id
    where g.user_id = p_user_id and d.state = 'pending' and d.token is not null
      and d.run_at > now()
  ) then
    return null;
  end if;
  v_move.package := jsonb_build_object(
    'user_ids', v_ids, 'clock', pg_sequence_last_value('private.virtual_clock')
  );
  for v_table in select * from cells.moved_tables order by place loop
    execute format('select coalesce(jsonb_agg(to_jsonb(t)), ''[]'') from %s', cells.rows_of(v_table))
    into v_rows using v_ids;
    v_move.package := v_move.package || jsonb_build_object(v_table.name::text, v_rows);
  end loop;
  for v_table in
    select * from cells.moved_tables order by owner in ('user_id', 'into_id'), place desc
  loop
    execute format('delete from %s', cells.rows_of(v_table)) using v_ids;
  end loop;
  insert into cells.moves (user_id, cell, package) values (p_user_id, p_cell, v_move.package);
  insert into cells.users (user_id, cell) select id, 'moving' from unnest(v_ids) as id;
  return v_move.package;
end;
$$;

-- Rows come as they were, without what triggers would make of new ones. Ids of cells differ by their
-- rest, and go on behind those that came. Places in the queue are as far from its present as before.
create function cells.unpack_user(p_package jsonb) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
set session_replication_role = replica as $$
declare
  v_ids uuid[] := array(select jsonb_array_elements_text(p_package -> 'user_ids'));
  v_shift bigint := coalesce(pg_sequence_last_value('private.virtual_clock'), 0)
    - coalesce((p_package ->> 'clock')::bigint, 0);
  v_table cells.moved_tables;
  v_columns text;
  v_sequence text;
  v_last bigint;
begin
  if exists (select from public.entitlements as e where e.user_id = any (v_ids)) then
    return;
  end if;
  delete from cells.users where user_id = any (v_ids);
  delete from cells.moves where user_id = any (v_ids);  -- came back, before this had forgotten
  -- Came once more where it waited, before it was handed over: see hand_over. None comes meanwhile.
  perform from private.billing_providers order by name for update;
  delete from private.billing_events as e
  using jsonb_to_recordset(p_package -> 'private.billing_events') as p (provider text, event_id text)
  where e.event_id = p.event_id and e.provider = p.provider and e.outcome = 'waiting';
  for v_table in select * from cells.moved_tables order by place loop
    select string_agg(quote_ident(a.attname), ', ') into v_columns
    from pg_attribute as a
    where a.attrelid = v_table.name and a.attnum > 0 and not a.attisdropped
      and a.attname <> all (v_table.left_out);
    execute format(
      'insert into %s (%s) overriding system value'
      ' select %2$s from jsonb_populate_recordset(null::%1$s, $1) %3$s',
      v_table.name, v_columns, v_table.on_conflict
    ) using p_package -> v_table.name::text;
  end loop;
  update public.entitlements set last_fair_key = last_fair_key + v_shift where user_id = any (v_ids);
  update private.ready_jobs set fair_key = fair_key + v_shift where user_id = any (v_ids);
  for v_sequence, v_last in
    select 'public.credit_ledger_id_seq', max(l.id)
    from public.credit_ledger as l where l.user_id = any (v_ids)
    union all
    select 'private.credit_buckets_id_seq', max(b.id)
    from private.credit_buckets as b where b.user_id = any (v_ids)
  loop
    if v_last > pg_sequence_last_value(v_sequence) then
      execute format('alter sequence %s increment by 64', v_sequence);  -- nobody takes one meanwhile
      perform setval(v_sequence, greatest(n.last, v_last / 64 * 64 + n.last % 64))
      from pg_sequence_last_value(v_sequence) as n (last);
    end if;
  end loop;
  perform private.wake_workers(jsonb_array_length(p_package -> 'private.ready_jobs'));
end;
$$;

create function cells.leave_user(p_user_id uuid, p_cell text) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
set session_replication_role = replica as $$
declare
  v_ids uuid[];
begin
  delete from cells.moves as m where m.user_id = p_user_id
  returning array(select jsonb_array_elements_text(m.package -> 'user_ids')) into v_ids;
  update cells.users set cell = p_cell where user_id = any (v_ids) and cell = 'moving';
  if to_regproc('cells.put_user') is not null then  -- what Auth says is a copy here
    delete from auth.users where id = any (v_ids);
  end if;
end;
$$;

-- Ids that no two cells have.
select setval(s.name, (coalesce(pg_sequence_last_value(s.name), 0) / 64 + 1) * 64 + :number)
from unnest('{public.credit_ledger_id_seq,private.credit_buckets_id_seq}'::regclass[]) as s (name)
inner join pg_sequence as q on q.seqrelid = s.name and q.seqincrement <> 64;
alter sequence public.credit_ledger_id_seq increment by 64;
alter sequence private.credit_buckets_id_seq increment by 64;

-- Of all files of a cell, of which this is the last: nobody may call what is not granted.
revoke all on all routines in schema cells from public;
grant execute on function cells.pack_user, cells.unpack_user, cells.leave_user to darkroom_entry;
grant select (user_id, cell, packed_at) on cells.moves to darkroom_entry;  -- retention of home finishes them
