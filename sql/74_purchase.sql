-- Purchase: what a worker says about its dealings with the provider, so that nothing is bought
-- twice, and what was bought for one job never becomes another's.
--
-- Creating a job at the provider costs money and cannot be repeated safely. So a claim (72) counts
-- as the begin of it, and checkpoint_jobs is called the moment the provider's id is known. A worker
-- that dies between the two leaves create_started_at behind: the next attempt looks at the provider
-- for what may have been bought and takes it over with adopt_provider_job. What it finds is proven
-- by the whole input. Where that has addresses of sources, which nobody can know again,
-- begin_creates saves its hash beforehand, for recall_create. A worker that asks later than at once
-- proves with begin_creates, too, that no other has begun to look. A refused account pauses the
-- provider (28).
--
-- Whoever puts a provider's id into purchases has it, and nobody else ever.

create function private.begin_creates(
  p_job_ids uuid[], p_tokens bigint[], p_inputs bytea[] default null
) returns table (token bigint, create_started_at timestamptz)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
begin
  return query
  update private.running_jobs as r
  set input_sha256 = coalesce(p_inputs[array_position(p_tokens, r.token)], r.input_sha256)
  where r.job_id = any (p_job_ids) and r.token = any (p_tokens)
  returning r.token, r.create_started_at;
end;
$$;

comment on function private.begin_creates is
  'Called before the provider is asked to create these jobs, where seconds have passed since their '
  'claim, or where the input has addresses of sources: p_inputs are its SHA-256 then, else null. '
  'Answers each whose lease holds, and since when something may have been bought for it.';

create function private.recall_create(p_job_id uuid, p_token bigint)
returns table (create_started_at timestamptz, input_sha256 bytea)
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
begin
  return query
  select r.create_started_at, r.input_sha256 from private.running_jobs as r
  where r.job_id = p_job_id and r.token = p_token;
  if not found then
    perform private.refuse_lost_lease(p_job_id);
  end if;
end;
$$;

comment on function private.recall_create is
  'Since when something may have been bought for a job, and the SHA-256 that begin_creates saved '
  'last. Errors: DR001 lease_lost.';

create function private.checkpoint_jobs(
  p_job_ids uuid[], p_tokens bigint[], p_provider_job_ids text[]
) returns table (token bigint, verdict text)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
begin
  return query
  with saved as (
    update private.running_jobs as r
    set provider_job_id = p_provider_job_ids[array_position(p_tokens, r.token)]
    where r.job_id = any (p_job_ids) and r.token = any (p_tokens)
    returning r.token, r.job_id, r.provider_job_id
  ),
  bought as (
    insert into private.purchases (generation_id, provider_job_id)
    select s.job_id, s.provider_job_id from saved as s order by s.provider_job_id
    on conflict (generation_id, provider_job_id) do nothing  -- said before; another's is an error
  )
  select s.token, 'ok' from saved as s;
end;
$$;

comment on function private.checkpoint_jobs is
  'Saves the provider''s ids of jobs the moment they are known, so that no attempt buys one twice. '
  'Answers each job whose lease holds: ok. Errors, which change nothing for any of the jobs: 23505 '
  'the provider''s job is another''s.';

create function private.adopt_provider_job(
  p_job_id uuid, p_token bigint, p_candidates text[]
) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_adopted text;
begin
  select r.provider_job_id into v_adopted from private.running_jobs as r
  where r.job_id = p_job_id and r.token = p_token for update;
  if not found then
    perform private.refuse_lost_lease(p_job_id);
  elsif v_adopted is not null then
    return v_adopted;  -- the answer to the first call was lost
  end if;
  foreach v_adopted in array p_candidates loop
    insert into private.purchases (generation_id, provider_job_id)
    values (p_job_id, v_adopted) on conflict do nothing;
    if found then
      update private.running_jobs set provider_job_id = v_adopted where job_id = p_job_id;
      return v_adopted;
    end if;
  end loop;
  return null;
end;
$$;

comment on function private.adopt_provider_job is
  'Checkpoints the first of these provider ids, oldest first, that no job has had, and answers it; '
  'null if there is none. For creates whose answer was lost. Errors: DR001 lease_lost.';
