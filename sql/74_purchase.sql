-- Purchase: what a worker says about its dealings with the provider, so that nothing is bought
-- twice.
--
-- Creating a job at the provider costs money and cannot be repeated safely. So a claim (72) counts
-- as the begin of it, and checkpoint_jobs is called the moment the provider's id is known. A worker
-- that dies between the two leaves create_started_at behind: the next attempt looks at the provider
-- for what may have been bought and takes it over with adopt_provider_job. A worker that asks later
-- than at once proves with begin_creates that no other has begun to look. A refused account pauses
-- the provider (71).

create or replace function private.begin_creates(p_job_ids uuid[], p_tokens bigint[])
returns table (token bigint, create_started_at timestamptz)
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
#variable_conflict use_column
begin
  return query
  select r.token, r.create_started_at from private.running_jobs as r
  where r.job_id = any (p_job_ids) and r.token = any (p_tokens);
end;
$$;

comment on function private.begin_creates is
  'Called before the provider is asked to create these jobs, where seconds have passed since their '
  'claim. Answers each whose lease holds, and since when something may have been bought for it.';

revoke all on function private.begin_creates(uuid[], bigint[])
from public, anon, authenticated, service_role;
grant execute on function private.begin_creates(uuid[], bigint[]) to darkroom_worker;

create or replace function private.checkpoint_jobs(
  p_job_ids uuid[],
  p_tokens bigint[],
  p_provider_job_ids text[]
)
returns table (token bigint, verdict text)
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
#variable_conflict use_column
begin
  return query
  update private.running_jobs as r
  set provider_job_id = p_provider_job_ids[array_position(p_tokens, r.token)]
  where r.job_id = any (p_job_ids) and r.token = any (p_tokens)
  returning r.token, 'ok';
end;
$$;

comment on function private.checkpoint_jobs is
  'Saves the provider''s ids of jobs the moment they are known, so that no attempt buys one twice. '
  'Answers each job whose lease holds: ok.';

revoke all on function private.checkpoint_jobs(uuid[], bigint[], text[])
from public, anon, authenticated, service_role;
grant execute on function private.checkpoint_jobs(uuid[], bigint[], text[]) to darkroom_worker;

-- One at a time: two jobs with the same input must not take the same provider job.
create or replace function private.adopt_provider_job(
  p_job_id uuid,
  p_token bigint,
  p_candidates text[]
)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_adopted text;
begin
  perform pg_advisory_xact_lock(hashtextextended('darkroom.adopt_provider_job', 0));
  select r.provider_job_id into v_adopted from private.running_jobs as r
  where r.job_id = p_job_id and r.token = p_token;
  if not found then
    perform private.refuse_lost_lease(p_job_id);
  elsif v_adopted is not null then
    return v_adopted;  -- the answer to the first call was lost
  end if;
  select c.id into v_adopted
  from unnest(p_candidates) with ordinality as c (id, place)
  where not exists (select from private.attempts as a where a.provider_job_id = c.id)
    and not exists (select from private.running_jobs as r where r.provider_job_id = c.id)
    and not exists (select from private.ready_jobs as r where r.provider_job_id = c.id)
  order by c.place limit 1;
  if found then
    update private.running_jobs set provider_job_id = v_adopted
    where job_id = p_job_id and token = p_token;
  end if;
  return v_adopted;
end;
$$;

comment on function private.adopt_provider_job is
  'Checkpoints the first of these provider ids, oldest first, that no other job has, and answers '
  'it; null if all are taken. For creates whose answer was lost. Errors: DR001 lease_lost.';

revoke all on function private.adopt_provider_job(uuid, bigint, text[])
from public, anon, authenticated, service_role;
grant execute on function private.adopt_provider_job(uuid, bigint, text[]) to darkroom_worker;
