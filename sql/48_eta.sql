-- ETA: how many jobs are before this one, and in how many seconds it is likely to be finished.
--
-- forecast answers both from one look at the queue. It goes by what jobs of a model have taken
-- lately, from claim to end (model_stats), by the slots of the workers that live, and by how many
-- jobs have lately been put before others, as fairness does with the jobs of users who ask for
-- little. Where something of that is not known it says null, never a guess.
--
-- model_stats is written by refresh_model_stats alone, which recovery (80) calls: finishing a job
-- writes no row that others write too. What ends while a refresh runs may go uncounted.

-- Takes in the attempts completed since the last time and the requests of the last five minutes.
-- A mean remembers about as many attempts as p_memory. Does nothing within 15 seconds of the last.
create or replace function private.refresh_model_stats(
  p_memory integer default 200,
  p_requests integer default 2000
)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_since timestamptz := coalesce(
    (select max(s.refreshed_at) from private.model_stats as s), now() - interval '1 day'
  );
begin
  if v_since > now() - interval '15 seconds' then
    return;
  end if;
  -- One session at a time: a row's lock, for an advisory one could be held by anybody.
  perform from private.queue_state for update skip locked;
  if not found then
    return;
  end if;
  insert into private.model_stats as s (model_id, mean_seconds, sample_count, refreshed_at)
  select
    a.model_id, avg(extract(epoch from a.ended_at - a.started_at)), least(count(*), p_memory), now()
  from private.attempts as a
  where a.ended_at > v_since and a.outcome = 'completed'
    and isfinite(a.started_at) and isfinite(a.ended_at)
  group by a.model_id
  on conflict (model_id) do update set
    mean_seconds = s.mean_seconds + (excluded.mean_seconds - s.mean_seconds)
      * excluded.sample_count / least(p_memory, s.sample_count + excluded.sample_count),
    sample_count = least(p_memory, s.sample_count + excluded.sample_count);
  with latest as (
    select g.model_id, g.queue_distance, g.created_at
    from public.generations as g order by g.id desc limit p_requests
  ),
  recent as (
    select
      l.model_id, count(*) as jobs, avg(l.queue_distance) as distance,
      case sum(count(*)) over ()
        when p_requests then extract(epoch from now() - min(min(l.created_at)) over ())
        else 300
      end as seconds
    from latest as l where l.created_at > now() - interval '5 minutes' group by l.model_id
  )
  update private.model_stats as s set
    requests_per_second = coalesce(
      (select r.jobs / r.seconds from recent as r where r.model_id = s.model_id), 0
    ),
    queue_distance = (select r.distance from recent as r where r.model_id = s.model_id),
    refreshed_at = now();
end;
$$;

revoke all on function private.refresh_model_stats(integer, integer)
from public, anon, authenticated, service_role;

-- In how many seconds a running job ends if it takes p_mean_seconds; below zero if it is overdue.
-- The provider's progress counts as much as the clock.
create or replace function private.due_seconds(
  p_job private.running_jobs,
  p_mean_seconds double precision
)
returns double precision
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_seconds double precision := date_part('epoch', now() - p_job.claimed_at);
begin
  return case
    when p_job.stage = 'storing' then 0
    when p_job.progress between 5 and 100
      then (p_mean_seconds - v_seconds + v_seconds * (100.0 / p_job.progress - 1)) / 2
    else p_mean_seconds - v_seconds
  end;
end;
$$;

revoke all on function private.due_seconds(private.running_jobs, double precision)
from public, anon, authenticated, service_role;

-- What is left of a running job that takes p_mean_seconds as a rule: never less than a quarter of
-- it, for late jobs are not done any moment.
create or replace function private.remaining_seconds(
  p_job private.running_jobs,
  p_mean_seconds double precision
)
returns double precision
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return greatest(0.25 * p_mean_seconds, private.due_seconds(p_job, p_mean_seconds));
end;
$$;

revoke all on function private.remaining_seconds(private.running_jobs, double precision)
from public, anon, authenticated, service_role;

-- In how many seconds each live slot is free, soonest first; null if no worker lives. Of a model
-- that was never measured, p_else stands for the mean.
create or replace function private.free_slots(p_else double precision)
returns double precision[]
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_slots integer;
  v_busy double precision[];
