-- Erasure: what a user deletes, files that wait to be deleted, and what goes with a deleted user.
--
-- Deleting a generation hides it: row and files stay until they are erased (85), and until then it
-- may be restored. Rows go by SQL, files only through the Storage API, which the worker calls. So
-- each file to be deleted becomes a row of expired_files. The worker lists them, deletes the files
-- and forgets the rows, and with the last file of a generation goes the generation. All of it may
-- be repeated: whoever is killed half-way has lost nothing, for the rows say what is left to do.
--
-- Deleting a row of auth.users erases the user: a trigger takes the entitlement, whose trigger
-- marks the files and takes all rows; the ledger goes as keep_ledger_of_deleted_users says. Every
-- path that is marked lies in a folder of the user's: the own one, or that of a user who was merged
-- into this one (42). What is uploaded for a user who is gone is found as an orphan (85).

create table private.expired_files (
  bucket text,
  path text,
  user_id uuid not null,
  generation_id uuid,
  marked_at timestamptz not null default now(),
  try_at timestamptz not null default now(),
  primary key (bucket, path),
  constraint expired_files_bucket_is_ours check (bucket in ('generations', 'inputs')),
  -- Also a file with the name of the folder, which Storage did not refuse once.
  constraint expired_files_path_is_the_users check (
    starts_with(concat(path, '/'), concat(user_id, '/'))
  )
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05);

comment on table private.expired_files is
  'Files the worker has to delete from Storage. Empty most of the time.';
comment on column private.expired_files.user_id is
  'After whom the folder is named; the user may be gone already.';
comment on column private.expired_files.generation_id is
  'Erased together with its last file; null: nothing waits for this file.';
comment on column private.expired_files.try_at is
  'Not before this time: a worker is at it, or was and failed.';

create index expired_files_try_at_idx on private.expired_files (try_at);
-- Read by health.
create index expired_files_marked_at_idx on private.expired_files (marked_at);
create index expired_files_generation_id_idx
on private.expired_files (generation_id) where generation_id is not null;

-- For users: delete and restore.

-- A generation of the caller's, locked against every other change.
--
-- Locks: the generation.
-- Raises: PT401 not_authenticated, PT404 not_found.
create function private.lock_own_generation(
  p_job_id uuid, p_may_be_deleted boolean default false
) returns public.generations
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_user_id(p_writes => true);
  v_generation public.generations;
begin
  select * into v_generation from public.generations
  where id = p_job_id and user_id = v_user_id and (deleted_at is null or p_may_be_deleted)
  for no key update;
  if not found then
    perform private.refuse_unknown_job();
  end if;
  return v_generation;
end;
$$;

-- Locks: the generation.
-- Raises: PT401 not_authenticated, PT404 not_found, PT409 not_finished.
create function private.delete_generation(p_job_id uuid) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_generation public.generations := private.lock_own_generation(p_job_id, true);
  v_deleted_at timestamptz := coalesce(v_generation.deleted_at, now());
begin
  if v_generation.finished_at is null then
    perform private.refuse(
      'not_finished', 'job_id: the job is ' || v_generation.status,
      'Cancel it first, with cancel_generation.'
    );
  end if;
  update public.generations set deleted_at = v_deleted_at
  where id = p_job_id and deleted_at is null;
  return json_build_object('job_id', p_job_id, 'deleted_at', v_deleted_at);
end;
$$;

-- What is being erased cannot come back: some of its files may be gone.
--
-- Locks: the generation.
-- Raises: PT401 not_authenticated, PT404 not_found.
create function private.restore_generation(p_job_id uuid) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_generation public.generations := private.lock_own_generation(p_job_id, true);
begin
  if v_generation.deleted_at is not null
    and exists (select from private.expired_files where generation_id = p_job_id) then
    perform private.refuse_unknown_job();
  end if;
  update public.generations set deleted_at = null
  where id = p_job_id and deleted_at is not null;
  return private.get_job_status(p_job_id);
end;
$$;

-- What a file is.

-- The id that is the n-th part of a path; null if that part is none.
create function private.path_id(p_path text, p_part integer) returns uuid
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select case
    when split_part(p_path, '/', p_part) ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
      then split_part(p_path, '/', p_part)::uuid
  end
$$;

-- Whether a file of bucket generations is one that a job has stored, or may still write.
create function private.is_output(p_path text) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select exists (
    select from public.images as i
    where i.generation_id = private.path_id(p_path, 2)
      and p_path in (i.storage_path, i.preview_path)
  ) or exists (select from private.live_jobs as j where j.job_id = private.path_id(p_path, 2))
$$;

-- Whether a live job is made from a picture of this generation.
create function private.is_source(p_id uuid) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select exists (
    select from private.sources as s
    where s.source_id = p_id
      and exists (select from private.live_jobs as j where j.job_id = s.generation_id)
  )
$$;

