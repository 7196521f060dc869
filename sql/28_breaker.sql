-- Breakers: a model or a provider that keeps failing is left alone for a while.
--
-- A breaker is a row named like a provider or a route: a model's own is named like the model, the
-- others owner/name#place. A job whose route is shut takes the next (72); only where all are, it
-- waits, and new ones are refused. Where there is no breaker, all is well. Closed:
-- failures in a row are counted, and a success between starts anew; what fails again in the same
-- words, with the same input of the same user, tells nothing new. Enough of them, from enough
-- users, open it. Nobody can tell yet who is to blame: the model, or the input of these users. So
-- for a pause, longer each time, only their jobs are not claimed (72) and refused (30). The jobs of
-- others are tried, one at a time: a failure makes its user one of them, a success closes the
-- breaker. Whoever failed where another then succeeded is doubted for a while: their failures
-- count no more. When a pause is over it is half-open: one job is tried, of a user who has not
-- failed if there is one, and its failure opens the breaker again.
--
-- What is tried is the probe. One that ends without an answer, dies, or takes longer than the pause
-- leaves its place to the next. Jobs that wait lose neither attempts nor place.
--
-- A provider whose account is refused is paused for everybody (pause_provider). An operator opens
-- and closes a breaker with pause_model and resume_model; a pause of theirs is for everybody, of a
-- model one of all its routes, and just ends when it is over.
--
-- Lock order: a breaker comes after all other rows, and a provider's before its routes'. A job that
-- ends without anything to count or to reset takes no lock here.

create table private.breakers (
  name text primary key,
  failures smallint not null default 0,
  failing_since timestamptz,
  counted uuid[] not null default '{}',
  failed_users uuid[] not null default '{}',
  times_opened smallint not null default 0,
  paused_until timestamptz,
  pause_reason text,
  probe_job_id uuid,
  resumed_at timestamptz,
  doubted_users uuid[] not null default '{}',
  doubted_at timestamptz
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 50);

comment on table private.breakers is
  'Routes and providers that failed or were paused: whether their jobs wait.';
comment on column private.breakers.counted is
  'What the failures said and of what, as hashes: equal ones count once.';
comment on column private.breakers.failed_users is
  'Different users among the failures. While it is paused their jobs wait and others are tried; '
  'where there are none, everybody''s wait.';
comment on column private.breakers.times_opened is
  'Pauses in a row by failures or a refused account: the next is longer. 0: none, or an operator''s'
  ' pause, which ends without a probe.';
comment on column private.breakers.paused_until is
  'null: closed. In the future: open, no job is claimed. Past: half-open, one job is tried.';
comment on column private.breakers.probe_job_id is
  'The job that is tried, as long as it is in running_jobs.';
comment on column private.breakers.resumed_at is 'When its last pause ended.';
comment on column private.breakers.doubted_users is
  'Users who failed where others then succeeded: for breaker_pause_cap from doubted_at their '
  'failures count for nobody else.';

create view private.route_breakers with (security_invoker = true) as
select
  w.model_id,
  w.place,
  b as breaker
from private.routes as w
inner join private.breakers as b on b.name = any(array[w.provider, w.breaker, w.model_id])
-- What failures began is the own route's alone.
where b.name in (w.provider, w.breaker) or b.times_opened = 0;

comment on view private.route_breakers is
  'The breakers that shut each route: its own, its provider''s, and an operator''s of the model.';

create view private.served_providers with (security_invoker = true) as
select p.name
from private.providers as p
where p.is_active and (
  p.secret is null or exists (
    select from private.workers as w cross join private.settings as s
    where w.seen_at > now() - s.lease and p.secret = any(w.keys)
  )
);

comment on view private.served_providers is
  'Providers that are switched on, and need no key or one that a living worker has.';

