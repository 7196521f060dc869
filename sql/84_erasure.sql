-- Erasure: files that wait to be deleted, and what goes with a deleted user.
--
-- The worker lists expired files, deletes them in Storage and forgets them; a generation goes with
-- its last file. All three may be repeated, so a worker that dies in between costs nothing.
--
-- Deleting a row of auth.users erases the user: a trigger takes the entitlement, and all rows go
-- with it by cascade; files are marked; the ledger goes as keep_ledger_of_deleted_users says. Every
-- path that is marked lies in the user's own folder, a rule of the table. What is uploaded for a
-- user who is gone is found as an orphan (85).

-- The id that is the n-th part of a path; null if that part is none.
create function private.path_id(p_path text, p_part integer) returns uuid
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select case
    when split_part(p_path, '/', p_part) ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
      then split_part(p_path, '/', p_part)::uuid
  end
$$;

-- Whether the job may still write its files.
create function private.is_live(p_job_id uuid) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select exists (select from private.live_jobs as j where j.job_id = p_job_id)
$$;

-- Whether an image is stored at this path of bucket generations.
create function private.has_image(p_path text) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select exists (
    select from public.images as i
    where i.generation_id = private.path_id(p_path, 2)
      and p_path in (i.storage_path, i.preview_path)
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

-- Whether a file has come to be needed again since it was marked: its generation was restored or
-- its job is live, or a user who is here has uploaded it anew.
create function private.is_needed_again(p_file private.expired_files) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select case
    when p_file.bucket = 'inputs' then
      exists (select from public.entitlements as e where e.user_id = p_file.user_id)
      and private.file_changed_at(p_file.bucket, p_file.path) > p_file.marked_at
    when private.is_live(private.path_id(p_file.path, 2)) then true
    when p_file.generation_id is null then private.has_image(p_file.path)
    else exists (
      select from public.generations as g
      where g.id = p_file.generation_id and g.deleted_at is null
    )
  end
$$;

create function private.list_expired_files(p_at_most integer default 100)
returns table (bucket text, path text)
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
  v_lease interval := (select s.lease from private.settings as s);
  v_file private.expired_files;
begin
  for v_file in
    select * from private.expired_files as f
    where f.try_at <= now() order by f.try_at limit p_at_most for update skip locked
  loop
    if private.is_needed_again(v_file) then
      delete from private.expired_files as f
      where f.bucket = v_file.bucket and f.path = v_file.path;
    else
      update private.expired_files as f set try_at = now() + v_lease
      where f.bucket = v_file.bucket and f.path = v_file.path;
      bucket := v_file.bucket;
      path := v_file.path;
      return next;
    end if;
  end loop;
end;
$$;

comment on function private.list_expired_files is
  'Up to p_at_most files to delete from Storage. They are the caller''s for the time of a lease '
  '(settings.lease); what is not forgotten by then is listed again.';

-- With a generation goes what hangs on it.
create function private.erase_parts_of_generation() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  delete from public.image_likes where generation_id = old.id;
  delete from public.images where generation_id = old.id;
  delete from public.generation_tags where generation_id = old.id;
  return null;
end;
$$;

create trigger generations_take_their_parts_along
after delete on public.generations
for each row execute function private.erase_parts_of_generation();

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
      select from public.generations as g
      where g.batch_id = b.id and g.id <> all (array(select e.id from erased as e))
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

-- Locks the user's live jobs and answers how many: one after the other in order of id, ready or
-- running, as cancel_jobs (77) does. A job may go from one to the other while we wait for it.
create function private.lock_jobs(p_user_id uuid) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_id uuid;
  v_locked integer := 0;
begin
  for v_id in
    select j.job_id from private.live_jobs as j where j.user_id = p_user_id order by j.job_id
  loop
    while private.is_live(v_id) loop
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
  return v_locked;
end;
$$;

-- Locks the live jobs of a user who is being deleted and then the entitlement, in the order that
-- all endings of jobs do: else those two could wait for each other. Changes nothing: whether the
-- user really goes is for other triggers to say.
--
-- A job moves between the tables, or is enqueued, until we hold them all. Then we let go of the
-- entitlement and look again.
create function private.lock_jobs_of_deleted_user() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_locked integer;
begin
  for v_look in 1 .. 20 loop
    v_locked := private.lock_jobs(old.id);
    begin
      perform from public.entitlements where user_id = old.id for update;
      exit when v_locked = (
        select count(*) from private.live_jobs as j where j.user_id = old.id
      );
      raise sqlstate 'DR003' using message = 'jobs_moved';
    exception when sqlstate 'DR003' then
      null;
    end;
  end loop;
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

-- Marks files, each as bucket/path, and answers how many were not marked yet. In order: of two that
-- mark the same files, one waits for the other, and not each for the other.
create function private.mark_files(p_files text[]) returns integer
language sql set search_path = pg_catalog, pg_temp as $$
  with marked as (
    insert into private.expired_files (bucket, path, user_id)
    select f.bucket, f.path, private.path_id(f.path, 1)
    from unnest(p_files) as gone (name)
    cross join lateral (
      select
        split_part(gone.name, '/', 1) as bucket,
        substr(gone.name, strpos(gone.name, '/') + 1) as path
    ) as f
    order by f.path, f.bucket
    on conflict (bucket, path) do nothing
    returning 1
  )
  select count(*)::integer from marked
$$;

-- Marks all files in the folders of a user who is being deleted, those without a row too. What
-- cannot be marked holds up no deletion: it is found as an orphan (85). Generations are locked
-- before their files are marked, as expire_generations (85) does.
create function private.expire_files_of_deleted_user() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_files text[];
begin
  perform from public.generations where user_id = old.user_id order by id for update;
  v_files := array(
    select concat('generations/', f.path)
    from public.images as i
    cross join lateral (values (i.storage_path), (i.preview_path)) as f (path)
    where i.user_id = old.user_id and f.path is not null
    order by f.path
  );
  perform private.skip_failing('select private.mark_files($1)', v_files);
  if to_regclass('storage.objects') is not null then
    -- From <id>/ up to <id>0, the next character: operators that the index of names serves.
    v_files := array(
      select concat(o.bucket_id, '/', o.name)
      from storage.objects as o
      where o.name ~>=~ concat(old.user_id, '/') and o.name ~<~ concat(old.user_id, '0')
        and o.bucket_id in ('generations', 'inputs')
      order by o.name
    );
    perform private.skip_failing('select private.mark_files($1)', v_files);
  end if;
  return old;
end;
$$;

create trigger entitlements_expire_files
before delete on public.entitlements
for each row execute function private.expire_files_of_deleted_user();

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

create function private.erase_ledger_of_deleted_user() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform private.erase_ledger(old.user_id);
  return null;
end;
$$;

create trigger entitlements_erase_ledger
after delete on public.entitlements
for each row execute function private.erase_ledger_of_deleted_user();

-- Erases what a user who is gone has here, and takes the live jobs, whose rows are locked, out of
-- the queue. Their workers stop them at the provider.
create function private.erase_generations_of_deleted_user() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_worker_id bigint;
begin
  delete from private.ready_jobs where user_id = old.user_id;
  for v_worker_id in
    delete from private.running_jobs where user_id = old.user_id returning worker_id
  loop
    perform pg_notify('darkroom_worker_' || v_worker_id, 'cancel');
  end loop;
  delete from public.generations where user_id = old.user_id;
  delete from public.batches where user_id = old.user_id;
  delete from public.image_likes where user_id = old.user_id;
  delete from public.prompt_templates where user_id = old.user_id;
  return null;
end;
$$;

create trigger entitlements_erase_generations
after delete on public.entitlements
for each row execute function private.erase_generations_of_deleted_user();