-- When a file was last written, as Storage has on record; null if it is not there, or there is no
-- such record here.
create function private.file_changed_at(p_bucket text, p_path text) returns timestamptz
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  if to_regclass('storage.objects') is null then
    return null;
  end if;
  return (
    select coalesce(o.updated_at, o.created_at, '-infinity') from storage.objects as o
    where o.bucket_id = p_bucket and o.name = p_path
  );
end;
$$;

-- Marks files, each as bucket/path, and answers how many were not marked yet. In order: of two that
-- mark the same files, one waits for the other, and not each for the other.
create function private.mark_files(p_files text[]) returns integer
language sql set search_path = pg_catalog, pg_temp as $$
  with marked as (
    insert into private.expired_files (bucket, path, user_id)
    select f.bucket, f.path, private.path_id(f.path, 1)
    from unnest(p_files) as gone (name)
    cross join lateral (
      select split_part(gone.name, '/', 1), substr(gone.name, strpos(gone.name, '/') + 1)
    ) as f (bucket, path)
    order by f.path, f.bucket
    on conflict (bucket, path) do nothing
    returning 1
  )
  select count(*)::integer from marked
$$;

-- For workers.

-- What has come to be needed again since it was marked is kept: its generation was restored, its
-- job is live, or one that may be made from it, or a user who is here has uploaded it anew.
create function private.list_expired_files(p_at_most integer default 100)
returns table (bucket text, path text)
language sql security definer set search_path = pg_catalog, pg_temp as $$
  with due as (
    select f.ctid, case
      when f.bucket = 'inputs' then (
        select private.file_changed_at(f.bucket, f.path) > f.marked_at
          or exists (select from private.live_jobs as j where j.user_id = e.user_id)
        from public.entitlements as e where e.user_id = private.owner_of(f.user_id)
      )
      when f.generation_id is null then private.is_output(f.path)
      else (
        select g.deleted_at is null or private.is_source(g.id)
        from public.generations as g where g.id = f.generation_id
      )
    end as is_needed
    from private.expired_files as f
    where f.try_at <= now() order by f.try_at limit p_at_most for update skip locked
  ),
  kept as (
    delete from private.expired_files as f
    where f.ctid = any (array(select d.ctid from due as d where d.is_needed))
  )
  update private.expired_files as f
  set try_at = now() + (select s.lease from private.settings as s)
  where f.ctid = any (array(select d.ctid from due as d where d.is_needed is not true))
  returning f.bucket, f.path
$$;

comment on function private.list_expired_files is
  'Up to p_at_most files to delete from Storage. They are the caller''s for the time of a lease '
  '(settings.lease); what is not forgotten by then is listed again.';

-- Erases generations none of whose files are left, and batches none of whose generations are.
create function private.erase_generations(p_ids uuid[]) returns integer
language sql set search_path = pg_catalog, pg_temp as $$
  with erased as (
    delete from public.generations as g
    where g.id = any (p_ids) and g.finished_at is not null and g.deleted_at is not null
      and not exists (select from private.expired_files as f where f.generation_id = g.id)
    returning g.id, g.batch_id
  ),
  emptied as (
    delete from public.batches as b
    where b.id = any (array(select e.batch_id from erased as e)) and not exists (
      select from unnest(b.job_ids) as j (id) inner join public.generations as g on g.id = j.id
      where g.id <> all (array(select e.id from erased as e))
    )
  )
  select count(*)::integer from erased
$$;

-- Forgets files, each as bucket/path, that Storage has no record of, and erases generations whose
-- last ones they were. Generations are locked before files, as expire_generations (85) does.
create function private.forget(p_files text[]) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_ids uuid[] := array(
    select g.id from public.generations as g
    where g.id = any (array(
      select f.generation_id
      from unnest(p_files) as gone (name)
      inner join private.expired_files as f
        on f.bucket = split_part(gone.name, '/', 1)
        and f.path = substr(gone.name, strpos(gone.name, '/') + 1)
    ))
    order by g.id for update
  );
begin
  delete from private.expired_files as f
  using unnest(p_files) as gone (name)
  where f.bucket = split_part(gone.name, '/', 1)
    and f.path = substr(gone.name, strpos(gone.name, '/') + 1)
    and private.file_changed_at(f.bucket, f.path) is null;
  return private.erase_generations(v_ids);
end;
$$;

create function private.forget_files(p_buckets text[], p_paths text[]) returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms' as $$
begin
  perform private.skip_failing('select private.forget($1)', array(
    select concat(gone.bucket, '/', gone.path)
    from unnest(p_buckets, p_paths) as gone (bucket, path)
    inner join private.expired_files as f on f.bucket = gone.bucket and f.path = gone.path
    order by f.generation_id, gone.path
  ));
  return (
    select count(*)
    from unnest(p_buckets, p_paths) as kept (bucket, path)
    inner join private.expired_files as f on f.bucket = kept.bucket and f.path = kept.path
  );
end;
$$;

comment on function private.forget_files is
  'Says that these files are gone from Storage. A generation whose last one it was is erased with '
  'all its rows. What Storage still has on record, or cannot be erased here, is not forgotten: '
  'answers how many. Repeating it changes nothing.';