create view private.paused_models with (security_invoker = true) as
select
  m.id,
  case when not exists (
    select from private.model_routes as w
    inner join private.served_providers as s on w.provider = s.name
    where w.model_id = m.id and not exists (
      select from private.route_breakers as o
      where o.model_id = w.model_id and o.place = w.place and (o.breaker).paused_until is not null
    )
  ) then b.paused_until end as paused_until,
  b.resumed_at,
  b.times_opened
from private.breakers as b
inner join public.models as m on b.name in (m.id, m.provider)
where b.paused_until is not null or b.resumed_at is not null;

comment on view private.paused_models is
  'Models that are paused, themselves or with their provider, by all routes, or were.';

-- Until when the model is paused for this user, by all routes that are served; null unless it is. A
-- pause that failures began is one for those who failed.
--
-- Who keeps failing where others do not, as the breakers noticed, is let wait like a model:
-- for the window in which so many failures would pause one.
create function private.paused_until(p_model public.models, p_user_id uuid) returns timestamptz
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_until timestamptz;
  v_is_suspected boolean;
begin
  select
    max(b.paused_until) filter (
      where b.paused_until > now() and (b.failed_users = '{}' or p_user_id = any (b.failed_users))
    ),
    bool_or(p_user_id = any (b.failed_users || b.doubted_users))
  into v_until, v_is_suspected
  from private.breakers as b where b.name in (p_model.id, p_model.provider);
  if v_until is not null then
    select case when count(*) = count(other.until) then least(v_until, min(other.until)) end
    into v_until
    from private.model_routes as w
    inner join private.served_providers as s on s.name = w.provider
    cross join lateral (
      select max((b.breaker).paused_until) as until
      from private.route_breakers as b
      where (b.model_id, b.place) = (w.model_id, w.place) and (b.breaker).paused_until > now() and (
        (b.breaker).failed_users = '{}' or p_user_id = any ((b.breaker).failed_users)
      )
    ) as other
    where w.model_id = p_model.id;
  end if;
  if v_is_suspected then
    v_until := greatest(v_until, (
      select recent.finished_at + s.breaker_window
      from private.settings as s
      cross join lateral (
        select g.finished_at from (
          select * from public.generations where user_id = p_user_id order by id desc limit 100
        ) as g
        inner join private.error_codes as e on e.code = g.error_code and e.trips_breaker
        where g.model_id = p_model.id and g.finished_at > now() - s.breaker_window
        order by g.finished_at desc offset s.breaker_failures - 1 limit 1
      ) as recent
    ));
  end if;
  return v_until;
end;
$$;

-- How long the n-th pause in a row lasts.
create function private.pause_length(p_times integer) returns interval
language sql stable set search_path = pg_catalog, pg_temp as $$
  select least(s.breaker_pause_cap, s.breaker_pause * power(2, least(p_times - 1, 20)))
  from private.settings as s
$$;

create function private.breaker_state(p_breaker private.breakers) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select case
    when p_breaker.paused_until is null then 'closed'
    when p_breaker.times_opened = 0
      then case when p_breaker.paused_until > now() then 'open' else 'closed' end
    when exists (
      select from private.running_jobs as r
      where r.job_id = p_breaker.probe_job_id
        and r.claimed_at > now() - private.pause_length(p_breaker.times_opened)
    ) then 'probing'
    when p_breaker.paused_until > now() then 'open'
    else 'half-open'
  end
$$;

create function private.breaker_json(p_breaker private.breakers) returns json
language sql stable set search_path = pg_catalog, pg_temp as $$
  select json_build_object(
    'name', p_breaker.name,
    'state', b.state,
    'paused_until', case when p_breaker.paused_until > now() then p_breaker.paused_until end,
    'reason', case when b.state <> 'closed' then p_breaker.pause_reason end,
    'failures', p_breaker.failures,
    'times_opened', p_breaker.times_opened
  )
  from (select private.breaker_state(p_breaker) as state) as b
$$;

