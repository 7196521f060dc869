-- ETA: how many jobs are before this one, and in how many seconds it is likely to be finished.
--
-- forecast_jobs answers both from one look at the queue. It goes by what jobs of a model have taken
-- lately, from claim to end (model_stats), by the slots of the workers that live, and by how many
-- jobs have lately been put before others, as fairness does with the jobs of users who ask for
-- little. Where something of that is not known it says null, never a guess.
--
-- model_stats is written by refresh_model_stats alone, which recovery (80) calls: finishing a job
-- writes no row that others write too. What ends while a refresh runs may go uncounted.

create table private.model_stats (
  model_id text primary key,
  mean_seconds double precision not null,
  sample_count integer not null,
  requests_per_second double precision not null default 0,
  queue_distance double precision,
  refreshed_at timestamptz not null,
  constraint model_stats_samples_are_positive check (sample_count > 0)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);

comment on table private.model_stats is
  'What jobs of each model took and how often they came lately: what eta_seconds goes by.';
comment on column private.model_stats.mean_seconds is
  'Seconds from claim to end of completed attempts, a mean that forgets old ones.';
comment on column private.model_stats.queue_distance is
  'Mean of generations.queue_distance in these minutes.';

-- Takes in the attempts completed since the last time and the requests of the last five minutes.
-- A mean remembers about as many attempts as p_memory. Does nothing within 15 seconds of the last.
create function private.refresh_model_stats(
  p_memory integer default 200, p_requests integer default 2000
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_since timestamptz := coalesce(
    (select max(s.refreshed_at) from private.model_stats as s), now() - interval '1 day'
  );
begin
  if v_since > now() - interval '15 seconds' then
    return;
  end if;
  -- One session at a time: by a row's lock, for one by number could be held by anybody.
  perform from private.plans where name = 'free' for update skip locked;
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

-- In how many seconds a running job ends if it takes p_mean_seconds; below zero if it is overdue.
-- The provider's progress counts as much as the clock.
create function private.due_seconds(
  p_job private.running_jobs, p_mean_seconds double precision
) returns double precision
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
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

create type private.forecast as (
  job_id uuid,
  queue_position integer,
  eta_seconds numeric,
  due_seconds double precision
);

-- For each of these jobs that is live: jobs that would be claimed before it, counted up to
-- p_at_most, null unless it is queued; seconds until it is likely to be finished, which for one
-- that runs are never less than a quarter of its mean, for late jobs are not done any moment; and
-- seconds until it would be if all goes as a rule, from which clients are told when to look. These
-- are null while no worker lives, for a model of which nothing was completed yet, while it is
-- paused without end or tried with a probe, and behind more jobs than are counted. A model that was
-- never measured counts like the mean of all.
--
-- The queue is looked at once, as far as the last of these jobs. Few are queued below the floor
-- (30). They are not counted, so that nobody walks what was claimed while vacuum is held back.
-- Without sorting: a plan made while the queue was empty would else read and sort all of it once it
-- is long.
create function private.forecast_jobs(
  p_job_ids uuid[], p_at_most integer default 1000
) returns private.forecast[]
language plpgsql stable set search_path = pg_catalog, pg_temp
set enable_sort = off set jit = off as $$
declare
  v_queued private.ready_jobs[] := array(
    select q.job from (
      select r as job from private.ready_jobs as r where r.job_id = any (p_job_ids) offset 0
    ) as q order by (q.job).fair_key desc, (q.job).seq desc
  );
  v_forecasts private.forecast[];
  v_paused text[] := array[]::text[];
  v_untils timestamptz[];
  v_keys bigint[];  -- of the queue, in its order
  v_seqs bigint[];
  v_lengths double precision[];
  v_begins double precision[];  -- when the first of them begins, the second, and one behind all
  v_slots double precision[];  -- in how many seconds each is free, soonest first
  v_count integer;
  v_place integer;
  v_seconds double precision;
begin
  if cardinality(v_queued) < cardinality(p_job_ids) then
    v_forecasts := array(
      select row(
        r.job_id, null, round(greatest(0.25 * s.mean_seconds, due.seconds)::numeric, 1), due.seconds
      )::private.forecast
      from private.running_jobs as r
      left join private.model_stats as s on s.model_id = r.model_id
      cross join lateral private.due_seconds(r, s.mean_seconds) as due (seconds)
      where r.job_id = any (p_job_ids)
    );
  end if;
  if v_queued = '{}' then
    return v_forecasts;
  end if;
  if exists (select from private.breakers as b where b.paused_until is not null) then
    select coalesce(array_agg(p.id), '{}'), array_agg(p.until) into v_paused, v_untils
    from (
      select
        m.id,
        max(m.paused_until) filter (where m.paused_until > now() or m.times_opened > 0) as until
      from private.paused_models as m where m.paused_until is not null group by m.id
    ) as p;
  end if;
  select
    coalesce(array_agg(q.fair_key), '{}'), coalesce(array_agg(q.seq), '{}'),
    coalesce(array_agg(q.seconds), '{}')
  into v_keys, v_seqs, v_lengths
  from (
    select r.fair_key, r.seq, coalesce(
      s.mean_seconds, (select avg(a.mean_seconds) from private.model_stats as a)
    ) as seconds
    from private.ready_jobs as r
    left join private.model_stats as s on s.model_id = r.model_id
    where r.run_at is null and r.fair_key >= (select f.fair_key from private.queue_floor as f)
      and (r.fair_key, r.seq) < (v_queued[1].fair_key, v_queued[1].seq)
      and not r.model_id = any (v_paused)
    order by r.fair_key, r.seq limit p_at_most
  ) as q;
  select sum(w.slots)::integer into v_count
  from private.workers as w
  where w.seen_at > now() - (select s.lease from private.settings as s)
    and exists (select from private.model_stats);
  if v_count is not null and (cardinality(v_keys) < p_at_most or cardinality(v_queued) > 1) then
    v_slots := array(
      select greatest(0.25 * m.seconds, private.due_seconds(r, m.seconds))
      from private.running_jobs as r
      left join private.model_stats as s on s.model_id = r.model_id
      cross join lateral (
        select coalesce(
          s.mean_seconds, (select avg(a.mean_seconds) from private.model_stats as a)
        ) as seconds
      ) as m
      order by 1
    );
    v_slots := array_fill(0::float, array[greatest(v_count - cardinality(v_slots), 0)]) || v_slots;
    v_begins := v_slots[1:1];
    -- The first of the queue take the slot that is free first each, the rest all of them evenly.
    for v_at in 1 .. least(20, cardinality(v_lengths)) loop
      v_seconds := v_slots[1] + v_lengths[v_at];
      v_place := width_bucket(v_seconds, v_slots[2:]);
      v_slots := v_slots[2:v_place + 1] || v_seconds || v_slots[v_place + 2:];
      v_begins[v_at + 1] := v_slots[1];
    end loop;
    v_begins := v_begins || array(
      select v_slots[1] + sum(q.seconds) over (order by q.place) / cardinality(v_slots)
      from unnest(v_lengths[21:]) with ordinality as q (seconds, place)
    );
  end if;
  return v_forecasts || array(
    select row(q.job_id, p.place, round(due.seconds::numeric, 1), due.seconds)::private.forecast
    from unnest(v_queued) as q
    cross join lateral (
      select width_bucket(q.fair_key - 1, v_keys) as first, width_bucket(q.fair_key, v_keys) as last
    ) as same
    cross join lateral (
      select same.first + width_bucket(q.seq - 1, v_seqs[same.first + 1:same.last]) as place
    ) as p
    left join lateral (
      -- A share of the slots goes to jobs that come later and are put before it: at first all that
      -- are put nearer to the queue's present, ever fewer as it moves up.
      select s.mean_seconds + greatest(
        v_begins[p.place + 1] / (1 - case when v_begins[p.place + 1] > 0 then least(
          0.6, coalesce(later.slots, 0) / cardinality(v_slots)
        ) else 0 end),
        date_part('epoch', q.run_at - now()),
        date_part('epoch', pause.until - now())
      ) as seconds
      from private.model_stats as s
      cross join lateral (
        select v_untils[array_position(v_paused, s.model_id)] as until
      ) as pause
      cross join lateral (
        select sum(
          a.requests_per_second * a.mean_seconds
          * greatest(0, 1 - a.queue_distance / greatest(q.fair_key - c.last_value, 1))
        ) as slots
        from private.model_stats as a cross join private.virtual_clock as c
      ) as later
      where s.model_id = q.model_id and v_slots is not null and p.place < p_at_most
        and (pause.until is null or (pause.until > now() and pause.until < 'infinity'))
    ) as due on true
  );
end;
$$;

-- The same for one job; null unless it is live.
create function private.forecast(
  p_generation public.generations, p_at_most integer default 1000
) returns private.forecast
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  if p_generation.finished_at is null then
    return (private.forecast_jobs(array[p_generation.id], p_at_most))[1];
  end if;
  return null;
end;
$$;

-- How long a client should wait before it reads the state of an active job again, between one and
-- ten seconds. Two fifths of what is left until the job is due, so that it asks more often as the
-- end comes near; a thirtieth of its age at least, for one that is overdue may be so for long.
-- Where nobody knows when it is due, half of its age. So a job of a minute is read some ten times,
-- and seen within two seconds of its end if it takes what its model takes.
create function private.poll_after_ms(
  p_created_at timestamptz, p_due_seconds double precision default null
) returns integer
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
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