-- What goes with a generation, and with a user.

create function private.erase_images_of_generation() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  delete from public.images where generation_id = old.id;
  delete from private.retries where retry_of = old.id;
  delete from private.sources where source_id = old.id;
  return null;
end;
$$;

create trigger generations_erase_images after delete on public.generations
for each row execute function private.erase_images_of_generation();

-- Locks the live jobs of a user and then the entitlement, in the order that all endings of jobs do:
-- else those two could wait for each other.
--
-- Jobs in order of id, ready or running, as cancel_jobs (77) does. A job moves between the tables,
-- or is enqueued, until we hold them all. Then we let go of the entitlement and look again.
create function private.lock_jobs(p_user_id uuid) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_id uuid;
  v_locked integer;
begin
  for v_look in 1 .. 20 loop
    v_locked := 0;
    for v_id in
      select j.job_id from private.live_jobs as j where j.user_id = p_user_id order by j.job_id
    loop
      while exists (select from private.live_jobs as j where j.job_id = v_id) loop
        perform from private.ready_jobs where job_id = v_id for update;
        if not found then
          perform from private.running_jobs where job_id = v_id for update;
        end if;
        if found then
          v_locked := v_locked + 1;
          exit;
        end if;
      end loop;
    end loop;
    begin
      perform from public.entitlements where user_id = p_user_id for update;
      exit when v_locked = (
        select count(*) from private.live_jobs as j where j.user_id = p_user_id
      );
      raise sqlstate 'DR003' using message = 'jobs_moved';
    exception when sqlstate 'DR003' then
      null;
    end;
  end loop;
end;
$$;

-- Changes nothing: whether the user really goes is for other triggers to say.
create function private.lock_jobs_of_deleted_user() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform private.lock_jobs(old.id);
  return old;
end;
$$;

create trigger darkroom_lock_jobs
before delete on auth.users
for each row execute function private.lock_jobs_of_deleted_user();

create function private.delete_entitlement_of_deleted_user() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  delete from public.entitlements where user_id = old.id;
  return null;
end;
$$;

create trigger darkroom_delete_entitlement
after delete on auth.users
for each row execute function private.delete_entitlement_of_deleted_user();

-- Erases what a user who is gone has here. First every file is marked: those of images, then what
-- else Storage has on record in the user's folder. The generations are locked before, as
-- expire_generations (85) does. Live jobs, whose rows are locked, are taken out of the queue; their
-- workers stop them at the provider.
create function private.erase_deleted_user() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_folders uuid[] := private.folders_of(old.user_id);
  v_files text[];
  v_job private.running_jobs;
  v_jobs private.running_jobs[] := '{}'::private.running_jobs[];
begin
  perform from public.generations where user_id = old.user_id order by id for update;
  v_files := array(
    select concat('generations/', f.path)
    from public.images as i
    cross join lateral (values (i.storage_path), (i.preview_path)) as f (path)
    where i.user_id = old.user_id and f.path is not null
    order by f.path
  );
  if to_regclass('storage.objects') is not null then
    -- From <id>/ up to <id>0, the next character: operators that the index of names serves.
    v_files := v_files || array(
      select concat(o.bucket_id, '/', o.name)
      from unnest(v_folders) as f (id)
      inner join storage.objects as o
        on o.name ~>=~ concat(f.id, '/') and o.name ~<~ concat(f.id, '0')
      where o.bucket_id in ('generations', 'inputs')
      order by o.name
    );
  end if;
  perform private.skip_failing('select private.mark_files($1)', v_files);
  for v_job in
    with ready as (delete from private.ready_jobs where user_id = old.user_id returning *),
    running as (delete from private.running_jobs where user_id = old.user_id returning *)
    select j.* from ready as r
    cross join lateral jsonb_populate_record(null::private.running_jobs, to_jsonb(r)) as j
    union all
    select r.* from running as r
  loop
    v_jobs := v_jobs || v_job;
    perform pg_notify('darkroom_worker_' || v_job.worker_id, 'cancel')
    where v_job.worker_id is not null;
  end loop;
  perform private.book_costs(v_jobs);
  delete from private.budgets where user_id = old.user_id;
  delete from public.generations where user_id = old.user_id;
  delete from public.batches where user_id = old.user_id;
  delete from private.credit_buckets where user_id = old.user_id;
  -- So that nothing is granted once more, what was paid for stays, without whom.
  delete from private.billing_customers where user_id = old.user_id;
  delete from private.billing_subscriptions where user_id = old.user_id;
  update private.billing_purchases set user_id = null where user_id = old.user_id;
  update private.billing_events
  set user_id = null, said = null, outcome = 'ignored', waits_for = null
  where user_id = old.user_id;
  perform private.erase_ledgers(v_folders);
  delete from private.merged_users where into_id = old.user_id;
  return null;
end;
$$;

create trigger entitlements_erase_rows
after delete on public.entitlements
for each row execute function private.erase_deleted_user();
