-- Retention: what has been kept long enough, found a few rows at a time.
--
-- apply_retention is called every minute by pg_cron and by each worker. It marks the files of
-- generations that are due (84 erases them), trims attempts, sums up or erases ledger entries, and
-- looks through Storage for files that nothing speaks of. Each walk locks its row of
-- retention_walks, looks at p_at_most rows in the order of an index, and says where it has come.
-- Where it meets what is too young it starts anew: what was passed over may be due by then.

-- Locks the walk and answers its place; null while another session walks it.
create function private.begin_walk(p_name text) returns text
language sql set search_path = pg_catalog, pg_temp as $$
  select w.place from private.retention_walks as w where w.name = p_name for update skip locked
$$;

-- Saves the place of a walk, or starts it anew.
create function private.end_walk(p_name text, p_place text, p_is_at_end boolean) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  if p_is_at_end then
    update private.retention_walks set place = default where name = p_name;
  else
    update private.retention_walks set place = p_place where name = p_name;
  end if;
end;
$$;

-- Hides these finished generations and marks their files; those without files go at once. Answers
-- how many files and generations.
create function private.expire_generations(
  p_ids uuid[], p_only_deleted boolean default false
) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_ids uuid[];
  v_files integer;
begin
  v_ids := array(
    select g.id from public.generations as g
    where g.id = any (p_ids) and g.finished_at is not null
      and (g.deleted_at is not null or not p_only_deleted)
    order by g.id for update skip locked
  );
  update public.generations set deleted_at = now()
  where id = any (v_ids) and deleted_at is null;
  perform private.end_shares(v_ids);
  insert into private.expired_files (bucket, path, user_id, generation_id)
  select 'generations', f.path, i.user_id, i.generation_id
  from public.images as i
  cross join lateral (values (i.storage_path), (i.preview_path)) as f (path)
  where i.generation_id = any (v_ids) and f.path is not null
  order by f.path
  on conflict (bucket, path) do nothing;
  get diagnostics v_files = row_count;
  return v_files + private.erase_generations(v_ids);
end;
$$;

-- Generations their users deleted, longest ago first. Those whose files wait to be deleted, and
-- those that were skipped before, take no places of others.
create function private.expire_deleted(p_at_most integer) returns integer
language sql set search_path = pg_catalog, pg_temp as $$
  select private.skip_failing('select private.expire_generations($1, true)', array(
    select g.id from public.generations as g
    where g.deleted_at <= now() - (select s.keep_deleted from private.settings as s)
      and g.finished_at is not null
      and not exists (select from private.expired_files as f where f.generation_id = g.id)
    order by g.deleted_at limit p_at_most + (select count(*) from private.skipped_rows)
  ))
$$;

-- Generations that ended longer ago than keep_generations, but for favorites.
create function private.expire_old(p_at_most integer) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_before timestamptz := (select now() - s.keep_generations from private.settings as s);
  v_place text := private.begin_walk('generations');
  v_met public.generations;
  v_seen integer := 0;
  v_ids uuid[] := '{}'::uuid[];
begin
  if v_before is null or v_place is null then
    return 0;
  end if;
  for v_met in
    select * from public.generations where id > v_place::uuid order by id limit p_at_most
  loop
    exit when v_met.created_at between v_before and now();
    if v_met.finished_at <= v_before and not v_met.is_favorite then
      v_ids := v_ids || v_met.id;
    end if;
    v_seen := v_seen + 1;
    v_place := v_met.id;
  end loop;
  perform private.end_walk('generations', v_place, v_seen < p_at_most);
  return private.skip_failing('select private.expire_generations($1)', v_ids);
end;
$$;

-- Attempts that ended longer ago than keep_attempts, of generations that are finished.
create function private.trim_attempts(p_at_most integer) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_before timestamptz := (select now() - s.keep_attempts from private.settings as s);
  v_place text := private.begin_walk('attempts');
  v_met record;
  v_seen integer := 0;
  v_ids uuid[] := '{}'::uuid[];
begin
  if v_place is null then
    return 0;
  end if;
  for v_met in
    select a.generation_id, a.ended_at, g.created_at, g.finished_at
    from private.attempts as a
    inner join public.generations as g on g.id = a.generation_id
    where a.generation_id > v_place::uuid order by a.generation_id, a.token limit p_at_most
  loop
    exit when v_met.created_at between v_before and now();
    if v_met.ended_at <= v_before and v_met.finished_at is not null then
      v_ids := v_ids || v_met.generation_id;
    end if;
    v_seen := v_seen + 1;
    v_place := v_met.generation_id;
  end loop;
  perform private.end_walk('attempts', v_place, v_seen < p_at_most);
  return private.skip_failing(
    format(
      'with gone as ('
      '  delete from private.attempts where generation_id = any ($1) and ended_at <= %L returning 1'
      ') select count(*) from gone', v_before
    ),
    array(select distinct unnest(v_ids))
  );
end;
$$;

-- Sums up a user's oldest entries in one of kind carry, so that the balance is still the sum of all
-- and each balance_after the sum up to it. An entry stays while the generation it speaks of does,
-- and so does everything after it.
--
-- Locks: the entitlement row.
create function private.compact_ledger(p_user_id uuid, p_at_most integer) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_before timestamptz := (select now() - s.keep_ledger from private.settings as s);
  v_met public.credit_ledger;
  v_last public.credit_ledger;
  v_count integer := 0;
