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
add column keep_ledger_of_deleted_users interval not null default '0',
add constraint settings_keep_generations_outlives_a_day check (keep_generations >= '1 day'),
add constraint settings_keep_deleted_is_not_negative check (keep_deleted >= '0'),
add constraint settings_keep_inputs_outlives_a_day check (keep_inputs >= '1 day'),
add constraint settings_keep_attempts_outlives_a_day check (keep_attempts >= '1 day'),
add constraint settings_keep_ledger_of_deleted_users_is_not_negative check (
  keep_ledger_of_deleted_users >= '0'
),
add constraint settings_max_input_files_is_not_negative check (max_input_files >= 0),
-- What is longer has no time it began at: for ever is null, where it may be said.
add constraint settings_times_are_in_reach check (
  greatest(
    keep_generations, keep_deleted, keep_inputs, keep_attempts, keep_ledger_of_deleted_users,
    lease, heartbeat, retry_base, retry_cap, give_up_after, breaker_window, breaker_pause,
    breaker_pause_cap
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

-- Which generations have been kept long enough: those that their users deleted, and old ones but
-- for favorites and sources. Hides these of them and marks their files; those without files go at
-- once. Answers how many files and generations.
create function private.expire_generations(p_ids uuid[]) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_settings private.settings := (select s from private.settings as s);
  v_files integer;
  v_ids uuid[] := array(
    select g.id from public.generations as g
    where g.id = any (p_ids) and g.finished_at is not null and (
      g.deleted_at <= now() - v_settings.keep_deleted
      or g.finished_at <= now() - v_settings.keep_generations and not g.is_favorite
    ) and not private.is_source(g.id)
    order by g.id for update skip locked
  );
begin
  update public.generations set deleted_at = now()
  where id = any (v_ids) and deleted_at is null;
  insert into private.expired_files (bucket, path, user_id, generation_id)
  select 'generations', f.path, coalesce(i.merged_from, i.user_id), i.generation_id
  from public.images as i
  cross join lateral (values (i.storage_path), (i.preview_path)) as f (path)
  where i.generation_id = any (v_ids) and f.path is not null
  order by f.path
  on conflict (bucket, path) do nothing;
  get diagnostics v_files = row_count;
  return v_files + private.erase_generations(v_ids);
end;
$$;

-- Generations their users deleted, longest ago first. Those whose files wait to be deleted, sources
-- of live jobs, and those that were skipped before, take no places of others.
create function private.expire_deleted(
  p_place text, p_at_most integer, out place text, out done integer
)
language sql set search_path = pg_catalog, pg_temp as $$
  select null, private.skip_failing('select private.expire_generations($1)', array(
    select g.id from public.generations as g
    where g.deleted_at <= now() - (select s.keep_deleted from private.settings as s)
      and g.finished_at is not null
      and not exists (select from private.expired_files as f where f.generation_id = g.id)
      and not private.is_source(g.id)
    order by g.deleted_at limit p_at_most + (select count(*) from private.skipped_rows)
  ))
$$;

-- Generations in order of id, which is that of time.
create function private.expire_old(
  p_place text, p_at_most integer, out place text, out done integer
)
language sql set search_path = pg_catalog, pg_temp as $$
  select
    case when count(*) = p_at_most and not bool_or(w.is_young) then max(w.id::text collate "C") end,
    private.skip_failing('select private.expire_generations($1)', array_agg(w.id))
  from (
    select g.id, g.created_at between now() - s.keep_generations and now() as is_young
    from private.settings as s
    inner join public.generations as g on g.id > p_place::uuid
    where s.keep_generations is not null order by g.id limit p_at_most
  ) as w
$$;

-- Attempts that ended longer ago than keep_attempts, of generations that are finished.
create function private.trim_attempts(
  p_place text, p_at_most integer, out place text, out done integer
)
language sql set search_path = pg_catalog, pg_temp as $$
  select
    case when count(*) = p_at_most and not bool_or(w.created_at between w.before and now())
      then max(w.generation_id::text collate "C") end,
    private.skip_failing(
      'with gone as (delete from private.attempts as a using private.settings as s'
      ' where a.generation_id = any ($1) and a.ended_at <= now() - s.keep_attempts returning 1)'
      ' select count(*) from gone',
      array_agg(distinct w.generation_id) filter (
        where w.ended_at <= w.before and w.finished_at is not null
      )
    )
  from (
    select
      a.generation_id, a.ended_at, g.created_at, g.finished_at, now() - s.keep_attempts as before
    from private.settings as s
    cross join (
      select * from private.attempts
      where generation_id > p_place::uuid order by generation_id, token limit p_at_most
    ) as a
    cross join lateral (
      select created_at, finished_at from public.generations where id = a.generation_id limit 1
    ) as g
  ) as w
$$;

-- Erases the entries of those of these users who are gone, with the one they were merged into if
-- they were, but for entries that are to be kept longer. By the clock: some may be of transactions
-- that began after this one.
create function private.erase_ledgers(p_user_ids uuid[]) returns integer
language sql set search_path = pg_catalog, pg_temp as $$
  with erased as (
    delete from public.credit_ledger as l
    using private.settings as s
    where l.user_id = any (array(
        select u.id from unnest(p_user_ids) as u (id)
        where not exists (
          select from public.entitlements as e
          where e.user_id in (u.id, private.owner_of(u.id))
        )
      ))
      and l.created_at <= clock_timestamp() - s.keep_ledger_of_deleted_users
    returning l.id
  )
  select count(*)::integer from erased
$$;

-- The ledgers of the next users, from one to the next through the index.
create function private.trim_ledger(
  p_place text, p_at_most integer, out place text, out done integer
)
language sql set search_path = pg_catalog, pg_temp as $$
  with recursive walk (user_id, step) as (
    select p_place::uuid, 0
    union all
    select (
      select l.user_id from public.credit_ledger as l
      where l.user_id > w.user_id order by l.user_id limit 1
    ), w.step + 1
    from walk as w where w.user_id is not null and w.step < p_at_most
  )
  select
    case when count(w.user_id) > p_at_most then max(w.user_id::text collate "C") end,
    private.skip_failing('select private.erase_ledgers($1)', array_agg(w.user_id))
  from walk as w
$$;

-- Files of Storage that nothing speaks of any more, in the order of the index that serves prefixes:
-- an output without a row whose job has ended; a source image whose user is gone, or has no active
-- job and has not touched it for keep_inputs. What does not look like a file of ours is left alone.
-- Everything is given a day: an upload precedes its row, and tokens outlive their user. Folders of
-- users of another database are that one's to look through.
create function private.expire_orphans(
  p_place text, p_at_most integer, out place text, out done integer
)
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_files text[];
begin
  if to_regclass('storage.objects') is not null then
    select
      case when count(*) >= p_at_most then max(o.name collate "C") end,
      array_agg(concat(o.bucket_id, '/', o.name)) filter (
        where o.changed_at < now() - interval '1 day' and private.path_id(o.name, 1) is not null
          and case o.bucket_id
            when 'generations' then
              private.path_id(o.name, 2) is not null and split_part(o.name, '/', 3) <> ''
              and not private.is_output(o.name)
            when 'inputs' then not exists (
              select from public.entitlements as e cross join private.settings as s
              where e.user_id = private.owner_of(private.path_id(o.name, 1)) and (
                coalesce(o.changed_at >= now() - s.keep_inputs, true)
                or exists (select from private.live_jobs as j where j.user_id = e.user_id)
              )
            )
          end
          and private.has_folder(private.path_id(o.name, 1))
      )
    into place, v_files
    from (
      select bucket_id, name, coalesce(updated_at, created_at) as changed_at from storage.objects
      where name ~>~ p_place order by name using ~<~ fetch first p_at_most rows with ties
    ) as o;
  end if;
  done := private.skip_failing('select private.mark_files($1)', v_files);
end;
$$;
