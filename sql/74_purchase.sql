-- Purchase: what a worker says about its dealings with the provider, so that nothing is bought
-- twice.
--
-- Creating a job at the provider costs money and cannot be repeated safely. So begin_create is
-- called before, and checkpoint the moment the provider's id is known. A worker that dies between
-- the two leaves create_started_at behind: the next attempt looks at the provider for what may have
-- been bought and takes it over with adopt_provider_job. A refused account pauses the provider
-- (71).

create or replace function private.begin_create(p_job_id uuid, p_token bigint)
returns timestamptz
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_before timestamptz;
begin
  select create_started_at into v_before
  from private.running_jobs where job_id = p_job_id and token = p_token for update;
  if not found then
    perform private.refuse_lost_lease(p_job_id);
  end if;
  update private.running_jobs set create_started_at = coalesce(v_before, clock_timestamp())
  where job_id = p_job_id and token = p_token;
  return v_before;
end;
$$;

comment on function private.begin_create is
  'Says that the provider is about to be asked to create, before it is asked. Answers when an '
  'earlier attempt was first about to, if its outcome was never learned: then look for what it '
  'may have bought before creating again. Errors: DR001 lease_lost.';

revoke all on function private.begin_create(uuid, bigint)
from public, anon, authenticated, service_role;
grant execute on function private.begin_create(uuid, bigint) to darkroom_worker;

create or replace function private.checkpoint(p_job_id uuid, p_token bigint, p_provider_job_id text)
returns void
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  update private.running_jobs set provider_job_id = p_provider_job_id
  where job_id = p_job_id and token = p_token;
  if not found then
    perform private.refuse_lost_lease(p_job_id);
  end if;
end;
$$;

comment on function private.checkpoint is
  'Saves the provider''s id of the job the moment it is known, so that no attempt buys it twice. '
  'Errors: DR001 lease_lost.';

revoke all on function private.checkpoint(uuid, bigint, text)
from public, anon, authenticated, service_role;
grant execute on function private.checkpoint(uuid, bigint, text) to darkroom_worker;

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
    perform private.checkpoint(p_job_id, p_token, v_adopted);
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