begin
  perform from public.entitlements where user_id = p_user_id for update skip locked;
  if not found or v_before is null then
    return 0;
  end if;
  -- Not user_id = p_user_id: the planner may then walk the ids of all users up to this one's.
  for v_met in
    select * from public.credit_ledger
    where (user_id, id) > (p_user_id, 0) order by user_id, id limit p_at_most
  loop
    exit when v_met.user_id <> p_user_id or v_met.created_at > v_before
      or exists (select from public.generations as g where g.id = v_met.generation_id);
    v_last := v_met;
    v_count := v_count + 1;
  end loop;
  if v_count < 2 then
    return 0;
  end if;
  perform set_config('darkroom.compacts_ledger_of', p_user_id::text, true);
  delete from public.credit_ledger where user_id = p_user_id and id <= v_last.id;
  insert into public.credit_ledger (id, user_id, kind, amount, balance_after, created_at)
  overriding system value
  values (
    v_last.id, p_user_id, 'carry', v_last.balance_after, v_last.balance_after, v_last.created_at
  );
  perform set_config('darkroom.compacts_ledger_of', '', true);
  return v_count - 1;
end;
$$;

-- The ledger of a user, living or gone.
create function private.trim_ledger_of(p_user_id uuid, p_at_most integer) returns integer
language sql set search_path = pg_catalog, pg_temp as $$
  select case
    when exists (select from public.entitlements as e where e.user_id = p_user_id)
      then private.compact_ledger(p_user_id, p_at_most)
    else private.erase_ledger(p_user_id)
  end
$$;

-- The ledgers of the next users. Answers how many entries fewer there are.
create function private.trim_ledger(p_at_most integer) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_place text := private.begin_walk('ledger');
  v_user_id uuid;
  v_ids uuid[] := '{}'::uuid[];
begin
  if v_place is null then
    return 0;
  end if;
  for v_step in 1 .. p_at_most loop
    select user_id into v_user_id from public.credit_ledger
    where user_id > v_place::uuid order by user_id limit 1;
    exit when not found;
    v_place := v_user_id;
    v_ids := v_ids || v_user_id;
  end loop;
  perform private.end_walk('ledger', v_place, v_user_id is null);
  return private.skip_failing(
    format('select sum(private.trim_ledger_of(u, %s)) from unnest($1) as u', p_at_most), v_ids
  );
end;
$$;

-- Whether nothing speaks of a stored file any more: an output without a row whose job has ended; a
-- source image whose user is gone, or has no active job and has not touched it for keep_inputs.
-- What does not look like a file of ours is left alone. Everything is given a day: an upload
-- precedes its row, and tokens outlive their user.
create function private.is_orphan(
  p_bucket text, p_path text, p_changed_at timestamptz
) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select p_changed_at < now() - interval '1 day' and private.path_id(p_path, 1) is not null and
    case p_bucket
      when 'generations' then
        private.path_id(p_path, 2) is not null and split_part(p_path, '/', 3) <> ''
        and not private.has_image(p_path) and not private.is_live(private.path_id(p_path, 2))
      when 'inputs' then not exists (
        select from public.entitlements as e cross join private.settings as s
        where e.user_id = private.path_id(p_path, 1)
          and (
            coalesce(p_changed_at >= now() - s.keep_inputs, true)
            or exists (select from private.live_jobs as j where j.user_id = e.user_id)
          )
      )
      else false
    end
$$;

-- Marks orphans among the next files of Storage, in the order of the index that serves prefixes.
create function private.expire_orphans(p_at_most integer) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_place text := private.begin_walk('files');
  v_met record;
  v_seen integer := 0;
  v_files text[] := '{}'::text[];
begin
  if v_place is null or to_regclass('storage.objects') is null then
    return 0;
  end if;
  for v_met in
    select o.bucket_id, o.name, coalesce(o.updated_at, o.created_at) as changed_at
    from storage.objects as o
    where o.name ~>~ v_place order by o.name using ~<~ fetch first p_at_most rows with ties
  loop
    if private.is_orphan(v_met.bucket_id, v_met.name, v_met.changed_at) then
      v_files := v_files || concat(v_met.bucket_id, '/', v_met.name);
    end if;
    v_seen := v_seen + 1;
    v_place := v_met.name;
  end loop;
  perform private.end_walk('files', v_place, v_seen < p_at_most);
  return private.skip_failing('select private.mark_files($1)', v_files);
end;
$$;

create function private.apply_retention(p_at_most integer default 500) returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms' as $$
declare
  v_step text;
  v_done integer := 0;
begin
  foreach v_step in array
    '{expire_deleted,expire_old,trim_attempts,trim_ledger,expire_orphans}'::text[]
  loop
    v_done := v_done + private.skip_failing(
      format('select private.%s(%s)', v_step, p_at_most), array['*']
    );
  end loop;
  return v_done;
end;
$$;

comment on function private.apply_retention is
  'Looks at up to p_at_most rows of each kind: marks the files of what has been kept long enough '
  'and erases what has none. Answers how many rows it marked or erased; safe from several places '
  'at once. What cannot be done is passed over: see private.skipped_rows.';
