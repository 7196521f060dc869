-- Claim: the next jobs in fair order move from ready_jobs to running_jobs.
--
-- claim_jobs locks the jobs with the smallest fair_key that nobody else is claiming (skip locked),
-- and moves them in one statement. While a breaker (28) is open, it has them chosen with care by
-- pick_admitted_jobs. No claim waits for a lock.

-- While a long transaction holds back vacuum, a look at a whole table of the queue walks the dead
-- rows of all jobs since. So one session looks for all: a sequence holds, in milliseconds since
-- 1970, when the next may. A time more than a minute ahead, left by a clock that was wrong, is not
-- believed.
create function private.is_due(p_due regclass, p_patience integer default 0) returns boolean
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_now double precision := 1000 * extract(epoch from clock_timestamp());
begin
  return coalesce(
    pg_sequence_last_value(p_due) not between v_now - p_patience and v_now + 60000, true
  );
end;
$$;

-- Such looks take a fiftieth of the time, but come once in ten seconds at least. One that took a
-- moment puts nothing off.
create function private.put_off(p_due regclass, p_began timestamptz) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_now double precision := extract(epoch from clock_timestamp());
  v_pause double precision := 50 * (v_now - extract(epoch from p_began));
begin
  if v_pause < 0.5 then
    v_pause := 0;
  end if;
  perform setval(p_due, (1000 * (v_now + least(v_pause, 10)))::bigint);
end;
$$;

-- What keeps jobs of a model back: whether nothing does; whether all wait; whether the pause is
-- over; and who failed, at model or provider, and at the provider.
create function private.gate_of(
  p_model_id text, p_provider text, out is_open boolean, out is_shut boolean, out is_over boolean,
  out failed_users uuid[], out failed_at_provider uuid[]
)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select
    count(*) = 0,
    coalesce(bool_or(private.admits(b, null) is false), false),
    bool_and(private.admits(b, null) is true),
    array(
      select unnest(f.failed_users) from private.breakers as f
      where f.name in (p_model_id, p_provider) and f.times_opened > 0
    ),
    array(
      select unnest(f.failed_users) from private.breakers as f
      where f.name = p_provider and f.times_opened > 0
    )
  from private.breakers as b
  where b.name in (p_model_id, p_provider) and private.breaker_state(b) <> 'closed'
$$;

-- Locks the next jobs that may run now while something is paused, and answers their ids: of each
-- model that is not, the next; of one that can be tried, one job of a user who has not failed;
-- after the pause, where there is no such job, one of a user who has.
--
-- Reads an index by model instead of the one in fair order, so that a pile of jobs that wait is
-- never walked. A range of models, though of one: else the index in fair order might be.
create function private.pick_admitted_jobs(p_at_most integer) returns uuid[]
language plpgsql set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
declare
  v_began timestamptz := clock_timestamp();
  v_from bigint := 0;
  v_breaker private.breakers;
  v_own uuid[];
  v_ids uuid[];
begin
  -- Operators' pauses that are over.
  update private.breakers set paused_until = null, pause_reason = null, resumed_at = now()
  where name = any (array(
    select b.name from private.breakers as b
    where b.paused_until <= now() and b.times_opened = 0 for update skip locked
  ));
  if not found and not private.is_due('private.scan_due') then
    select c.last_value into v_from from private.virtual_clock as c;
  end if;
  v_ids := array(
    select r.job_id from private.ready_jobs as r
    where r.run_at is null and r.job_id = any (array(
      -- From model to model through the index.
      with recursive waiting as (
        (
          select r.model_id from private.ready_jobs as r
          where r.run_at is null order by r.model_id limit 1
        )
        union all
        select (
          select r.model_id from private.ready_jobs as r
          where r.run_at is null and r.model_id > w.model_id order by r.model_id limit 1
        )
        from waiting as w where w.model_id is not null
      )
      select c.job_id from (
        select
          next.job_id,
          next.has_failed,
          bool_and(next.has_failed) over (partition by w.model_id) as all_of_model,
          next.failed_at_provider,
          bool_and(next.failed_at_provider) over (partition by m.provider) as all_of_provider
        from waiting as w
        left join public.models as m on m.id = w.model_id
        cross join lateral private.gate_of(w.model_id, m.provider) as gate
        cross join lateral (
          (
            select r.job_id, false as has_failed, false as failed_at_provider
            from private.ready_jobs as r
            where r.run_at is null and r.model_id between w.model_id and w.model_id
              and r.fair_key >= v_from and not r.user_id = any (gate.failed_users)
            order by r.model_id, r.fair_key, r.seq
            limit case when gate.is_open then p_at_most else 1 end
          )
          union all
          (
            select
              r.job_id, r.user_id = any (gate.failed_users),
              r.user_id = any (gate.failed_at_provider)
            from private.ready_jobs as r
            where r.run_at is null and r.model_id between w.model_id and w.model_id
              and r.fair_key >= v_from and gate.is_over
            order by r.model_id, r.fair_key, r.seq limit 1
          )
        ) as next
        where w.model_id is not null and not gate.is_shut
      ) as c
      where (c.all_of_model or not c.has_failed) and (c.all_of_provider or not c.failed_at_provider)
    ))
    order by r.fair_key, r.seq limit p_at_most for update skip locked
  );
  if v_from = 0 then
    perform private.put_off('private.scan_due', v_began);
  end if;
  -- Of each breaker that is not closed one job may go, as its probe. Providers first: their one job
  -- may be that of a model, too.
  for v_breaker in
    select b.* from private.breakers as b where b.times_opened > 0
    order by position('/' in b.name) > 0, b.name
  loop
    v_own := array(
      select r.job_id from private.ready_jobs as r
      left join public.models as m on m.id = r.model_id
      where r.job_id = any (v_ids) and v_breaker.name in (r.model_id, m.provider)
      order by r.user_id = any (v_breaker.failed_users), array_position(v_ids, r.job_id)
    );
    continue when v_own = '{}';
    perform from private.breakers
    where name = v_breaker.name and times_opened > 0 for update skip locked;
    if found then
      -- A new look, now that nobody else can begin one.
      update private.breakers as b set probe_job_id = r.job_id
      from private.ready_jobs as r
      where b.name = v_breaker.name and r.job_id = v_own[1] and private.admits(b, r.user_id);
    end if;
    if found then
      v_own := v_own[2:];
    end if;
    v_ids := array(
      select s.job_id from unnest(v_ids) with ordinality as s (job_id, place)
      where not s.job_id = any (v_own) order by s.place
    );
  end loop;
  return v_ids;
