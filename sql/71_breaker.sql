-- Breakers: a model or a provider that keeps failing is left alone for a while.
--
-- A breaker is a row named like a model or a provider; where there is none, all is well. Closed:
-- failures in a row are counted, and a success between starts anew. Enough of them open it: its
-- jobs are not claimed (72) and new ones are refused (30), for longer each time. When that is over
-- it is half-open: one job is let through as a probe. Its success closes the breaker, its failure
-- opens it again. A probe that ends in any other way, or dies, leaves its place to the next, since
-- it counts only as long as it is in running_jobs. Jobs that wait lose neither attempts nor place.
--
-- An operator opens and closes a breaker with pause_model and resume_model. A pause of theirs just
-- ends when it is over.
--
-- Lock order: a breaker comes after all other rows, and a provider's before its models'. A job that
-- ends without anything to count or to reset takes no lock here.

create or replace function private.breaker_state(p_breaker private.breakers)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select case
    when p_breaker.paused_until > now() then 'open'
    when p_breaker.paused_until is null or p_breaker.times_opened = 0 then 'closed'
    when exists (
      select from private.running_jobs as r where r.job_id = p_breaker.probe_job_id
    ) then 'probing'
    else 'half-open'
  end
$$;

revoke all on function private.breaker_state(private.breakers)
from public, anon, authenticated, service_role;

create or replace function private.breaker_json(p_breaker private.breakers)
returns json
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select json_build_object(
    'name', p_breaker.name,
    'state', b.state,
    'paused_until', case when b.state = 'open' then p_breaker.paused_until end,
    'reason', case when b.state <> 'closed' then p_breaker.pause_reason end,
    'failures', p_breaker.failures,
    'times_opened', p_breaker.times_opened
  )
  from (select private.breaker_state(p_breaker) as state) as b
$$;

revoke all on function private.breaker_json(private.breakers)
from public, anon, authenticated, service_role;

-- The models no job of which may be claimed now, each with a breaker that blocks it.
create or replace function private.blocked_models()
returns jsonb
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select coalesce(jsonb_object_agg(m.id, b.name), '{}')
  from private.breakers as b
  inner join public.models as m on b.name in (m.id, m.provider)
  where b.paused_until is not null and private.breaker_state(b) in ('open', 'probing')
$$;

revoke all on function private.blocked_models() from public, anon, authenticated, service_role;

-- Closes breakers whose operator's pause is over.
create or replace function private.end_pauses()
returns void
language sql
set search_path = pg_catalog, pg_temp
as $$
  update private.breakers set paused_until = null, pause_reason = null
  where name = any (array(
    select b.name from private.breakers as b
    where b.paused_until <= now() and b.times_opened = 0 for update skip locked
  ))
$$;

revoke all on function private.end_pauses() from public, anon, authenticated, service_role;

-- Lets this job be the probe of a half-open breaker, unless there is one. Answers whether it is.
create or replace function private.begin_probe(p_name text, p_seq bigint)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  perform from private.breakers
  where name = p_name and paused_until <= now() and times_opened > 0 for update skip locked;
  if not found then
    return false;
  end if;
  -- A new look, now that nobody else can begin one.
  update private.breakers as b set probe_job_id = r.job_id
  from private.ready_jobs as r
  where b.name = p_name and r.seq = p_seq and private.breaker_state(b) = 'half-open';
  return found;
end;
$$;

revoke all on function private.begin_probe(text, bigint)
from public, anon, authenticated, service_role;

-- Opens a breaker, for twice as long as the last time in a row.
create or replace function private.open_breaker(p_name text, p_reason text)
returns void
language sql
set search_path = pg_catalog, pg_temp
as $$
  update private.breakers as b set
    failures = 0,
    failing_since = null,
    failed_users = '{}',
    times_opened = least(b.times_opened + 1, 1000),
    paused_until = now()
      + least(s.breaker_pause_cap, s.breaker_pause * power(2, least(b.times_opened, 20))),
    pause_reason = p_reason,
    probe_job_id = null
  from private.settings as s
  where b.name = p_name
$$;

revoke all on function private.open_breaker(text, text)
from public, anon, authenticated, service_role;

