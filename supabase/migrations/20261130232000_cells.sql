-- Parts of limits for databases that are cells of one system, and hooks for what they ask of one another.
--
-- `sql/` is the truth: this brings a database at work to it, in one statement, so in one transaction,
-- whoever applies it. It takes its locks first, and gives up after some five seconds: nothing is
-- changed then. Workers of the release before go on.

do $upgrade$
declare
  v_has_95 boolean := to_regclass('public.image_likes') is not null;
  v_has_96 boolean := to_regclass('private.deliveries') is not null;
  v_has_97 boolean := to_regclass('private.costs') is not null;
begin
-- In the order of requests, as far as they have one. Who waits for a second looks for a deadlock, and
-- may be its victim: so this waits less, lets go of what it has, and tries again.
for v_try in 1..30 loop
  begin
    perform set_config('lock_timeout', '250ms', true);
    lock table
    private.settings,
    public.entitlements,
    public.batches,
    public.generations,
    public.credit_ledger,
    private.ready_jobs,
    private.running_jobs,
    private.alert_rules,
    private.attempts,
    private.billing_customers,
    private.billing_events,
    private.billing_providers,
    private.billing_purchases,
    private.billing_subscriptions,
    private.budget_spendings,
    private.budgets,
    private.credit_buckets,
    private.error_codes,
    private.expired_files,
    private.exported_tables,
    private.merged_users,
    private.model_routes,
    private.model_stats,
    private.plans,
    private.provider_words,
    private.providers,
    private.purchases,
    private.retention_walks,
    private.retries,
    private.routines,
    private.skipped_rows,
    private.sources,
    private.welcomed_identities,
    private.workers,
    public.credit_products,
    public.images,
    public.model_aliases,
    public.models,
    private.breakers
    in access exclusive mode;
    exit;
  exception when lock_not_available then
    if v_try = 30 then
      raise;
    end if;
  end;
  perform pg_sleep(0.1 * random());
end loop;
perform set_config('lock_timeout', '5s', true);

-- Before the tables

-- What goes, or comes anew.

drop trigger budgets_are_looked_at_again on private.budgets;

drop function if exists
private.has_room(p_state private.budget_states, p_usd numeric),
private.hold_budgets(),
private.is_held(p_budgets private.budget_states[], p_usd numeric, p_model_id text, p_route smallint, p_user_id uuid),
private.within_budgets(p_ids uuid[], p_places smallint[], p_budgets private.budget_states[]);

drop view if exists
private.budget_states;

-- What comes, from sql/.

alter table private.providers
  add column if not exists part integer;

comment on column private.providers.part is
  'How many of max_running this database may run, where several are one system (cells): they write '
  'it. Null: all.';

alter table private.budgets
  add column if not exists part_usd numeric(18,6);

comment on column private.budgets.part_usd is
  'How much of it this database may spend, where several are one system (cells): they write it. '
  'Users'' own budgets are not divided. Null: all.';

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

create or replace function private.has_room(
  p_state private.budget_states, p_usd numeric
) returns boolean
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  return coalesce(p_state.limit_usd > 0 and p_usd <= greatest(p_state.room_usd, 0), false);
end;
$$;

