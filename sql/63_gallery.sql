-- What users do with their own generations: favorites, tags, delete and restore.
--
-- Each function locks the generation first, so that two devices of one user cannot mix their
-- changes, and writes only what differs. None of it touches the queue or money, and none of it is
-- a change of state that would be broadcast. Deleting hides: row and files stay until they are
-- erased, and until then it may be restored.

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
-- Raises: PT400 invalid_input, PT401 not_authenticated, PT404 not_found.
create function private.set_favorite(p_job_id uuid, p_is_favorite boolean) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform private.lock_own_generation(p_job_id);
  if p_is_favorite is null then
    perform private.refuse_input('is_favorite: neither true nor false');
  end if;
  update public.generations set is_favorite = p_is_favorite
  where id = p_job_id and is_favorite <> p_is_favorite;
  return json_build_object('job_id', p_job_id, 'is_favorite', p_is_favorite);
end;
$$;

-- Locks: the generation.
-- Raises: PT400 invalid_input, PT401 not_authenticated, PT404 not_found.
create function private.set_tags(p_job_id uuid, p_tags text[]) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_generation public.generations := private.lock_own_generation(p_job_id);
  v_tags text[];
begin
  if (cardinality(p_tags) <= 20) is not true then
    perform private.refuse_input('tags: not a list of at most 20');
  end if;
  v_tags := array(
    select distinct private.read_tag('tags', t.tag) from unnest(p_tags) as t (tag) order by 1
  );
  delete from public.generation_tags where generation_id = p_job_id and tag <> all (v_tags);
  insert into public.generation_tags (user_id, tag, generation_id)
  select v_generation.user_id, t.tag, p_job_id from unnest(v_tags) as t (tag)
  on conflict do nothing;
  return json_build_object('job_id', p_job_id, 'tags', v_tags);
end;
$$;

-- Makes the images of these generations private again.
--
-- Locks: the images. The generations are locked already, or an image could be shared meanwhile.
create function private.end_shares(p_generation_ids uuid[]) returns void
language sql set search_path = pg_catalog, pg_temp as $$
  update public.images set share_id = null, shows_prompt = false
  where generation_id = any (p_generation_ids) and share_id is not null
$$;

-- What it shared is private again, in the same moment.
--
-- Locks: the generation, its images.
-- Raises: PT401 not_authenticated, PT404 not_found, PT409 not_finished.
create function private.delete_generation(p_job_id uuid) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_generation public.generations := private.lock_own_generation(p_job_id, true);
  v_deleted_at timestamptz := coalesce(v_generation.deleted_at, now());
begin
  if v_generation.finished_at is null then
    raise sqlstate 'PT409' using
      message = 'not_finished',
      detail = 'job_id: the job is ' || v_generation.status,
      hint = 'Cancel it first, with cancel_generation.';
  end if;
  update public.generations set deleted_at = v_deleted_at
  where id = p_job_id and deleted_at is null;
  perform private.end_shares(array[p_job_id]);
  return json_build_object('job_id', p_job_id, 'deleted_at', v_deleted_at);
end;
$$;

-- What is being erased cannot come back: some of its files may
-- be gone.
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