-- Counts one failure against a breaker, which the caller has locked, and opens it if that was
-- enough. While it is open only its probe counts: what else fails then began before.
create or replace function private.count_failure(
  p_name text,
  p_job private.running_jobs,
  p_code text,
  p_threshold integer
)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_breaker private.breakers := (select b from private.breakers as b where b.name = p_name);
  v_settings private.settings := (select s from private.settings as s);
begin
  if v_breaker.probe_job_id = p_job.job_id then
    perform private.open_breaker(p_name, format('the probe failed: %s', p_code));
  elsif private.breaker_state(v_breaker) = 'closed' then
    if v_breaker.failing_since > now() - v_settings.breaker_window then
      v_breaker.failures := v_breaker.failures + 1;
    else
      v_breaker.failures := 1;
      v_breaker.failing_since := now();
      v_breaker.failed_users := '{}';
    end if;
    if cardinality(v_breaker.failed_users) < v_settings.breaker_users
      and not p_job.user_id = any (v_breaker.failed_users) then
      v_breaker.failed_users := v_breaker.failed_users || p_job.user_id;
    end if;
    update private.breakers set
      failures = v_breaker.failures, failing_since = v_breaker.failing_since,
      failed_users = v_breaker.failed_users
    where name = p_name;
    if v_breaker.failures >= p_threshold
      and cardinality(v_breaker.failed_users) >= v_settings.breaker_users then
      perform private.open_breaker(
        p_name, format('%s failures in a row, the last: %s', v_breaker.failures, p_code)
      );
    end if;
  end if;
end;
$$;

revoke all on function private.count_failure(text, private.running_jobs, text, integer)
from public, anon, authenticated, service_role;

-- Counts a failed attempt against its model, and against the provider unless the model is paused:
-- one model alone does not pause a provider.
--
-- Locks: the breakers of the provider and the model.
create or replace function private.note_failure(p_job private.running_jobs, p_code text)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_provider text := (select m.provider from public.models as m where m.id = p_job.model_id);
  v_settings private.settings := (select s from private.settings as s);
  v_breaker private.breakers;
  v_counts boolean;
begin
  if v_provider is null then
    return;
  end if;
  insert into private.breakers (name) values (v_provider), (p_job.model_id) on conflict do nothing;
  select * into v_breaker from private.breakers where name = v_provider for update;
  v_counts := v_breaker.probe_job_id = p_job.job_id;
  select * into v_breaker from private.breakers where name = p_job.model_id for update;
  if v_counts or private.breaker_state(v_breaker) = 'closed' then
    perform private.count_failure(
      v_provider, p_job, p_code, v_settings.breaker_provider_failures
    );
  end if;
  perform private.count_failure(p_job.model_id, p_job, p_code, v_settings.breaker_failures);
end;
$$;

revoke all on function private.note_failure(private.running_jobs, text)
from public, anon, authenticated, service_role;

-- Jobs ended well: failures of their models are forgotten, and what one was the probe of is closed.
-- The caller knows that there is something to forget.
--
-- Locks: the breakers of the providers and the models.
create or replace function private.note_successes(p_jobs private.running_jobs[])
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_job record;
begin
  for v_job in
    select j.job_id, names.name
    from unnest(p_jobs) as j
    left join public.models as m on m.id = j.model_id
    cross join lateral (values (1, m.provider), (2, j.model_id)) as names (place, name)
    order by m.provider, names.place, j.model_id
  loop
    update private.breakers set failures = 0, failing_since = null, failed_users = '{}'
    where name = v_job.name and failures > 0;
    update private.breakers set
      times_opened = 0, paused_until = null, pause_reason = null, probe_job_id = null
    where name = v_job.name and probe_job_id = v_job.job_id;
    if found then
      perform private.wake_workers();
    end if;
  end loop;
end;
$$;

revoke all on function private.note_successes(private.running_jobs[])
from public, anon, authenticated, service_role;

create or replace function private.pause_provider(
  p_provider text,
  p_seconds integer,
  p_reason text
)
returns void
language sql
security definer
set search_path = pg_catalog, pg_temp
as $$
  insert into private.breakers as b (name, paused_until, pause_reason, times_opened)
  select
    p_provider, now() + least(p_seconds, 3600) * interval '1 second', left(p_reason, 500), 1
  where exists (select from public.models as m where m.provider = p_provider)
  on conflict (name) do update set
    paused_until = greatest(b.paused_until, excluded.paused_until),
    pause_reason = excluded.pause_reason,
    times_opened = greatest(b.times_opened, 1),
    probe_job_id = null