create or replace function private.is_held(
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

create or replace function private.hold_budgets() returns private.budget_states[]
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

create or replace function private.within_budgets(
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

create or replace function private.read_event(p_provider text, p_event jsonb) returns private.billing_event
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_said private.billing_event;
begin
  if pg_column_size(p_event) > 262144 then
    perform private.refuse_input('event: over 256 KiB');
  end if;
  if jsonb_typeof(p_event) = 'string' then  -- as some gateways hand an argument on
    p_event := (p_event #>> '{}')::jsonb;
  end if;
  v_said := jsonb_populate_record(null::private.billing_event, case p_provider
    when 'stripe' then private.read_stripe(p_event)
    when 'revenuecat' then private.read_revenuecat(p_event)
    else p_event
  end);
  if v_said.happened_at > now() then  -- what comes next is not to be older than that
    v_said.happened_at := now();
  end if;
  v_said.users := nullif(array_remove(v_said.users, null), '{}');
  v_said.payments := nullif(array(
    select p_provider || ':' || p.name from unnest(v_said.payments) as p (name) where p.name <> ''
  ), '{}');
  v_said.sales := nullif(v_said.sales, '{}');
  v_said.plans := nullif(v_said.plans, '{}');
  return v_said;
end;
$$;

create or replace function public.apply_billing_event(provider text, event jsonb) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off as $$
#variable_conflict use_column
declare
  v_name text := provider;
  v_takes_tests boolean;
  v_said private.billing_event;
  v_is_new boolean;
  v_kept private.billing_events;
begin
  perform private.require_writable();
  select p.takes_test_events into v_takes_tests
  from private.billing_providers as p where p.name = v_name for update;
  if not found then
    perform private.refuse_input(
      'provider: not known', 'Add it to private.billing_providers, or correct its name.'
    );
  end if;
  begin
    v_said := private.read_event(v_name, event);
    insert into private.billing_events (
      provider, event_id, type, happened_at, said, outcome, detail
    )
    values (
      v_name, v_said.id, v_said.type, v_said.happened_at, jsonb_strip_nulls(to_jsonb(v_said)),
      case when v_said.is_test and not v_takes_tests then 'ignored' else 'waiting' end,
      case when v_said.is_test and not v_takes_tests then 'a test' end
    )
    on conflict do nothing;
    v_is_new := found or exists (
      select from private.billing_events as e
      where e.event_id = v_said.id and e.provider = v_name and e.outcome = 'waiting'
    );
    perform private.apply_kept(v_name || ' ' || v_said.id);
  exception
    when data_exception or integrity_constraint_violation or program_limit_exceeded
      or statement_too_complex then
      perform private.refuse_input('event: ' || left(sqlerrm, 200));
  end;
  select * into v_kept from private.billing_events where event_id = v_said.id and provider = v_name;
  return json_build_object(
    'event_id', v_kept.event_id,
    'outcome', case when v_is_new then v_kept.outcome else 'repeated' end,
    'detail', coalesce(v_kept.detail, 'for ' || array_to_string(v_kept.waits_for, ', ')),
    'user_id', v_kept.user_id,
    'credits', case when v_is_new then v_kept.credits else 0 end
  );
end;
$$;

create or replace function private.follow_user(p_user_id uuid) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_user jsonb;
  v_known public.entitlements;
  v_is_guest boolean;
  v_blocked_until timestamptz;
  v_key text := 'welcome:' || p_user_id;
  v_credits integer;
  v_identities bytea[];
  v_new integer;
begin
  if private.follow_elsewhere(p_user_id) then
    return;
  end if;
  -- Most changes are a sign-in and of no interest. Of others all is read again under the locks.
  for v_look in 1 .. 2 loop
    v_user := (select to_jsonb(u) from auth.users as u where u.id = p_user_id);
    v_known := (select e from public.entitlements as e where e.user_id = p_user_id);
    v_is_guest := coalesce((v_user ->> 'is_anonymous')::boolean, false);
    v_blocked_until := case
      when v_user ->> 'deleted_at' is not null or private.owner_of(p_user_id) <> p_user_id
        then 'infinity'
      else (v_user ->> 'banned_until')::timestamptz
    end;
    if v_user is null or (v_known.is_guest, v_known.blocked_until)
      is not distinct from (v_is_guest, v_blocked_until) then
      return;
    end if;
    exit when v_known.user_id is null or v_look = 2;
    perform private.lock_jobs(p_user_id);
  end loop;
  if v_known.user_id is null then
    insert into public.entitlements (user_id, is_guest, blocked_until, ledger_after)
    select p_user_id, v_is_guest, v_blocked_until, coalesce(max(l.id), 0)
    from public.credit_ledger as l where l.user_id = p_user_id
    on conflict (user_id) do nothing;
  else
    if v_blocked_until > now() then
      perform private.cancel_jobs(p_user_id, array(
        select r.job_id from private.ready_jobs as r where r.user_id = p_user_id
      ));
    end if;
    update public.entitlements set is_guest = v_is_guest, blocked_until = v_blocked_until
    where user_id = p_user_id;
    if not v_known.is_guest or v_is_guest then
      return;
    end if;
    v_key := v_key || ':permanent';
  end if;
  select coalesce(p.welcome_credits, s.welcome_credits) - coalesce((
      select l.amount - l.debt from public.credit_ledger as l
      where l.external_id = 'welcome:' || p_user_id
    ), 0),
    case when s.welcome_once_per_identity then private.identities_of(v_user) else '{}' end
  into v_credits, v_identities
  from private.settings as s
  inner join private.plans as p on p.name = case when v_is_guest then 'guest' else 'free' end;
  if v_credits > 0 and private.owner_of(p_user_id) = p_user_id and not exists (
    select from public.credit_ledger as l where l.external_id = v_key
  ) then
    insert into private.welcomed_identities (identity)
    select i.identity from unnest(v_identities) as i (identity)
    on conflict (identity) do nothing;
    get diagnostics v_new = row_count;
    if v_new = cardinality(v_identities) then
      perform private.move_credits(p_user_id, 'grant', v_credits, v_key);
    end if;
  end if;
end;
$$;

create or replace function private.follow_elsewhere(p_user_id uuid) returns boolean
language sql immutable set search_path = pg_catalog, pg_temp
return false;

create or replace function private.has_folder(p_folder uuid) returns boolean
language sql immutable set search_path = pg_catalog, pg_temp
return true;

create or replace function private.hold_room(p_providers text[]) returns jsonb
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

create or replace function private.claim_jobs(p_worker_id bigint, p_slots integer, p_keys text[])
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

create or replace function private.expire_orphans(
  p_place text, p_at_most integer, out place text, out done integer
)
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_files text[];
begin
  if to_regclass('storage.objects') is not null then
    select
      case when count(*) >= p_at_most then max(o.name collate "C") end,
      array_agg(concat(o.bucket_id, '/', o.name)) filter (
        where o.changed_at < now() - interval '1 day' and private.path_id(o.name, 1) is not null
          and case o.bucket_id
            when 'generations' then
              private.path_id(o.name, 2) is not null and split_part(o.name, '/', 3) <> ''
              and not private.is_output(o.name)
            when 'inputs' then not exists (
              select from public.entitlements as e cross join private.settings as s
              where e.user_id = private.owner_of(private.path_id(o.name, 1)) and (
                coalesce(o.changed_at >= now() - s.keep_inputs, true)
                or exists (select from private.live_jobs as j where j.user_id = e.user_id)
              )
            )
          end
          and private.has_folder(private.path_id(o.name, 1))
      )
    into place, v_files
    from (
      select bucket_id, name, coalesce(updated_at, created_at) as changed_at from storage.objects
      where name ~>~ p_place order by name using ~<~ fetch first p_at_most rows with ties
    ) as o;
  end if;
  done := private.skip_failing('select private.mark_files($1)', v_files);
end;
$$;

do $$
begin
  execute (
    select string_agg(format('alter table private.%I enable row level security', c.relname), ';')
    from pg_class as c where c.relnamespace = 'private'::regnamespace and c.relkind in ('r', 'p')
  );
end;
$$;

-- What holds from now on.

create trigger budgets_are_looked_at_again
after insert or delete or
update of provider, model_id, plan, user_id, period, limit_usd, part_usd, on_breach
on private.budgets
for each row execute function private.note_budget();

notify pgrst, 'reload schema';

notify pgrst, 'reload config';

revoke all on function private.follow_elsewhere(uuid) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.has_folder(uuid) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.has_room(private.budget_states,numeric) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.hold_budgets() from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.is_held(private.budget_states[],numeric,text,smallint,uuid) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.read_event(text,jsonb) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.within_budgets(uuid[],smallint[],private.budget_states[]) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

-- The optional parts, where they are.

if v_has_95 then
create or replace function private.like_shared_image(
  p_job_id uuid, p_position integer, p_is_liked boolean
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_user_id(p_writes => true);
  v_image public.images;
begin
  if p_is_liked is null then
    perform private.refuse_input('is_liked: neither true nor false');
  end if;
  select * into v_image from public.images
  where generation_id = p_job_id and position = p_position and share_id is not null
  for key share;  -- no like outlives its image
  if not found then
    perform private.refuse_unknown_image();
  elsif p_is_liked then
    insert into public.image_likes (generation_id, position, user_id)
    values (p_job_id, v_image.position, v_user_id)
    on conflict do nothing;
  else
    delete from public.image_likes
    where generation_id = p_job_id and position = p_position and user_id = v_user_id;
  end if;
  return json_build_object(
    'job_id', p_job_id, 'position', p_position,
    'is_liked', p_is_liked, 'like_count', private.count_likes(p_job_id, p_position)
  );
end;
$$;

create or replace function private.like_image(
  p_job_id uuid, p_position integer, p_is_liked boolean
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform private.require_known_user_id(p_writes => true);
  return private.like_shared_image(p_job_id, p_position, p_is_liked);
end;
$$;

revoke all on function private.like_shared_image(uuid,integer,boolean) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;
end if;
end;
$upgrade$;
