-- Budgets: what may be spent at providers in an hour, a day or a month.
--
-- A budget is a row: it holds for the jobs that fit each column that is set, and for all of the app
-- where none is. What a job may cost at most is reserved when it is claimed (72) and stands in its
-- running row, so whoever deletes that row gives it back, and nothing leaks when a worker dies. A
-- job that waits to resume what it may have bought keeps it in its ready row and asks for no more.
-- What the attempt cost, or all that was reserved where nobody knows, is booked when it ends
-- (book_costs). So what is spent and what is reserved never pass a limit by more than a provider
-- asks beyond its price.
--
-- A budget that has no room for the next job is spent: its jobs wait as behind a breaker, and new
-- ones are refused or wait, too. Jobs that have no known cost are neither claimed nor let in where
-- a budget would stop them. Credits know nothing of any of this.
--
-- What is set and what moves are two tables: each request looks at the first (30), and each end of
-- a job writes the second.
--
-- Lock order: budget_spendings, in order of id, come after all entitlements and before breakers and
-- workers; a row of budgets is locked by nobody who would wait for it.

create table private.budgets (
  id bigint generated always as identity primary key,
  provider text references private.providers (name) on delete cascade,
  model_id text references public.models (id) on delete cascade,
  plan text references private.plans (name) on delete cascade,
  user_id uuid,
  period text not null,
  limit_usd numeric(18, 6) not null,
  on_breach text not null default 'refuse',
  spent_until timestamptz,
  part_usd numeric(18, 6),
  constraint budgets_period_is_known check (period in ('hour', 'day', 'month')),
  constraint budgets_limit_is_not_negative check (limit_usd >= 0),
  constraint budgets_on_breach_is_known check (on_breach in ('refuse', 'pause', 'alert'))
);

comment on table private.budgets is
  'What may be spent at providers, each row for the jobs that fit all of provider, model_id, plan '
  'and user_id that are set; for the app where none is. It counts from when it is made.';
comment on column private.budgets.plan is 'That of the user when the job is claimed and booked.';
comment on column private.budgets.period is 'hour | day | month, as UTC has them.';
comment on column private.budgets.limit_usd is
  '0 is the switch that stops all: nothing is claimed, not even what costs nothing.';
comment on column private.budgets.on_breach is
  'What happens while it is spent: refuse (jobs wait, new ones are refused as budget_spent), '
  'pause (they are let in and wait), alert (nothing but the alert).';
comment on column private.budgets.spent_until is
  'Until when it has no room for what was asked for last. Past: there has been room since.';
comment on column private.budgets.part_usd is
  'How much of it this database may spend, where several are one system (cells): they write it. '
  'Users'' own budgets are not divided. Null: all.';

create index budgets_provider_idx on private.budgets (provider);
create index budgets_model_id_idx on private.budgets (model_id);
create index budgets_plan_idx on private.budgets (plan);
create index budgets_spent_until_idx on private.budgets (spent_until);

create table private.budget_spendings (
  budget_id bigint primary key references private.budgets (id) on delete cascade,
  spent_usd numeric(18, 6) not null default 0,
  booked_at timestamptz not null default now()
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);

comment on table private.budget_spendings is
  'What is booked on each budget in the period of booked_at. Whoever claims under one locks it.';

-- Whether a job counts against a budget. Without a user: whether any user's job of the model does.
create function private.concerns(
  p_budget private.budgets, p_model_id text, p_route smallint, p_user_id uuid
) returns boolean
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  if (p_budget.model_id is null or p_budget.model_id = p_model_id) is not true
    or (p_budget.user_id is null or p_budget.user_id = p_user_id) is not true then
    return false;
  elsif p_budget.provider is null and p_budget.plan is null then
    return true;
  end if;
  return coalesce((
    select p_budget.provider is null or p_budget.provider = w.provider
    from private.routes as w
    where w.model_id = p_model_id and w.place in (p_route, 0) order by w.place desc limit 1
  ), p_budget.provider is null) and (
    p_budget.plan is null or p_budget.plan is not distinct from (
      select (private.plan_of(e)).name from public.entitlements as e where e.user_id = p_user_id
    )
  );