$$;

comment on function private.pause_provider is
  'Keeps the jobs of a provider from being claimed for a while: the account was refused, and no '
  'job is to blame. Nothing fails and nobody is charged for it.';

revoke all on function private.pause_provider(text, integer, text)
from public, anon, authenticated, service_role;
grant execute on function private.pause_provider(text, integer, text) to darkroom_worker;

-- Raises PT404 not_found unless it is a model or a provider of one.
create or replace function private.require_breaker_name(p_name text)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if not exists (select from public.models as m where p_name in (m.id, m.provider)) then
    perform private.refuse_missing(
      'model: no such model or provider',
      'Use the id of a model or the name of a provider in public.models.'
    );
  end if;
end;
$$;

revoke all on function private.require_breaker_name(text)
from public, anon, authenticated, service_role;

-- Body of public.pause_model. Ends what the breaker counted: the pause is the operator's now.
--
-- Raises: PT400 invalid_input, PT404 not_found.
create or replace function private.pause_model(p_model text, p_until timestamptz, p_reason text)
returns json
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_breaker private.breakers;
begin
  perform private.require_writable();
  perform private.require_breaker_name(p_model);
  if coalesce(p_until <= now(), true) then
    perform private.refuse_input(
      'until: not in the future', 'Leave it out to pause until resumed.'
    );
  elsif length(p_reason) > 500 then
    perform private.refuse_input('reason: longer than 500 characters');
  end if;
  insert into private.breakers (name, paused_until, pause_reason)
  values (p_model, p_until, p_reason)
  on conflict (name) do update set
    failures = 0, failing_since = null, failed_users = '{}', times_opened = 0, probe_job_id = null,
    paused_until = excluded.paused_until, pause_reason = excluded.pause_reason
  returning * into v_breaker;
  return private.breaker_json(v_breaker);
end;
$$;

revoke all on function private.pause_model(text, timestamptz, text)
from public, anon, authenticated, service_role;
grant execute on function private.pause_model(text, timestamptz, text) to service_role;

create or replace function public.pause_model(
  model text,
  until timestamptz default 'infinity',
  reason text default null
)
returns json
language sql
set search_path = pg_catalog, pg_temp
as $$
  select private.pause_model(pause_model.model, pause_model.until, pause_model.reason)
$$;

comment on function public.pause_model is
  'Pauses a model, or all models of a provider, until a time or resume_model: new requests are '
  'refused with model_paused, queued jobs wait and keep their place, running ones go on. Answers '
  '{name, state (open | closed | half-open | probing), paused_until, reason, failures, '
  'times_opened}. Errors: PT400 invalid_input, PT404 not_found.';

revoke all on function public.pause_model(text, timestamptz, text)
from public, anon, authenticated, service_role;
grant execute on function public.pause_model(text, timestamptz, text) to service_role;

-- Body of public.resume_model.
--
-- Raises: PT404 not_found.
create or replace function private.resume_model(p_model text)
returns json
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_breaker private.breakers;
begin
  perform private.require_writable();
  perform private.require_breaker_name(p_model);
  insert into private.breakers (name) values (p_model)
  on conflict (name) do update set
    failures = 0, failing_since = null, failed_users = '{}', times_opened = 0, probe_job_id = null,
    paused_until = null, pause_reason = null
  returning * into v_breaker;
  perform private.wake_workers();
  return private.breaker_json(v_breaker);
end;
$$;

revoke all on function private.resume_model(text) from public, anon, authenticated, service_role;
grant execute on function private.resume_model(text) to service_role;

create or replace function public.resume_model(model text)
returns json
language sql
set search_path = pg_catalog, pg_temp
as $$
  select private.resume_model(resume_model.model)
$$;

comment on function public.resume_model is
  'Ends a pause of a model or a provider, whoever began it: its jobs are claimed at once, in their '
  'old order. Repeating it changes nothing. Answers as pause_model does. Errors: PT404 not_found.';

revoke all on function public.resume_model(text) from public, anon, authenticated, service_role;
grant execute on function public.resume_model(text) to service_role;