-- Whether a job may be claimed in spite of the breaker: as its probe, unless it is closed. From a
-- hundred users on who have failed it is no few users' input: nobody is tried during a pause.
create function private.admits(p_breaker private.breakers, p_user_id uuid) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select case private.breaker_state(p_breaker)
    when 'open' then cardinality(p_breaker.failed_users) between 1 and 99
      and not p_user_id = any (p_breaker.failed_users)
    when 'probing' then false
    else true
  end
$$;

create function private.is_doubted(p_breaker private.breakers, p_user_id uuid) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(
    p_user_id = any (p_breaker.doubted_users)
      and p_breaker.doubted_at > now() - s.breaker_pause_cap,
    false
  )
  from private.settings as s
$$;

-- Counts one failure against a breaker, which the caller has locked, and opens it if that was
-- enough, or if its probe failed after the pause.
create function private.count_failure(
  p_name text, p_job private.running_jobs, p_code text, p_words uuid, p_threshold integer
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_breaker private.breakers := (select b from private.breakers as b where b.name = p_name);
  v_settings private.settings := (select s from private.settings as s);
  v_is_closed boolean := private.breaker_state(v_breaker) = 'closed';
  v_opens boolean;
begin
  -- Neither who is doubted counts, nor what fails while an operator's pause lasts.
  if (v_is_closed and private.is_doubted(v_breaker, p_job.user_id))
    or (not v_is_closed and v_breaker.times_opened = 0) then
    return;
  end if;
  if v_is_closed and v_breaker.failing_since > now() - v_settings.breaker_window is not true then
    v_breaker.failures := 0;
    v_breaker.failing_since := now();
    v_breaker.failed_users := '{}';
  end if;
  if v_breaker.failures = 0 then
    v_breaker.counted := '{}';
  end if;
  if v_is_closed and p_words = any (v_breaker.counted) then
    return;
  end if;
  -- Where everybody waits, nobody in particular does.
  if cardinality(v_breaker.failed_users) between (not v_is_closed)::integer and 99
    and not p_job.user_id = any (v_breaker.failed_users) then
    v_breaker.failed_users := v_breaker.failed_users || p_job.user_id;
  end if;
  if v_is_closed then
    v_breaker.failures := v_breaker.failures + 1;
    v_breaker.counted := v_breaker.counted || p_words;
    v_opens := v_breaker.failures >= p_threshold
      and cardinality(v_breaker.failed_users) >= v_settings.breaker_users;
  else
    v_opens := v_breaker.probe_job_id = p_job.job_id and v_breaker.paused_until <= now();
  end if;
  if v_opens then
    v_breaker.pause_reason := case
      when v_is_closed then format('%s failures in a row, the last: %s', v_breaker.failures, p_code)
      else format('the probe failed: %s', p_code)
    end;
    v_breaker.failures := 0;
    v_breaker.times_opened := least(v_breaker.times_opened + 1, 1000);
    v_breaker.paused_until := now() + private.pause_length(v_breaker.times_opened);
  end if;
  update private.breakers set
    failures = v_breaker.failures, failing_since = v_breaker.failing_since,
    counted = v_breaker.counted, failed_users = v_breaker.failed_users,
    times_opened = v_breaker.times_opened, paused_until = v_breaker.paused_until, pause_reason = v_breaker.pause_reason
  where name = p_name;
end;
$$;

-- Counts attempts that have just failed, where the code is the provider's fault, against their
-- routes, and against the provider unless the route is paused: one model alone does not pause a
-- provider. Where the code says that no other job can do better, the route is paused until an
-- operator resumes it.
--
-- Locks: the breakers of the providers and the routes, in order.
create function private.note_failures(p_jobs private.running_jobs[]) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_settings private.settings := (select s from private.settings as s);
  v_job private.running_jobs;
  v_at bigint;
  v_provider text;
  v_route text;
  v_code text;
  v_words uuid;
  v_withdrawn text;
begin
  for v_at, v_provider, v_route, v_code, v_words, v_withdrawn in
    select
      j.ordinality,
      w.provider,
      w.breaker,
      e.code,
      md5(row(j.user_id, j.model_id, g.prompt, g.input, e.code, a.error_detail)::text)::uuid,
      case when e.pauses_model then concat_ws(': ', e.code, a.error_detail) end
    from unnest(p_jobs) with ordinality as j
    inner join private.attempts as a on a.generation_id = j.job_id and a.token = j.token
    inner join private.error_codes as e
      on e.code = a.error_code and (e.trips_breaker or e.pauses_model)
    inner join private.routes as w on w.model_id = j.model_id and w.place = j.route
    inner join public.generations as g on g.id = j.job_id
    order by w.provider, w.breaker, j.ordinality
  loop
    v_job := p_jobs[v_at];
    insert into private.breakers (name) values (v_provider), (v_route)
    on conflict do nothing;
    perform from private.breakers where name = v_provider for update;
    perform from private.breakers where name = v_route for update;
    if v_withdrawn is not null then
      perform private.set_pause(v_route, 'infinity', left(v_withdrawn, 500));
      -- Not an operator's, which would be one of the model's other routes, too.
      update private.breakers set times_opened = 1 where name = v_route;
      continue;
    end if;
    if exists (
      select from private.breakers as b
      where (b.name = v_provider and b.probe_job_id = v_job.job_id)
        or (b.name = v_route and private.breaker_state(b) = 'closed')
    ) then
      perform private.count_failure(
        v_provider, v_job, v_code, v_words, v_settings.breaker_provider_failures
      );
    end if;
    perform private.count_failure(v_route, v_job, v_code, v_words, v_settings.breaker_failures);
  end loop;
end;
$$;

-- Jobs ended well: failures of their routes are forgotten, and what is paused though one began
-- after the failures is closed. Who failed meanwhile is doubted, but not if the pause was over:
-- then it may well have been the model.
--
-- Locks: the breakers of the providers and the routes, in order.
create function private.note_successes(p_jobs private.running_jobs[]) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_job record;
  v_is_resumed boolean;
begin
  for v_job in
    select j.job_id, j.user_id, j.claimed_at, names.name, w.provider
    from unnest(p_jobs) as j
    inner join private.routes as w on w.model_id = j.model_id and w.place = j.route
    cross join lateral (values (1, w.provider), (2, w.breaker)) as names (place, name)
    order by w.provider, names.place, w.breaker
  loop
    update private.breakers as b set
      doubted_users = case
        when b.failed_users <> '{}' and (b.times_opened = 0 or b.paused_until > now())
          then (array_remove(
            b.failed_users
            || case when b.doubted_at > now() - s.breaker_pause_cap then b.doubted_users end,
            v_job.user_id
          ))[:200]
        else b.doubted_users
      end,
      doubted_at = case
        when b.failed_users <> '{}' and (b.times_opened = 0 or b.paused_until > now()) then now()
        else b.doubted_at
      end,
      failures = 0, failing_since = null, failed_users = '{}', times_opened = 0,
      paused_until = null, pause_reason = null, probe_job_id = null,
      resumed_at = case when b.times_opened > 0 then now() else b.resumed_at end
    from private.settings as s
    where b.name = v_job.name and case b.times_opened
      when 0 then b.failures > 0
      else v_job.claimed_at > b.failing_since or v_job.job_id = b.probe_job_id
    end
    returning b.resumed_at = now() into v_is_resumed;
    if v_is_resumed then
      perform setval('private.scan_due', 0);  -- what waited may be far below the virtual clock
      perform private.wake_workers(1, array[v_job.provider]);
    end if;
  end loop;
end;
$$;

-- An operator's pause stays what it is, and a user who is doubted begins none.
create function private.pause_provider(
  p_provider text, p_seconds integer, p_reason text, p_user_id uuid default null
) returns boolean
language sql security definer set search_path = pg_catalog, pg_temp as $$
  insert into private.breakers as b (
    name, paused_until, pause_reason, times_opened, failing_since, failed_users
  )
  select
    p_provider, now() + greatest(s.breaker_pause, least(p_seconds, 3600) * interval '1 second'),
    left(p_reason, 500), 1, now(), array_remove(array[p_user_id], null)
  from private.settings as s
  where exists (select from private.routes as w where w.provider = p_provider)
  on conflict (name) do update set
    paused_until = greatest(b.paused_until, excluded.paused_until),
    pause_reason = excluded.pause_reason,
    times_opened = greatest(b.times_opened, 1),
    failing_since = case when b.times_opened = 0 then now() else b.failing_since end,
    failed_users = case
      when b.times_opened = 0 then excluded.failed_users
      when p_user_id is null or b.failed_users = '{}' then '{}'
      when p_user_id = any (b.failed_users) then b.failed_users
      else b.failed_users || p_user_id
    end,
    probe_job_id = null
  where (b.times_opened > 0 or b.paused_until > now() is not true)
    and (b.times_opened > 0 or not private.is_doubted(b, p_user_id));
  select exists (
    select from private.breakers as b where b.name = p_provider and b.paused_until > now()
  )
$$;

comment on function private.pause_provider is
  'Keeps the jobs of a provider from being claimed for a while, from settings.breaker_pause to an '
  'hour: the account was refused, and no job is to blame. Nothing fails and nobody is charged for '
  'it. With a user, where it is not sure that others would be refused, too: theirs wait, others'' '
  'are tried one by one. Answers whether it is paused now; not where others were served lately '
  'though this user failed: then the job is to blame.';

-- Pauses a model, a route or a provider, or ends its pause where p_until is null. What the breaker
-- counted ends with it: from then on it is the operator's.
--
-- Raises: PT404 not_found.
create function private.set_pause(p_name text, p_until timestamptz, p_reason text) returns json
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_breaker private.breakers;
begin
  if not exists (
    select from private.routes as w where p_name in (w.model_id, w.breaker, w.provider)
  ) then
    perform private.refuse_missing(
      'model: no such model or provider',
      'Use the id of a model or the name of a provider in public.models.'
    );
  end if;
  insert into private.breakers as b (name, paused_until, pause_reason)
  values (p_name, p_until, p_reason)
  on conflict (name) do update set
    failures = 0, failing_since = null, failed_users = '{}', times_opened = 0, probe_job_id = null,
    paused_until = excluded.paused_until, pause_reason = excluded.pause_reason,
    resumed_at = case
      when p_until is null and b.paused_until is not null then now()
      else b.resumed_at
    end
  returning * into v_breaker;
  return private.breaker_json(v_breaker);
end;
$$;

create function public.pause_model(
  model text, until timestamptz default 'infinity', reason text default null
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform private.require_writable();
  if coalesce(until <= now(), true) then
    perform private.refuse_input(
      'until: not in the future', 'Leave it out to pause until resumed.'
    );
  elsif length(reason) > 500 then
    perform private.refuse_input('reason: longer than 500 characters');
  end if;
  return private.set_pause(model, until, reason);
end;
$$;

comment on function public.pause_model is
  'Pauses a model, or all that a provider makes, or one route of a model (owner/name#1), until a '
  'time or resume_model: jobs take another route; where there is none, new requests are refused '
  'with model_paused, queued jobs wait and keep their place. Running ones go on. Answers '
  '{name, state (open | closed | half-open | probing), paused_until, reason, failures, '
  'times_opened}. Errors: PT400 invalid_input, PT404 not_found.';

create function public.resume_model(model text) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_answer json;
begin
  perform private.require_writable();
  v_answer := private.set_pause(model, null, null);
  perform setval('private.scan_due', 0);
  perform private.wake_workers(1, array(
    select w.provider from private.routes as w
    where resume_model.model in (w.model_id, w.breaker, w.provider) order by w.place
  ));
  return v_answer;
end;
$$;

comment on function public.resume_model is
  'Ends a pause of a model, a route or a provider, whoever began it: its jobs are claimed at once, '
  'in their old order. Repeating it changes nothing. Answers as pause_model does. Errors: PT404 '
  'not_found.';