end;
$$;

-- What a job may cost at most; null: nobody knows.
create function private.most_usd(
  p_cost_usd numeric, p_cost_unit text, p_images integer, p_deadline interval
) returns numeric
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  return p_cost_usd * case p_cost_unit
    when 'image' then p_images
    when 'second' then extract(epoch from p_deadline)
  end;
end;
$$;

create view private.route_costs with (security_invoker = true) as
select
  w.model_id, w.place, w.provider, w.cost_usd, w.cost_unit, m.deadline,
  private.most_usd(
    w.cost_usd, w.cost_unit, case when m.image_count_input is null then m.max_images else 1 end,
    m.deadline
  ) as least_usd
from private.routes as w
inner join public.models as m on w.model_id = m.id;

comment on view private.route_costs is
  'What a job costs by each route. least_usd: the least that one reserves.';

create view private.budget_states with (security_invoker = true) as
select
  b.id,
  coalesce(nullif(concat_ws(
    ', ', 'provider ' || b.provider, 'model ' || b.model_id, 'plan ' || b.plan,
    'user ' || b.user_id
  ), ''), 'app') as scope,
  b.user_id, b.period, b.limit_usd, b.on_breach, b.spent_until, s.spent_usd, r.reserved_usd,
  own.part_usd - s.spent_usd - r.reserved_usd as room_usd,
  coalesce(
    (s.spent_usd + r.reserved_usd) / nullif(own.part_usd, 0), (b.limit_usd = 0)::integer
  ) as used,
  case
    when b.limit_usd = 0 then 'infinity'
    else (s.began + ('1 ' || b.period)::interval) at time zone 'UTC'
  end as ends_at,
  b as budget
from private.budgets as b
inner join private.budget_spendings as p on b.id = p.budget_id
cross join lateral (
  select least(b.limit_usd, case when b.user_id is null then b.part_usd end) as part_usd
) as own
cross join lateral (
  select
    date_trunc(b.period, now() at time zone 'UTC') as began,
    case
      when p.booked_at >= date_trunc(b.period, now(), 'UTC') then p.spent_usd
      else 0
    end as spent_usd
) as s
cross join lateral (
  select coalesce(sum(j.reserved_usd), 0) as reserved_usd
  from (
    select r.model_id, r.route, r.user_id, r.reserved_usd from private.running_jobs as r
    union all
    select r.model_id, r.route, r.user_id, r.reserved_usd
    from private.ready_jobs as r where r.reserved_usd is not null
  ) as j
  where j.reserved_usd > 0 and coalesce(b.user_id, j.user_id) = j.user_id
    and private.concerns(b.*, j.model_id, j.route, j.user_id)
) as r;

comment on view private.budget_states is
  'What is spent of each budget in this period, and reserved by jobs that run or resume? used: the '
  'share that both take of the limit, or of this database''s part. ends_at: when the period does.';

-- Whoever changes a budget has the jobs that wait for it looked at again.
create function private.note_budget() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp set jit = off as $$
begin
  if tg_op = 'INSERT' then
    insert into private.budget_spendings (budget_id) values (new.id);
  end if;
  if tg_op <> 'DELETE' then
    update private.budgets as b set spent_until = case
      when b.on_breach <> 'alert' and s.room_usd <= 0 then s.ends_at
      when b.spent_until > now() then now()
      else b.spent_until
    end
    from private.budget_states as s where b.id = new.id and s.id = new.id;
  end if;
  update private.plans as p set has_budgets = now_is.so
  from (
    select exists (select from private.budgets as b where b.on_breach <> 'alert') as so
  ) as now_is
  where p.has_budgets <> now_is.so;
  perform setval('private.scan_due', 0);  -- what waited may be far below the virtual clock
  perform private.wake_workers(100);
  return null;
end;
$$;

