-- For workers of the release before: they finish what they hold when the database is upgraded, get
-- no more jobs, and wait to be replaced (docs/RUNBOOK.md, Upgrading). All of this goes with the
-- next release.

create function private.begin_creates(
  p_job_ids uuid[], p_tokens bigint[], p_inputs bytea[] default null
) returns table (token bigint, create_started_at timestamptz)
language sql security definer set search_path = pg_catalog, pg_temp as $$
  select r.token, r.create_started_at from private.running_jobs as r
  where r.job_id = any (p_job_ids) and r.token = any (p_tokens)
$$;

create function private.recall_create(p_job_id uuid, p_token bigint)
returns table (create_started_at timestamptz, input_sha256 bytea)
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  return query
  select r.create_started_at, null::bytea from private.running_jobs as r
  where r.job_id = p_job_id and r.token = p_token;
  if not found then
    perform private.refuse_lost_lease(p_job_id);
  end if;
end;
$$;

create function private.checkpoint_jobs(
  p_job_ids uuid[], p_tokens bigint[], p_provider_job_ids text[]
) returns table (token bigint, verdict text)
language sql security definer set search_path = pg_catalog, pg_temp as $$
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
  select s.token, 'ok' from saved as s
$$;

create function private.adopt_provider_job(
  p_job_id uuid, p_token bigint, p_candidates text[]
) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_job private.running_jobs;
  v_id text;
begin
  select * into v_job from private.running_jobs where job_id = p_job_id and token = p_token
  for update;
  if not found then
    perform private.refuse_lost_lease(p_job_id);
  elsif v_job.provider_job_id is not null then
    return v_job.provider_job_id;  -- the answer to the first call was lost
  end if;
  foreach v_id in array p_candidates loop
    if private.adopt(v_job, v_id) then
      return v_id;
    end if;
  end loop;
  return null;
end;
$$;
