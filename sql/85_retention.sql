-- Retention: how long things are kept, and what has been kept long enough, found a few rows at a
-- time.
--
-- apply_retention is called every minute by pg_cron and by each worker. It takes each step that
-- retention_walks names: a function of this schema that is given its place and how many rows it may
-- look at, and answers how many it marked or erased and where it has come. A part adds its own as a
-- row. The row's lock lets one session walk at a time.
--
-- No step scans history. It goes a few rows further through an index at every call. Where it meets
-- what is too young, or the end, it starts anew: what was passed over may be due by then.

alter table private.settings
add column keep_generations interval,
add column keep_deleted interval not null default '30 days',
add column keep_inputs interval default '30 days',
add column max_input_files integer not null default 100,
add column keep_attempts interval not null default '90 days',
add column keep_ledger interval,
add column keep_ledger_of_deleted_users interval not null default '0',
add constraint settings_keep_generations_outlives_a_day check (keep_generations >= '1 day'),
add constraint settings_keep_deleted_is_not_negative check (keep_deleted >= '0'),
add constraint settings_keep_inputs_outlives_a_day check (keep_inputs >= '1 day'),
add constraint settings_keep_attempts_outlives_a_day check (keep_attempts >= '1 day'),
add constraint settings_keep_ledger_outlives_ninety_days check (keep_ledger >= '90 days'),
add constraint settings_keep_ledger_of_deleted_users_is_not_negative check (
  keep_ledger_of_deleted_users >= '0'
),
add constraint settings_max_input_files_is_not_negative check (max_input_files >= 0),
-- What is longer has no time it began at: for ever is null, where it may be said.
add constraint settings_times_are_in_reach check (
  greatest(
    keep_generations, keep_deleted, keep_inputs, keep_attempts, keep_ledger,
    keep_ledger_of_deleted_users, lease, heartbeat, retry_base, retry_cap, give_up_after,
    breaker_window, breaker_pause, breaker_pause_cap
  ) <= '1000 years'
);

comment on column private.settings.keep_generations is
  'How long after its end a generation is kept, unless it is a favorite; null: for ever.';
comment on column private.settings.keep_deleted is
  'How long a generation that its user deleted is kept, hidden, before it is erased.';
comment on column private.settings.keep_inputs is
  'How long source images are kept after their last change; null: for ever.';
comment on column private.settings.max_input_files is
  'How many source images a user may keep in bucket inputs.';
comment on column private.settings.keep_attempts is
  'How long the attempts of finished generations are kept, with provider''s words, times and cost.';
comment on column private.settings.keep_ledger is
  'Older entries of a user are summed up in one of kind carry, as far as the generations they '
  'speak of are erased; their external_ids are forgotten. null: never.';
comment on column private.settings.keep_ledger_of_deleted_users is
  'How long after it was written an entry outlives its user; 0: all go with the user.';

create table private.retention_walks (
  name text primary key,
  place text not null default '00000000-0000-0000-0000-000000000000'
);

comment on table private.retention_walks is
  'The steps of retention: functions of this schema, and how far each has come.';
comment on column private.retention_walks.place is
  'Key last looked at. The least of all ids is the beginning, of paths in our buckets too.';

-- Read by expire_deleted. The one index on a column that changes: it changes once, by the user's
-- hand, and all other updates of generations stay HOT.
create index generations_deleted_at_idx
on public.generations (deleted_at) where deleted_at is not null;

-- Takes one step, unless another session does.
create function private.take_step(p_name text, p_at_most integer) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_place text;
  v_done integer;
begin
  select w.place into v_place from private.retention_walks as w
  where w.name = p_name for update skip locked;
  if not found then
    return 0;
  end if;
  execute format('select * from private.%I($1, $2)', p_name) into v_place, v_done
  using v_place, p_at_most;
  update private.retention_walks
  set place = coalesce(v_place, '00000000-0000-0000-0000-000000000000') where name = p_name;
  return v_done;
end;
$$;

create function private.apply_retention(p_at_most integer default 500) returns integer
language sql security definer set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms' as $$
  select private.skip_failing(
    format('select sum(private.take_step(step, %s)) from unnest($1) as step', p_at_most),
    array(select w.name from private.retention_walks as w order by w.name)
  )
$$;

comment on function private.apply_retention is
  'Looks at up to p_at_most rows of each kind: marks the files of what has been kept long enough '
  'and erases what has none. Answers how many rows it marked or erased; safe from several places '
  'at once. What cannot be done is passed over: see private.skipped_rows.';

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
create function private.expire_deleted(
  p_place text, p_at_most integer, out place text, out done integer
)
language sql set search_path = pg_catalog, pg_temp as $$
  select null, private.skip_failing('select private.expire_generations($1, true)', array(
    select g.id from public.generations as g
    where g.deleted_at <= now() - (select s.keep_deleted from private.settings as s)
      and g.finished_at is not null
      and not exists (select from private.expired_files as f where f.generation_id = g.id)
    order by g.deleted_at limit p_at_most + (select count(*) from private.skipped_rows)
  ))
