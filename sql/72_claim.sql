-- Claim: the next jobs in fair order move from ready_jobs to running_jobs.
--
-- claim_jobs makes delayed jobs claimable that have come due, locks the jobs with the smallest
-- fair_key that nobody else is claiming (skip locked), and moves them in one statement.
--
-- While a breaker (71) is open, what it keeps back waits in place, and claims read an index by
-- model instead of the one in fair order: a pile of jobs that wait is never walked. No claim waits
-- for a lock.

-- While a long transaction holds back vacuum, a scan of the queue's tables walks the dead rows of
-- all jobs since. So whoever made one that took long puts the next off for everybody, and looks
-- whether somebody did. A hint in a sequence: a time more than a minute ahead, left by a clock that
-- was wrong, is not believed.
--
-- Answers the seconds the next is to wait: such scans take a fiftieth of the time, unless that
-- would make one wait for longer than p_at_most.
create function private.put_off(
  p_due regclass, p_began timestamptz, p_at_most double precision
) returns double precision
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_now timestamptz := clock_timestamp();
  v_pause double precision := least(50 * extract(epoch from v_now - p_began), p_at_most);
begin
  if v_pause > 0.5 then
    perform setval(p_due, (1000 * (extract(epoch from v_now) + v_pause))::bigint);
  end if;
  return v_pause;
end;
$$;

create function private.is_put_off(p_due regclass) returns boolean
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_now double precision := 1000 * extract(epoch from clock_timestamp());
begin
  return coalesce(pg_sequence_last_value(p_due) between v_now and v_now + 60000, false);
end;
$$;

-- Delayed jobs whose time has come become claimable.
create function private.promote_due_jobs(p_at_most integer) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  update private.ready_jobs set run_at = null, queued_at = now()
  where seq = any (array(
    select r.seq from private.ready_jobs as r
    where r.run_at <= now() order by r.run_at limit p_at_most for update skip locked
  ));
end;
$$;

-- The fair_key to begin the next scan at; null: at the virtual clock.
--
-- While a long transaction holds back vacuum, the index begins with every job ever claimed since,
-- and a scan from its start walks them all. So most scans start at the clock. What came to lie
-- below it meanwhile is found by one that starts a little below, at the floor: in each session
-- p_pause seconds after the last. What lies deeper is found by one from the start, once a second.
-- Where such scans take long they come less often, and one does for all: see schedule_scan.
create function private.scan_start(p_pause double precision default 0.05) returns bigint
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_now double precision := extract(epoch from clock_timestamp());
  v_full_due text := nullif(current_setting('darkroom.full_scan_due', true), '');
  v_low_due text := nullif(current_setting('darkroom.low_scan_due', true), '');
begin
  if v_full_due = '0' then
    return 0;
  elsif v_now < v_full_due::double precision is not true
    and not private.is_put_off('private.full_scan_due') then
    return 0;
  elsif v_now < v_low_due::double precision + p_pause is not true
    and not private.is_put_off('private.low_scan_due') then
    return (select f.fair_key from private.queue_floor as f);
  end if;
  return null;
end;
$$;

-- Notes that this session has scanned from below the clock, and when it may again; where it was
-- dear, when any session may. One from the start takes the place of one from the floor, too.
create function private.schedule_scan(p_from bigint, p_began timestamptz) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_now double precision := extract(epoch from clock_timestamp());
  v_pause double precision;
begin
  if p_from = 0 then
    v_pause := private.put_off('private.full_scan_due', p_began, 60);
    perform set_config('darkroom.full_scan_due', (v_now + greatest(v_pause, 1))::text, false);
    perform set_config('darkroom.low_scan_due', v_now::text, false);
  else
    v_pause := private.put_off('private.low_scan_due', p_began, 5);
    perform set_config('darkroom.low_scan_due', (v_now + v_pause)::text, false);
  end if;
end;
$$;

-- Locks the next jobs in fair order and answers their seq.
--
-- A generic plan walks the index, whatever statistics say.
create function private.lock_next_jobs(p_at_most integer, p_from bigint) returns bigint[]
language plpgsql set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
declare
  v_began timestamptz := clock_timestamp();
  v_seqs bigint[] := array(
    select r.seq from private.ready_jobs as r
    where r.run_at is null
      and r.fair_key >= coalesce(p_from, (select c.last_value from private.virtual_clock as c))
    order by r.fair_key, r.seq limit p_at_most for update skip locked
  );
begin
  if p_from is not null then
    perform private.schedule_scan(p_from, v_began);
  end if;
  return v_seqs;
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

-- The same while something is paused: of each model that is not, the next; of one that can be
-- tried, one job of a user who has not failed; after the pause, where there is no such job, one of
-- a user who has. A range of models, though of one: else the index in fair order might be walked.
create function private.lock_next_admitted_jobs(p_at_most integer, p_from bigint) returns bigint[]
language plpgsql set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
begin
  return array(
    select r.seq from private.ready_jobs as r
    where r.run_at is null and r.seq = any (array(
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
      select c.seq from (
        select
          next.seq,
          next.has_failed,
          bool_and(next.has_failed) over (partition by w.model_id) as all_of_model,
          next.failed_at_provider,
          bool_and(next.failed_at_provider) over (partition by m.provider) as all_of_provider
        from waiting as w
        left join public.models as m on m.id = w.model_id
        cross join lateral private.gate_of(w.model_id, m.provider) as gate
        cross join lateral (
          (
            select r.seq, false as has_failed, false as failed_at_provider
            from private.ready_jobs as r
            where r.run_at is null and r.model_id between w.model_id and w.model_id
              and r.fair_key >= p_from and not r.user_id = any (gate.failed_users)
            order by r.model_id, r.fair_key, r.seq
            limit case when gate.is_open then p_at_most else 1 end
          )
          union all
          (
            select
              r.seq, r.user_id = any (gate.failed_users), r.user_id = any (gate.failed_at_provider)
            from private.ready_jobs as r
            where r.run_at is null and r.model_id between w.model_id and w.model_id
              and r.fair_key >= p_from and gate.is_over
            order by r.model_id, r.fair_key, r.seq limit 1
          )
        ) as next
        where w.model_id is not null and not gate.is_shut
      ) as c
      where (c.all_of_model or not c.has_failed) and (c.all_of_provider or not c.failed_at_provider)
    ))
    order by r.fair_key, r.seq limit p_at_most for update skip locked
  );