begin
  select sum(w.slots)::integer into v_slots
  from private.workers as w
  where w.seen_at > now() - (select s.lease from private.settings as s);
  if v_slots is null then
    return null;
  end if;
  v_busy := array(
    select private.remaining_seconds(r, coalesce(s.mean_seconds, p_else))
    from private.running_jobs as r
    left join private.model_stats as s on s.model_id = r.model_id
    order by 1
  );
  return array_fill(
    0::double precision, array[greatest(v_slots - cardinality(v_busy), 0)]
  ) || v_busy;
end;
$$;

revoke all on function private.free_slots(double precision)
from public, anon, authenticated, service_role;

-- When a job begins that has jobs of these lengths before it, in order, each taking the slot that
-- is free first. After a hundred the slots are taken to fill up evenly.
create or replace function private.play_queue(
  p_slots double precision[],
  p_ahead double precision[],
  p_exactly integer default 100
)
returns double precision
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  -- A heap: each entry is no later than the two at twice its place, so the first is the soonest.
  v_slots double precision[] := p_slots;
  v_count integer := cardinality(p_slots);
  v_at integer;
  v_next integer;
  v_free double precision;
begin
  for v_place in 1 .. least(p_exactly, cardinality(p_ahead)) loop
    v_free := v_slots[1] + p_ahead[v_place];
    v_at := 1;
    loop
      v_next := 2 * v_at;
      exit when v_next > v_count;
      if v_next < v_count and v_slots[v_next + 1] < v_slots[v_next] then
        v_next := v_next + 1;
      end if;
      exit when v_free <= v_slots[v_next];
      v_slots[v_at] := v_slots[v_next];
      v_at := v_next;
    end loop;
    v_slots[v_at] := v_free;
  end loop;
  return v_slots[1] + coalesce(
    (select sum(a.seconds) from unnest(p_ahead[p_exactly + 1:]) as a (seconds)), 0
  ) / v_count;
end;
$$;

revoke all on function private.play_queue(double precision[], double precision[], integer)
from public, anon, authenticated, service_role;

-- The share of this many slots that goes to jobs which come later and are put before a job this far
-- behind the queue's present: at first all that are put nearer, ever fewer as it moves up.
create or replace function private.overtaking_share(p_distance bigint, p_slot_count integer)
returns double precision
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_slots double precision;
begin
  select sum(
    s.requests_per_second * s.mean_seconds
    * greatest(0, 1 - s.queue_distance / greatest(p_distance, 1))
  ) into v_slots
  from private.model_stats as s;
  return least(0.6, coalesce(v_slots, 0) / p_slot_count);
end;
$$;

revoke all on function private.overtaking_share(bigint, integer)
from public, anon, authenticated, service_role;

-- Seconds until a queued job begins, from the lengths of those before it; null if not known, also
-- while its model is paused without end or tried with a probe.
create or replace function private.waiting_seconds(
  p_job private.ready_jobs,
  p_ahead double precision[],
  p_else double precision
)
returns double precision
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_paused_until timestamptz;
  v_slots double precision[] := private.free_slots(p_else);
  v_share double precision := 0;
  v_clock bigint;
begin
  select max(b.paused_until) into v_paused_until
  from private.breakers as b
  where b.name in (
      p_job.model_id, (select m.provider from public.models as m where m.id = p_job.model_id)
    )
    and (b.paused_until > now() or (b.paused_until is not null and b.times_opened > 0));
  if v_slots is null or v_paused_until <= now() or v_paused_until = 'infinity' then
    return null;
  end if;
  if p_ahead <> '{}' then
    select c.last_value into v_clock from private.virtual_clock as c;
    v_share := private.overtaking_share(p_job.fair_key - v_clock, cardinality(v_slots));
  end if;
  return greatest(
    private.play_queue(v_slots, p_ahead) / (1 - v_share),
    case when not p_job.is_held then date_part('epoch', p_job.run_at - now()) end,
    date_part('epoch', v_paused_until - now())
  );
end;
$$;

