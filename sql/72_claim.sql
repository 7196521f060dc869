-- Claim: the next jobs in fair order move from ready_jobs to running_jobs.
--
-- claim_jobs locks the jobs with the smallest fair_key that nobody else is claiming (skip locked),
-- and moves them in one statement. While a breaker (28) is open, or where some of these jobs are
-- for a provider that this worker has no key of or that takes no more, it has them chosen with care
-- by pick_admitted_jobs, which also takes the next route (11) where one is shut. No more are taken
-- than budgets (29) hold. No claim waits for a lock, but for that of a budget.

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
-- moment puts nothing off. 0 in scan_due says so to all, and that the next look is
-- pick_admitted_jobs: among what is ready are jobs that not everybody may take at any time.
create function private.put_off(
  p_due regclass, p_began timestamptz, p_is_mixed boolean default false
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_now double precision := extract(epoch from clock_timestamp());
  v_pause double precision := 50 * (v_now - extract(epoch from p_began));
begin
  if v_pause < 0.5 then
    v_pause := 0;
  end if;
  perform setval(p_due, case
    when v_pause = 0 and p_is_mixed then 0
    else floor(1000 * (v_now + least(v_pause, 10)))::bigint
  end);
end;
$$;

create view private.unserved_models with (security_invoker = true) as
select m.id
from public.models as m
where exists (
  select from private.workers as w cross join private.settings as s
  where w.seen_at > now() - s.lease
) and not exists (
  select from private.routes as w
  inner join private.served_providers as p on w.provider = p.name
  where w.model_id = m.id
);

comment on view private.unserved_models is
  'Models whose providers no living worker serves: their jobs wait. None while no worker lives.';

-- What keeps jobs back from a route: whether nothing does; whether all wait; whether the pause is
-- over; and who failed, by the route or at its provider, and at the provider.
create function private.gate_of(
  p_model_id text, p_place smallint, p_provider text,
  out is_open boolean, out is_shut boolean, out is_over boolean,
  out failed_users uuid[], out failed_at_provider uuid[]
)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_breakers private.breakers[] := array(
    select w.breaker from private.route_breakers as w
    where w.model_id = p_model_id and w.place = p_place
      and ((w.breaker).paused_until is not null or (w.breaker).times_opened > 0)
  );
begin
  select
    count(*) = 0,
    coalesce(bool_or(private.admits(b, null) is false), false),
    bool_and(private.admits(b, null) is true)
  into is_open, is_shut, is_over
  from unnest(v_breakers) as b where private.breaker_state(b) <> 'closed';
  failed_users := array(
    select unnest(f.failed_users) from unnest(v_breakers) as f where f.times_opened > 0
  );
  failed_at_provider := array(
    select unnest(f.failed_users) from unnest(v_breakers) as f
    where f.name = p_provider and f.times_opened > 0
  );
end;
$$;

create type private.way as (
  model_id text,
  route smallint,  -- of jobs that wait
  place smallint,  -- of the route they might take
  turn bigint,
  provider text,
  is_own boolean,
  is_mine boolean,  -- the asking worker serves it
  is_open boolean,
  is_shut boolean,
  is_over boolean,
  failed_users uuid array,
  failed_at_provider uuid array,
  is_spent boolean  -- a budget holds none of its jobs, but for those that resume
);

comment on type private.way is
  'A route that jobs which wait may take, and what keeps them back: see private.gate_of().';

-- How many more jobs each of these providers takes that have a limit, as JSON. Whoever is told of
-- room has it for itself until the transaction ends; for all others there is none meanwhile.
create function private.hold_room(p_providers text[]) returns jsonb
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_held text[] := array(
    select p.name from private.providers as p
    where p.name = any (p_providers) and p.max_running is not null
    for no key update skip locked
  );
begin
  -- A new look, now that nobody else can claim theirs.
  return (
    select jsonb_object_agg(p.name, case
      when p.name = any (v_held) then least(p.max_running, p.part) - (
        select coalesce(sum(j.jobs), 0)
        from (
          select r.model_id, r.route, count(*) as jobs
          from private.running_jobs as r group by r.model_id, r.route
        ) as j
        where p.name = (
          select w.provider from private.routes as w
          where w.model_id = j.model_id and w.place = j.route
        )
      )
      else 0
    end)
    from private.providers as p
    where p.name = any (p_providers) and p.max_running is not null
  );
end;
$$;

-- Locks the next jobs that may run now where not all may, and answers their ids: of each route that
-- is not paused, the next; of one that can be tried, one job of a user who has not failed; after
-- the pause, where there is no such job, one of a user who has. Of them those of providers that are
-- served by whoever has these keys, and no more than each takes.
--
-- What its own route does not take now, for a breaker or because nobody serves it, goes by the next
-- that does: those behind it first; so does what a budget does not hold by its own. It keeps its
-- place in the queue, and its attempts begin anew.
-- Only what is picked is moved, so all the rest is where it was when the route opens. What may have
-- bought something stays with who may have sold it.
--
-- Reads an index by model and route instead of the one in fair order, so that a pile of jobs that
-- wait is never walked. A range, though of one, and + 0: else the index in fair order might be.
create function private.pick_admitted_jobs(
  p_at_most integer, p_keys text[], p_are_budgeted boolean
) returns uuid[]
language plpgsql set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
declare
  v_began timestamptz := clock_timestamp();
  v_from bigint := 0;
  v_served text[];
  v_budgets private.budget_states[] := '{}'::private.budget_states[];
  v_ways private.way[];
  v_rooms jsonb;
  v_candidates uuid[];
  v_places smallint[];
  v_breaker private.breakers;
  v_own uuid[];
  v_ids uuid[];
begin
  if p_are_budgeted then
    v_budgets := private.hold_budgets();
  end if;
  -- Operators' pauses that are over.
  update private.breakers set paused_until = null, pause_reason = null, resumed_at = now()
  where name = any (array(
    select b.name from private.breakers as b
    where b.paused_until <= now() and b.times_opened = 0 for update skip locked
  ));
  if not found and not private.is_due('private.scan_due') then
    select c.last_value into v_from from private.virtual_clock as c;
  end if;
  v_served := array(select s.name from private.served_providers as s);
  -- From model to model through the index. Behind a route that takes all, none is looked at.
  v_ways := array(
    with recursive waiting as (
      (
        select r.model_id, r.route from private.ready_jobs as r
        where r.run_at is null order by r.model_id, r.route limit 1
      )
      union all
      select next.* from waiting as w cross join lateral (
        select r.model_id, r.route from private.ready_jobs as r
        where r.run_at is null and (r.model_id, r.route) > (w.model_id, w.route)
        order by r.model_id, r.route limit 1
      ) as next
    ),
    ways as (
      select
        w.model_id, w.route, coalesce(way.place, w.route) as place,
        row_number() over in_turn as turn, way.provider,
        coalesce(way.place = own.place, true) as is_own, may.is_mine, gate.*, budget.is_spent,
        bool_or(
          gate.is_open and not budget.is_spent
          and (may.is_mine or way.provider = any (v_served))
        ) over (in_turn rows between unbounded preceding and 1 preceding) as is_behind
      from waiting as w
      cross join lateral (
        select coalesce((
          select v.place from private.model_routes as v
          where v.model_id = w.model_id and v.place = w.route
        ), 0) as place
      ) as own
      left join private.routes as way on way.model_id = w.model_id
      left join private.providers as p on p.name = way.provider
      cross join lateral (
        select (p.is_active and (p.secret is null or p.secret = any (p_keys))) is not false
      ) as may (is_mine)
      cross join lateral private.gate_of(w.model_id, way.place, way.provider) as gate
      cross join lateral (
        select v_budgets <> '{}' and private.is_held(v_budgets, (
          select c.least_usd from private.route_costs as c
          where c.model_id = w.model_id and c.place = way.place
        ), w.model_id, way.place, null) as is_spent
      ) as budget
      window in_turn as (
        partition by w.model_id, w.route order by way.place < own.place, way.place
      )
    )
    select (
      w.model_id, w.route, w.place, w.turn, w.provider, w.is_own, w.is_mine, w.is_open, w.is_shut,
      w.is_over, w.failed_users, w.failed_at_provider, w.is_spent
    )::private.way
    from ways as w
    where w.is_behind is not true
  );
  v_rooms := private.hold_room(array(
    select w.provider from unnest(v_ways) as w where w.is_mine and not w.is_shut
  ));
  select
    coalesce(array_agg(c.job_id), '{}'), array_agg(c.place)
  into v_candidates, v_places
  from (
    select t.job_id, t.place, t.provider, row_number() over (
      partition by t.provider order by t.fair_key, t.seq
    ) as number
    from (
      select distinct on (a.job_id) a.*
      from (
        select
          next.*, w.place, w.turn, w.provider,
          bool_and(next.has_failed) over (partition by w.model_id, w.place) as all_by_route,
          bool_and(next.failed_at_provider) over (partition by w.provider) as all_at_provider
        from unnest(v_ways) as w
        cross join lateral (
          (
            select r.job_id, r.fair_key, r.seq, false as has_failed, false as failed_at_provider
            from private.ready_jobs as r
            where r.run_at is null and r.fair_key >= v_from
              and (r.model_id, r.route) between (w.model_id, w.route) and (w.model_id, w.route)
              and (w.is_own or coalesce(r.provider_job_id, r.create_started_at::text) is null)
              and not r.user_id = any (w.failed_users) and not w.is_spent
              and (v_budgets = '{}' or not private.is_held(
                v_budgets, private.asks_usd(r, w.place), r.model_id, w.place, r.user_id
              ))
            order by r.model_id, r.route, r.fair_key, r.seq
            limit case when w.is_open then p_at_most + 1 else 1 end
          )
          union all
          (
            select r.job_id, r.fair_key, r.seq, false, false
            from private.ready_jobs as r
            where r.run_at is null and r.reserved_usd is not null and w.is_spent and w.is_own
              and (r.model_id, r.route) between (w.model_id, w.route) and (w.model_id, w.route)
              and not r.user_id = any (w.failed_users)
              and not private.is_held(v_budgets, 0, r.model_id, w.place, r.user_id)
            order by r.model_id, r.route, r.fair_key, r.seq
            limit case when w.is_open then p_at_most + 1 else 1 end
          )
          union all
          (
            select
              r.job_id, r.fair_key, r.seq, r.user_id = any (w.failed_users),
              r.user_id = any (w.failed_at_provider)
            from private.ready_jobs as r
            where r.run_at is null and r.fair_key >= v_from and w.is_over and not w.is_spent
              and (v_budgets = '{}' or not private.is_held(
                v_budgets, private.asks_usd(r, w.place), r.model_id, w.place, r.user_id
              ))
              and (r.model_id, r.route) between (w.model_id, w.route) and (w.model_id, w.route)
              and (w.is_own or coalesce(r.provider_job_id, r.create_started_at::text) is null)
            order by r.model_id, r.route, r.fair_key, r.seq limit 1
          )
        ) as next
        where w.is_mine and not w.is_shut
      ) as a
      where (a.all_by_route or not a.has_failed) and (a.all_at_provider or not a.failed_at_provider)
      order by a.job_id, a.turn
    ) as t
  ) as c
  where c.number <= (v_rooms ->> c.provider)::integer is not false;
  v_ids := array(
    select r.job_id from private.ready_jobs as r
    where r.job_id = any (v_candidates)
    order by r.fair_key + 0, r.seq limit p_at_most for update skip locked
  );
  if p_are_budgeted then
    v_ids := private.within_budgets(v_ids, array(
      select v_places[array_position(v_candidates, j.id)] from unnest(v_ids) as j (id)
    ), v_budgets);
  end if;
  update private.ready_jobs as r set route = c.place, attempt = 0
  from unnest(v_candidates, v_places) as c (job_id, place)
  where r.job_id = c.job_id and r.job_id = any (v_ids) and r.route <> c.place;
  if v_from = 0 then
    perform private.put_off('private.scan_due', v_began, v_rooms is not null or exists (
      select from unnest(v_ways) as w where w.is_own and not w.is_mine
    ));
  end if;
  -- Room at a provider comes without a request that would wake somebody.
  if cardinality(v_candidates) > p_at_most then
    perform private.wake_workers(1, array[w.provider])
    from (
      select distinct way.provider
      from unnest(v_candidates, v_places) as c (job_id, place)
      inner join private.ready_jobs as r on r.job_id = c.job_id
      left join private.routes as way on way.model_id = r.model_id and way.place = c.place
      where not r.job_id = any (v_ids)
    ) as w;
  end if;
  -- Of each breaker that is not closed one job may go, as its probe. Providers first: their one job
  -- may be that of a route, too.
  for v_breaker in
    select b.* from private.breakers as b where b.times_opened > 0
    order by position('/' in b.name) > 0, b.name
  loop
    v_own := array(
      select r.job_id from private.ready_jobs as r
      inner join private.routes as w on w.model_id = r.model_id and w.place = r.route
      where r.job_id = any (v_ids) and v_breaker.name in (w.breaker, w.provider)
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
-- Whether a job is for a provider that this worker has no key of, or that takes so many at once, is
-- seen when it is next: then those that are neither are taken, and the others chosen with care.
-- Most installations know providers that nobody has a key of, and have no jobs for them.
--
-- Every row is reached by its key, whatever the planner thinks of the tables' sizes.
-- Outer joins: a job whose model somebody deleted must fail at the worker, not vanish here.
create function private.claim_jobs(p_worker_id bigint, p_slots integer, p_keys text[])
returns table (
  job_id uuid, user_id uuid, token bigint, attempt smallint, provider text, provider_ref text,
  provider_input jsonb, provider_job_id text, image_inputs text[], image_count smallint,
  deadline_seconds real, begun_before timestamptz, base_url text, secret text, key_hosts text[],
  hosts text[], max_running integer
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
declare
  v_are_chosen boolean;
  v_are_due boolean;
  v_are_budgeted boolean;
  v_left integer := p_slots;
  v_from bigint := 0;
  v_began timestamptz;
  v_clock bigint;
  v_ids uuid[];
  v_looked_at integer;
  v_claimed integer;
begin
  if p_slots = 0 then
    perform private.wake_workers() from private.ready_jobs as r where r.run_at is null limit 1;
    return;
  end if;
  select
    pg_sequence_last_value('private.scan_due') = 0
    or exists (select from private.breakers as b where b.paused_until is not null),
    exists (select from private.ready_jobs as r where r.run_at <= now()),
    exists (select from private.budgets)
  into v_are_chosen, v_are_due, v_are_budgeted;
  if v_are_budgeted then
    v_are_chosen := v_are_chosen
      or exists (select from private.budgets as b where b.spent_until > now());
  end if;
  -- Delayed jobs whose time has come.
  if v_are_due then
    update private.ready_jobs set run_at = null, queued_at = now()
    where job_id = any (array(
      select r.job_id from private.ready_jobs as r
      where r.run_at <= now() order by r.run_at limit p_slots for update skip locked
    ));
  end if;
  loop
    if v_are_chosen then
      v_ids := private.pick_admitted_jobs(v_left, p_keys, v_are_budgeted);
      v_looked_at := cardinality(v_ids);
      select max(r.fair_key) into v_clock from private.ready_jobs as r where r.job_id = any (v_ids);
    else
      if not private.is_due('private.scan_due', 500) then
        v_from := coalesce(pg_sequence_last_value('private.virtual_clock'), 0);
      end if;
      loop
        v_began := clock_timestamp();
        select coalesce(array_agg(next.job_id), '{}'), max(next.fair_key) into v_ids, v_clock
        from (
          select r.job_id, r.fair_key from private.ready_jobs as r
          where r.run_at is null and r.fair_key >= v_from
          order by r.fair_key, r.seq limit p_slots for update skip locked
        ) as next;
        if v_from = 0 then
          perform private.put_off('private.scan_due', v_began);
          exit;
        end if;
        exit when cardinality(v_ids) = p_slots or not private.is_due('private.scan_due');
        v_from := 0;
      end loop;
      v_looked_at := cardinality(v_ids);
      if v_are_budgeted and v_looked_at > 0 then
        v_ids := private.within_budgets(v_ids, null, private.hold_budgets());
      end if;
    end if;
    exit when v_looked_at = 0;
    return query
    with next as materialized (
      select
        r.*, nextval('private.lease_tokens') as token, m.deadline, m.image_inputs,
        coalesce(w.provider, m.provider) as provider,
        coalesce(w.provider_ref, m.provider_ref) as provider_ref, coalesce(w.place, 0) as place,
        p.base_url, p.secret, p.key_hosts, p.hosts, p.max_running
      from private.ready_jobs as r
      left join public.models as m on m.id = r.model_id
      left join private.model_routes as w on w.model_id = r.model_id and w.place = r.route
      left join lateral (
        select q.* from private.providers as q
        where q.name = coalesce(w.provider, m.provider) offset 0
      ) as p on true
      where r.job_id = any (v_ids) and (
        v_are_chosen or (
          not p.is_active or p.max_running is not null
          or (p.secret is not null and p.secret <> all (p_keys))
        ) is not true
      )
      order by r.fair_key, r.seq
    ),
    gone as (
      delete from private.ready_jobs
      where job_id = any (array(select n.job_id from next as n))
    ),
    running as (
      insert into private.running_jobs (
        job_id, user_id, model_id, token, worker_id, attempt, lease_until, deadline_at,
        provider_job_id, create_started_at, handles, sent_input, route, reserved_usd
      )
      select
        n.job_id, n.user_id, n.model_id, n.token, p_worker_id, n.attempt + 1, now() + s.lease,
        now() + coalesce(n.deadline, s.lease), n.provider_job_id,
        coalesce(n.create_started_at, now()), n.handles, n.sent_input, n.place, n.reserved_usd
      from next as n cross join private.settings as s
    ),
    started as (
      update public.generations as g set
        status = 'processing', started_at = coalesce(g.started_at, now()), updated_at = now()
      where g.id = any (array(select n.job_id from next as n))
      returning g.id, g.provider_input, g.image_count
    ),
    awake as (
      update private.workers set asleep = false
      where id = p_worker_id and asleep and exists (select from next as n)
    )
    select
      n.job_id, n.user_id, n.token, (n.attempt + 1)::smallint, n.provider, n.provider_ref,
      s.provider_input, n.provider_job_id, n.image_inputs, s.image_count::smallint,
      extract(epoch from n.deadline)::real, n.create_started_at, n.base_url, n.secret, n.key_hosts,
      n.hosts, n.max_running
    from next as n inner join started as s on s.id = n.job_id
    order by n.token;
    get diagnostics v_claimed = row_count;
    if v_claimed = v_looked_at then
      v_clock := setval(
        'private.virtual_clock', greatest(pg_sequence_last_value('private.virtual_clock'), v_clock)
      );
      exit;
    end if;
    v_are_chosen := true;
    v_left := v_left - v_claimed;
  end loop;
end;
$$;

comment on function private.claim_jobs is
  'Moves up to p_slots jobs in fair order from ready to running and answers them: of providers that'
  ' need no key, or one of p_keys. provider_job_id is set where an earlier attempt already bought '
  'something at the provider: resume it; else begun_before, where one may have: look for it before '
  'creating again. Seconds are durations; what follows them is the provider''s row. Who was woken '
  'and has no slot free, as jobs of other cells fill them, says 0: then another worker is woken.';