end;
$$;

-- Of these locked jobs, those that may run though breakers are not closed: one of each of those, of
-- a user who has not failed if there is one. Providers first: their one job may be that of a model,
-- too.
create function private.admit_probes(p_seqs bigint[]) returns bigint[]
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_breaker private.breakers;
  v_own bigint[];
  v_seqs bigint[] := p_seqs;
begin
  for v_breaker in
    select b.* from private.breakers as b where b.times_opened > 0
    order by position('/' in b.name) > 0, b.name
  loop
    v_own := array(
      select r.seq from private.ready_jobs as r
      left join public.models as m on m.id = r.model_id
      where r.seq = any (v_seqs) and v_breaker.name in (r.model_id, m.provider)
      order by r.user_id = any (v_breaker.failed_users), array_position(v_seqs, r.seq)
    );
    continue when v_own = '{}';
    if private.begin_probe(v_breaker.name, v_own[1]) then
      v_own := v_own[2:];
    end if;
    v_seqs := array(
      select s.seq from unnest(v_seqs) with ordinality as s (seq, place)
      where not s.seq = any (v_own) order by s.place
    );
  end loop;
  return v_seqs;
end;
$$;

-- Locks the next jobs that may run now while something is paused, and answers their seq.
create function private.pick_admitted_jobs(p_at_most integer) returns bigint[]
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_began timestamptz := clock_timestamp();
  v_from bigint := 0;
  v_seqs bigint[];
begin
  perform private.end_pauses();
  if private.is_put_off('private.full_scan_due') then
    select f.fair_key into v_from from private.queue_floor as f;
  end if;
  v_seqs := private.lock_next_admitted_jobs(p_at_most, v_from);
  if v_from = 0 then
    perform private.put_off('private.full_scan_due', v_began, 60);
  end if;
  -- The keys of what waits may be far below the clock when the pause ends.
  perform set_config('darkroom.full_scan_due', '0', false);
  return private.admit_probes(v_seqs);
end;
$$;

-- Locks the next jobs that may run now and answers their seq. Beside that, each statement here only
-- looks whether there is something to do that is rare.
create function private.pick_jobs(p_at_most integer) returns bigint[]
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_from bigint;
  v_seqs bigint[];
begin
  if exists (select from private.ready_jobs as r where r.run_at <= now()) then
    perform private.promote_due_jobs(p_at_most);
  end if;
  if exists (select from private.breakers as b where b.paused_until is not null) then
    return private.pick_admitted_jobs(p_at_most);
  end if;
  v_from := private.scan_start();
  v_seqs := private.lock_next_jobs(p_at_most, v_from);
  -- Too few at the clock: look below it, too, unless that is dear.
  if v_from is null and cardinality(v_seqs) < p_at_most then
    v_from := private.scan_start(0);
    if v_from is not null then
      return private.lock_next_jobs(p_at_most, v_from);
    end if;
  end if;
  return v_seqs;
end;
$$;

-- Every row is reached by its key, whatever the planner thinks of the tables' sizes.
-- Outer joins: a job whose model somebody deleted must fail at the worker, not vanish here.
create function private.claim_jobs(p_worker_id bigint, p_slots integer)
returns table (
  job_id uuid, user_id uuid, token bigint, attempt smallint, provider text, provider_ref text,
  provider_input jsonb, provider_job_id text, image_inputs text[], image_count smallint,
  deadline_seconds real, begun_before timestamptz
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
declare
  v_seqs bigint[] := private.pick_jobs(p_slots);
begin
  if v_seqs = '{}' then
    return;
  end if;
  update private.workers set asleep = false where id = p_worker_id and asleep;
  perform setval('private.virtual_clock', greatest(c.last_value, r.fair_key))
  from private.virtual_clock as c cross join private.ready_jobs as r
  where r.seq = v_seqs[cardinality(v_seqs)];
  return query
  with claimed as (
    delete from private.ready_jobs as r where r.seq = any (v_seqs) returning r.*
  ),
  running as (
    insert into private.running_jobs as r (
      job_id, user_id, model_id, token, worker_id, attempt,
      lease_until, deadline_at, provider_job_id, create_started_at, input_sha256
    )
    select
      c.job_id, c.user_id, c.model_id, nextval('private.lease_tokens'), p_worker_id, c.attempt + 1,
      now() + st.lease, now() + coalesce(m.deadline, st.lease), c.provider_job_id,
      coalesce(c.create_started_at, now()), c.input_sha256
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
    r.provider_job_id, m.image_inputs, s.image_count, extract(epoch from m.deadline)::real,
    nullif(r.create_started_at, now())
  from running as r
  inner join started as s on s.id = r.job_id
  left join public.models as m on m.id = r.model_id
  order by r.token;
end;
$$;

comment on function private.claim_jobs is
  'Moves up to p_slots jobs in fair order from ready to running and answers them. provider_job_id'
  ' is set where an earlier attempt already bought something at the provider: resume it; else '
  'begun_before, where one may have: look for it before creating again. Seconds are durations.';