revoke all on function private.waiting_seconds(private.ready_jobs, double precision[],
  double precision) from public, anon, authenticated, service_role;

-- In how many seconds a queued job with p_position others before it is likely to be finished; null
-- if not known.
create or replace function private.queued_seconds(
  p_job private.ready_jobs,
  p_position integer,
  p_mean_seconds double precision
)
returns double precision
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_ahead double precision[] := array[]::double precision[];
begin
  if p_position > 0 then
    v_ahead := array(
      select coalesce(s.mean_seconds, p_mean_seconds)
      from private.ready_jobs as r
      left join private.model_stats as s on s.model_id = r.model_id
      where r.run_at is null and r.fair_key >= (select f.fair_key from private.queue_floor as f)
        and (r.fair_key, r.seq) < (p_job.fair_key, p_job.seq)
      order by r.fair_key, r.seq limit p_position
    );
  end if;
  return p_mean_seconds + private.waiting_seconds(p_job, v_ahead, p_mean_seconds);
end;
$$;

revoke all on function private.queued_seconds(private.ready_jobs, integer, double precision)
from public, anon, authenticated, service_role;

-- Jobs that would be claimed before this one, counted up to p_at_most, null unless it is queued;
-- seconds until it is likely to be finished; and seconds until it would be if all goes as a rule,
-- from which clients are told when to look. These are null for a finished job, while no worker
-- lives, for a model of which nothing was completed yet, and behind more jobs than are counted.
--
-- Few are queued below the floor (30). They are not counted, so that nobody walks what was claimed
-- while vacuum is held back. Without sorting: a plan made while the queue was empty would else read
-- and sort all of it once it is long.
create or replace function private.forecast(
  p_generation public.generations,
  p_at_most integer default 1000,
  out queue_position integer,
  out eta_seconds numeric,
  out due_seconds double precision
)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set enable_sort = off
set jit = off
as $$
declare
  v_mean double precision;
  v_job private.ready_jobs;
  v_running private.running_jobs;
  v_seconds double precision;
begin
  if p_generation.finished_at is not null then
    return;
  end if;
  select * into v_job from private.ready_jobs as r where r.job_id = p_generation.id;
  if found then
    select count(*) into queue_position from (
      select from private.ready_jobs as r
      where r.run_at is null and r.fair_key >= (select f.fair_key from private.queue_floor as f)
        and (r.fair_key, r.seq) < (v_job.fair_key, v_job.seq)
      order by r.fair_key, r.seq limit p_at_most
    ) as ahead;
    if queue_position = p_at_most then
      return;
    end if;
  end if;
  select s.mean_seconds into v_mean
  from private.model_stats as s where s.model_id = p_generation.model_id;
  if v_mean is null then
    return;
  elsif v_job.job_id is not null then
    v_seconds := private.queued_seconds(v_job, queue_position, v_mean);
    due_seconds := v_seconds;
  else
    select * into v_running from private.running_jobs as r where r.job_id = p_generation.id;
    v_seconds := private.remaining_seconds(v_running, v_mean);
    due_seconds := private.due_seconds(v_running, v_mean);
  end if;
  eta_seconds := round(v_seconds::numeric, 1);
end;
$$;

revoke all on function private.forecast(public.generations, integer)
from public, anon, authenticated, service_role;

-- How long a client should wait before it reads the state of an active job again, between one and
-- ten seconds. Two fifths of what is left until the job is due, so that it asks more often as the
-- end comes near; a thirtieth of its age at least, for one that is overdue may be so for long.
-- Where nobody knows when it is due, half of its age. So a job of a minute is read some ten times,
-- and seen within two seconds of its end if it takes what its model takes.
create or replace function private.poll_after_ms(
  p_created_at timestamptz,
  p_due_seconds double precision default null
)
returns integer
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_age double precision := date_part('epoch', now() - p_created_at);
begin
  return least(10000, greatest(
    1000,
    p_due_seconds * 400,
    v_age * case when p_due_seconds is null then 500 else 1000 / 30.0 end
  ))::integer;
end;
$$;

revoke all on function private.poll_after_ms(timestamptz, double precision)
from public, anon, authenticated, service_role;