create trigger budgets_are_looked_at_again
after insert or delete or
update of provider, model_id, plan, user_id, period, limit_usd, part_usd, on_breach
on private.budgets
for each row execute function private.note_budget();

-- Whether a budget holds one more job that may cost so much.
create function private.has_room(
  p_state private.budget_states, p_usd numeric
) returns boolean
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  return coalesce(p_state.limit_usd > 0 and p_usd <= greatest(p_state.room_usd, 0), false);
end;
$$;

-- Whether one of these budgets keeps a job back.
create function private.is_held(
  p_budgets private.budget_states[], p_usd numeric, p_model_id text, p_route smallint,
  p_user_id uuid
) returns boolean
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return exists (
    select from unnest(p_budgets) as b
    where not private.has_room(b, p_usd)
      and private.concerns(b.budget, p_model_id, p_route, p_user_id)
  );
end;
$$;

-- What a job that waits may cost at most by this route, or by the model's own if that is gone.
-- null: nobody knows. Nothing, where it has that reserved, or has no model and will fail.
create function private.asks_usd(p_job private.ready_jobs, p_route smallint) returns numeric
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_usd numeric;
begin
  if p_job.reserved_usd is null then
    select private.most_usd(w.cost_usd, w.cost_unit, g.image_count, w.deadline) into v_usd
    from private.route_costs as w inner join public.generations as g on g.id = p_job.job_id
    where w.model_id = p_job.model_id and w.place in (p_route, 0) order by w.place desc limit 1;
    if found then
      return v_usd;
    end if;
  end if;
  return 0;
end;
$$;

-- Until when a request of this user for the model is refused for a budget, by all routes that are
-- served; null unless it is. What has no known cost is refused where it would wait for ever.
create function private.budget_spent_until(
  p_model public.models, p_user_id uuid
) returns timestamptz
language plpgsql stable set search_path = pg_catalog, pg_temp set jit = off as $$
begin
  return (
    select case when count(*) = count(held.until) then min(held.until) end
    from private.route_costs as w
    cross join lateral (
      select max(b.ends_at) as until from private.budget_states as b
      where (b.user_id is null or b.user_id = p_user_id)
        and (b.on_breach = 'refuse' or (b.on_breach = 'pause' and w.least_usd is null))
        and not private.has_room(b, w.least_usd)
        and private.concerns(b.budget, w.model_id, w.place, p_user_id)
    ) as held
    where w.model_id = p_model.id
      and (w.place = 0 or w.provider in (select s.name from private.served_providers as s))
  );
end;
$$;

-- Whether a job that is ready waits, or has waited within this time, for a budget that was spent.
create function private.awaits_budget(
  p_model_id text, p_route smallint, p_user_id uuid, p_within interval default '0'
) returns boolean
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return exists (
    select from private.budgets as b
    left join private.routes as w on w.model_id = p_model_id and w.place = p_route
    where b.on_breach <> 'alert' and coalesce(b.user_id, p_user_id) = p_user_id
      and private.concerns(b, p_model_id, p_route, p_user_id)
      and case
        when b.limit_usd > 0 and w.cost_usd = 0 then false
        else b.spent_until > now() - p_within or w.cost_usd is null
      end
  );
end;
$$;

-- The budgets that may stop what is in the queue, locked until the transaction ends, as they stand
-- once nobody else can claim under them or book on them. Claims are short, and whoever has such a
-- lock waits for no job in the queue.
create function private.hold_budgets() returns private.budget_states[]
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_ids bigint[] := array(
    select s.budget_id
    from private.budgets as b inner join private.budget_spendings as s on s.budget_id = b.id
    where b.on_breach <> 'alert' and (
      b.user_id is null or exists (select from private.ready_jobs as r where r.user_id = b.user_id)
    )
    order by s.budget_id for update of s
  );
begin
  return array(select s from private.budget_states as s where s.id = any (v_ids) order by s.id);
end;
$$;