end;
$$;

-- While vacuum is held back, the index in fair order begins with every job claimed since. So most
-- claims read it from the virtual clock on. What came to lie below is found by who finds too few
-- there, and by one claim in half a second: unless that look has become dear.
--
-- Every row is reached by its key, whatever the planner thinks of the tables' sizes.
-- Outer joins: a job whose model somebody deleted must fail at the worker, not vanish here.
create function private.claim_jobs(p_worker_id bigint, p_slots integer)
returns table (
  job_id uuid, user_id uuid, token bigint, attempt smallint, provider text, provider_ref text,
  provider_input jsonb, provider_job_id text, image_inputs text[], image_count smallint,
  deadline_seconds real, begun_before timestamptz,
  base_url text, secret text, key_hosts text[], hosts text[]
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
declare
  v_from bigint := 0;
  v_began timestamptz;
  v_ids uuid[];
begin
  -- Delayed jobs whose time has come.
  if exists (select from private.ready_jobs as r where r.run_at <= now()) then
    update private.ready_jobs set run_at = null, queued_at = now()
    where job_id = any (array(
      select r.job_id from private.ready_jobs as r
      where r.run_at <= now() order by r.run_at limit p_slots for update skip locked
    ));
  end if;
  if exists (select from private.breakers as b where b.paused_until is not null) then
    v_ids := private.pick_admitted_jobs(p_slots);
  else
    if not private.is_due('private.scan_due', 500) then
      select c.last_value into v_from from private.virtual_clock as c;
    end if;
    loop
      v_began := clock_timestamp();
      v_ids := array(
        select r.job_id from private.ready_jobs as r
        where r.run_at is null and r.fair_key >= v_from
        order by r.fair_key, r.seq limit p_slots for update skip locked
      );
      if v_from = 0 then
        perform private.put_off('private.scan_due', v_began);
        exit;
      end if;
      exit when cardinality(v_ids) = p_slots or not private.is_due('private.scan_due');
      v_from := 0;
    end loop;
  end if;
  if v_ids = '{}' then
    return;
  end if;
  update private.workers set asleep = false where id = p_worker_id and asleep;
  perform setval('private.virtual_clock', greatest(c.last_value, r.fair_key))
  from private.virtual_clock as c cross join private.ready_jobs as r
  where r.job_id = v_ids[cardinality(v_ids)];
  return query
  with claimed as (
    delete from private.ready_jobs as r where r.job_id = any (v_ids) returning r.*
  ),
  running as (
    insert into private.running_jobs as r (
      job_id, user_id, model_id, token, worker_id, attempt,
      lease_until, deadline_at, provider_job_id, create_started_at, handles, sent_input, route
    )
    select
      c.job_id, c.user_id, c.model_id, nextval('private.lease_tokens'), p_worker_id, c.attempt + 1,
      now() + st.lease, now() + coalesce(m.deadline, st.lease), c.provider_job_id,
      coalesce(c.create_started_at, now()), c.handles, c.sent_input, c.route
    from claimed as c cross join private.settings as st
    left join public.models as m on m.id = c.model_id
    order by c.fair_key, c.seq
    returning r.*
  ),
  started as (
    update public.generations as g set
      status = 'processing', started_at = coalesce(g.started_at, now()), updated_at = now()
    where g.id = any (array(select r.job_id from running as r))
    returning g.id, g.provider_input, g.image_count
  )
  select
    r.job_id, r.user_id, r.token, r.attempt, m.provider, m.provider_ref, s.provider_input,
    r.provider_job_id, m.image_inputs, s.image_count::smallint,
    extract(epoch from m.deadline)::real, nullif(r.create_started_at, now()),
    p.base_url, p.secret, p.key_hosts, p.hosts
  from running as r
  inner join started as s on s.id = r.job_id
  left join public.models as m on m.id = r.model_id
  left join private.providers as p on p.name = m.provider
  order by r.token;
end;
$$;

comment on function private.claim_jobs is
  'Moves up to p_slots jobs in fair order from ready to running and answers them. provider_job_id'
  ' is set where an earlier attempt already bought something at the provider: resume it; else '
  'begun_before, where one may have: look for it before creating again. Seconds are durations.';