$$;

-- Generations that ended longer ago than keep_generations, but for favorites.
create function private.expire_old(
  p_place text, p_at_most integer, out place text, out done integer
)
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_before timestamptz := (select now() - s.keep_generations from private.settings as s);
  v_ids uuid[];
begin
  select
    array_agg(g.id) filter (where g.finished_at <= v_before and not g.is_favorite),
    case when count(*) = p_at_most and not bool_or(g.created_at between v_before and now())
      then max(g.id::text collate "C") end
  into v_ids, place
  from (
    select * from public.generations
    where id > p_place::uuid and v_before is not null order by id limit p_at_most
  ) as g;
  done := private.skip_failing(
    'select private.expire_generations($1)', coalesce(v_ids, '{}'::uuid[])
  );
end;
$$;

-- Attempts that ended longer ago than keep_attempts, of generations that are finished.
create function private.trim_attempts(
  p_place text, p_at_most integer, out place text, out done integer
)
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_before timestamptz := (select now() - s.keep_attempts from private.settings as s);
  v_ids uuid[];
begin
  select
    array_agg(distinct a.generation_id)
    filter (where a.ended_at <= v_before and g.finished_at is not null),
    case when count(*) = p_at_most and not bool_or(g.created_at between v_before and now())
      then max(a.generation_id::text collate "C") end
  into v_ids, place
  from (
    select * from private.attempts
    where generation_id > p_place::uuid order by generation_id, token limit p_at_most
  ) as a
  cross join lateral (
    select created_at, finished_at from public.generations where id = a.generation_id limit 1
  ) as g;
  done := private.skip_failing(
    format(
      'with gone as ('
      '  delete from private.attempts where generation_id = any ($1) and ended_at <= %L returning 1'
      ') select count(*) from gone', v_before
    ),
    coalesce(v_ids, '{}'::uuid[])
  );
end;
$$;

-- Erases the entries of a user who is gone, but for those that are to be kept longer. By the clock:
-- some may be of transactions that began after this one.
create function private.erase_ledger(p_user_id uuid) returns integer
language sql set search_path = pg_catalog, pg_temp as $$
  with erased as (
    delete from public.credit_ledger as l
    using private.settings as s
    where l.user_id = p_user_id
      and l.created_at <= clock_timestamp() - s.keep_ledger_of_deleted_users
    returning l.id
  )
  select count(*)::integer from erased
$$;

-- Has a user's ledger no longer than it is to be kept; answers how many entries fewer there are. Of
-- one who is gone entries are erased. Of another the oldest are summed up in one of kind carry,
-- so that the balance is still the sum of all and each balance_after the sum up to it. An entry
-- stays while the generation it speaks of does, and so does everything after it.
--
-- Locks: the entitlement row.
create function private.trim_ledger_of(p_user_id uuid, p_at_most integer) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_before timestamptz := (select now() - s.keep_ledger from private.settings as s);
  v_met public.credit_ledger;
  v_last public.credit_ledger;
  v_entries integer := 0;
begin
  if not exists (select from public.entitlements as e where e.user_id = p_user_id) then
    return private.erase_ledger(p_user_id);
  end if;
  perform from public.entitlements
  where user_id = p_user_id and v_before is not null for update skip locked;
  if not found then
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
    v_entries := v_entries + 1;
  end loop;
  if v_entries < 2 then
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
  return v_entries - 1;
end;
$$;

-- The ledgers of the next users.
create function private.trim_ledger(
  p_place text, p_at_most integer, out place text, out done integer
)
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := p_place::uuid;
  v_ids uuid[] := '{}'::uuid[];
begin
  for v_step in 1 .. p_at_most loop
    select user_id into v_user_id from public.credit_ledger
    where user_id > v_user_id order by user_id limit 1;
    exit when not found;
    v_ids := v_ids || v_user_id;
  end loop;
  place := v_user_id;
  done := private.skip_failing(
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
create function private.expire_orphans(
  p_place text, p_at_most integer, out place text, out done integer
)
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_files text[];
begin
  if to_regclass('storage.objects') is not null then
    select
      array_agg(concat(o.bucket_id, '/', o.name)) filter (
        where private.is_orphan(o.bucket_id, o.name, coalesce(o.updated_at, o.created_at))
      ),
      case when count(*) >= p_at_most then max(o.name collate "C") end
    into v_files, place
    from (
      select * from storage.objects
      where name ~>~ p_place order by name using ~<~ fetch first p_at_most rows with ties
    ) as o;
  end if;
  done := private.skip_failing('select private.mark_files($1)', coalesce(v_files, '{}'::text[]));
end;
$$;