-- Of these jobs, which are locked, as many in fair order as these budgets hold if each takes its
-- place, with that reserved. A budget that has no room for one of them, or for another like the
-- last, is spent.
create function private.within_budgets(
  p_ids uuid[], p_places smallint[], p_budgets private.budget_states[]
) returns uuid[]
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_job record;
  v_ids uuid[] := '{}'::uuid[];
  v_usd numeric[] := '{}'::numeric[];
  v_is_held boolean;
  v_spent bigint[] := '{}'::bigint[];
begin
  for v_job in
    select
      r.job_id, r.model_id, r.user_id, t.place, private.asks_usd(r, t.place) as usd
    from private.ready_jobs as r
    cross join lateral (
      select coalesce(p_places[array_position(p_ids, r.job_id)], r.route) as place
    ) as t
    where r.job_id = any (p_ids)
    order by r.fair_key, r.seq
  loop
    v_is_held := private.is_held(
      p_budgets, v_job.usd, v_job.model_id, v_job.place, v_job.user_id
    );
    if not v_is_held then
      v_ids := v_ids || v_job.job_id;
      v_usd := v_usd || v_job.usd;
    end if;
    for v_at in 1 .. cardinality(p_budgets) loop
      continue when not private.concerns(
        (p_budgets[v_at]).budget, v_job.model_id, v_job.place, v_job.user_id
      );
      if not v_is_held then
        p_budgets[v_at].room_usd := p_budgets[v_at].room_usd - v_job.usd;
      end if;
      if v_job.usd > p_budgets[v_at].room_usd and v_job.usd <= p_budgets[v_at].limit_usd then
        v_spent := v_spent || p_budgets[v_at].id;
      end if;
    end loop;
  end loop;
  update private.ready_jobs as r set reserved_usd = v_usd[array_position(v_ids, r.job_id)]
  where r.job_id = any (v_ids) and r.reserved_usd is null;
  update private.budgets as b set spent_until = s.ends_at
  from unnest(p_budgets) as s
  where b.id = s.id and b.id = any (array(
    select o.id from private.budgets as o
    where o.id = any (v_spent) and o.spent_until > now() is not true for update skip locked
  ));
  return v_ids;
end;
$$;

-- Books what attempts cost that have just ended: what is known, or else all that was reserved; and
-- of jobs that have left the queue otherwise, what they had reserved. What the next attempt resumes
-- is paid once, and booked there.
--
-- Locks: budget_spendings in order of id.
create function private.book_costs(p_jobs private.running_jobs[]) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_booked record;
begin
  if not exists (select from private.budgets) then
    return;
  end if;
  for v_booked in
    select b.id, b.period, sum(c.usd) as usd, bool_or(c.usd < c.reserved_usd) as gives_back
    from private.budgets as b
    inner join (
      select
        j.model_id, j.route, j.user_id, j.reserved_usd,
        coalesce(a.cost_usd, j.reserved_usd, 0) as usd
      from unnest(p_jobs) as j
      left join private.attempts as a on a.generation_id = j.job_id and a.token = j.token
      where not exists (
        select from private.ready_jobs as r
        where r.job_id = j.job_id and r.create_started_at is not null
      )
    ) as c
      on coalesce(b.user_id, c.user_id) = c.user_id
      and private.concerns(b, c.model_id, c.route, c.user_id)
    where greatest(c.usd, c.reserved_usd) > 0
    group by b.id
    order by b.id
  loop
    update private.budget_spendings set
      spent_usd = v_booked.usd + case
        when date_trunc(v_booked.period, booked_at, 'UTC')
          >= date_trunc(v_booked.period, now(), 'UTC') then spent_usd
        else 0
      end,
      booked_at = greatest(booked_at, now())
    where budget_id = v_booked.id;
    if v_booked.gives_back then
      update private.budgets set spent_until = now()
      where id = any (array(
        select b.id from private.budgets as b
        where b.id = v_booked.id and b.spent_until > now() and b.limit_usd > 0
        for update skip locked
      ));
    end if;
  end loop;
end;
$$;
