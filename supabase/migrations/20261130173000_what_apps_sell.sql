-- Credits that end, debts, billing events, guests, and budgets.
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
    private.error_codes,
    private.expired_files,
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
    private.workers,
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

alter domain public.ledger_kind drop constraint ledger_kind_is_known;
alter domain public.ledger_kind add constraint ledger_kind_is_known check (
  value in ('grant', 'charge', 'refund', 'adjust', 'expire', 'carry')
);
alter type private.gate add attribute credits_end_at timestamptz;
alter type private.way add attribute is_spent boolean;

-- What goes, or comes anew.

do $$ begin if to_regclass('storage.objects') is not null then drop policy if exists "Users add their own input images" on storage.objects; end if;
exception when insufficient_privilege then null; end $$;

do $$ begin if to_regclass('storage.objects') is not null then drop policy if exists "Users delete their own input images" on storage.objects; end if;
exception when insufficient_privilege then null; end $$;

do $$ begin if to_regclass('storage.objects') is not null then drop policy if exists "Users read their own generated images" on storage.objects; end if;
exception when insufficient_privilege then null; end $$;

do $$ begin if to_regclass('storage.objects') is not null then drop policy if exists "Users read their own input images" on storage.objects; end if;
exception when insufficient_privilege then null; end $$;

do $$ begin if to_regclass('storage.objects') is not null then drop policy if exists "Users replace their own input images" on storage.objects; end if;
exception when insufficient_privilege then null; end $$;

alter table private.plans drop constraint plans_name_is_known;

alter table public.credit_ledger drop constraint credit_ledger_amount_and_generation_match_kind;

alter table public.images drop constraint images_path_is_the_owners;

alter table public.images drop constraint images_preview_path_is_the_owners;

drop index if exists public.credit_ledger_refund_once_idx;

drop view if exists
private.costs,
private.queue_by_model,
private.waiting_now;

drop function if exists
private.accept(p_gate private.gate, p_name text, p_params jsonb, p_prompts text[], p_inputs jsonb[], p_idempotency_key text, p_batch_id uuid, p_retry_of uuid, p_is_free boolean),
private.enqueue_batch(p_model text, p_prompts text[], p_params jsonb, p_idempotency_key text),
private.enqueue_generation(p_model text, p_prompt text, p_params jsonb, p_idempotency_key text),
private.fits_kind(p_kind text, p_amount integer, p_generation_id uuid),
private.pick_admitted_jobs(p_at_most integer, p_keys text[]),
private.recent_broken_books(p_at_most integer),
private.retry_generation(p_job_id uuid),
public.enqueue_batch(model text, prompts text[], params jsonb, idempotency_key text),
public.enqueue_generation(model text, prompt text, params jsonb, idempotency_key text),
public.grant_credits(user_id uuid, amount integer, kind text, external_id text),
public.retry_generation(job_id uuid),
public.set_paid(user_id uuid, paid_until timestamp with time zone);

drop view if exists
private.broken_books;

-- What comes, from sql/.

create or replace function private.fits_kind(
  p_kind text, p_amount integer, p_generation_id uuid, p_debt integer
) returns boolean
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  return (p_generation_id is not null) = (p_kind = 'refund')
    and case p_kind
      when 'expire' then p_amount < 0 and p_debt = 0
      -- What it gives or takes, and in which direction each part goes.
      when 'adjust' then p_amount - p_debt <> 0
        and (p_amount >= 0 and p_debt <= 0 or p_amount <= 0 and p_debt >= 0)
      else p_amount >= 0 and p_debt <= 0
    end;
end;
$$;

alter table public.entitlements
  add column if not exists is_guest boolean default false not null,
  add column if not exists ledger_after bigint default 0 not null,
  add column if not exists debt public.credits default 0 not null,
  add column if not exists credits_end_at timestamp with time zone,
  add column if not exists blocked_until timestamp with time zone;

comment on column public.entitlements.is_guest is 'Signed in anonymously, as Auth says; see 42.';

comment on column public.entitlements.blocked_until is
  'Until then nothing new is taken in: a ban, or infinity for a user whom Auth deleted softly or '
  'who was merged into another; null: never blocked.';

comment on column public.entitlements.ledger_after is
  'Entries up to this id are of an earlier user with this id, whose books were kept. 0: none was.';

comment on column public.entitlements.debt is
  'Credits taken back when they were spent already: what comes in pays it first.';

comment on column public.entitlements.credits_end_at is
  'When the first of the credits end; infinity: those in buckets never do; null: none is in one.';

alter table public.credit_ledger
  add column if not exists debt integer default 0 not null,
  add column if not exists bucket_id bigint;

comment on column public.credit_ledger.kind is
  'grant, charge (of a generation), refund (of one), adjust, expire (their time was over), or '
  'carry: the sum of older entries, as the first edition made it.';

comment on column public.credit_ledger.amount is
  'What the balance moved by, in credits: negative for a charge, positive for a grant or refund.';

comment on column public.credit_ledger.debt is
  'What the debt moved by. The entry gives, or takes if negative, amount - debt.';

comment on column public.credit_ledger.bucket_id is
  'Which of the user''s buckets the amount went into or came from; null: into none. A charge or '
  'refund has an entry for each.';

create unique index credit_ledger_refund_once_idx
on public.credit_ledger (generation_id, bucket_id) nulls not distinct where kind = 'refund';

create index credit_ledger_charged_buckets_idx
on public.credit_ledger (generation_id) where bucket_id is not null;

create table private.credit_buckets (
  id bigint generated always as identity primary key,
  user_id uuid not null,
  external_id text,
  priority smallint not null default 0,
  expires_at timestamptz not null default 'infinity',
  is_extended boolean not null default false,
  credits public.credits not null,
  created_at timestamptz not null default now(),
  constraint credit_buckets_differ_from_what_is_in_none check (
    priority <> 0 or expires_at < 'infinity'
  )
) with (fillfactor = 70);

comment on table private.credit_buckets is
  'Credits granted together that end, or are spent before or after others. All that is in no '
  'bucket never ends and has priority 0.';

comment on column private.credit_buckets.external_id is 'That of the grant.';

comment on column private.credit_buckets.priority is
  'The smallest is spent first; of equal ones what ends first; then the oldest.';

comment on column private.credit_buckets.expires_at is 'From then on they cannot be spent.';

comment on column private.credit_buckets.is_extended is
  'Something was given back after the end, for settings.refund_grace: that happens once.';

comment on column private.credit_buckets.credits is 'What is left: the sum of its entries.';

create index credit_buckets_user_id_idx on private.credit_buckets (user_id);

create index credit_buckets_expires_at_idx
on private.credit_buckets (expires_at) where credits > 0;

alter table public.generations
  add column if not exists refund_percent smallint;

comment on column public.generations.refund_percent is
  'How much of the price of one that failed or was canceled was given back; null: all.';

alter table public.images
  add column if not exists merged_from uuid;

comment on column public.images.merged_from is
  'The user it was made for, whose folder it stays in, where merge_user gave it to another.';

alter table private.ready_jobs
  add column if not exists reserved_usd numeric;

comment on column private.ready_jobs.reserved_usd is 'What it resumes may cost at most.';

create index ready_jobs_reserved_idx on private.ready_jobs (model_id, route, fair_key, seq)
where reserved_usd is not null;

alter table private.running_jobs
  add column if not exists reserved_usd numeric;

comment on column private.running_jobs.reserved_usd is
  'What it may cost at most, which budgets (29) count as taken; null: nobody knows, or it was '
  'claimed when there was no budget.';

alter table private.error_codes
  add column if not exists refund_percent smallint default 100 not null;

comment on column private.error_codes.refund_percent is
  'Share of the price given back to whose job fails with it from then on. What a push says of that '
  'is a row of push_texts.';

alter table private.plans
  add column if not exists has_budgets boolean default false not null,
  add column if not exists welcome_credits integer;

comment on table private.plans is 'Limits of guests, free and paid users.';

comment on column private.plans.welcome_credits is
  'Credits that a user begins this plan with; null: settings.welcome_credits.';

comment on column private.plans.has_budgets is
  'Whether a budget (29) may refuse anybody. Kept by a trigger there; here for the same reason.';

alter table private.settings
  add column if not exists refund_grace interval default '1 day'::interval not null,
  add column if not exists debtors_may_enqueue boolean default false not null,
  add column if not exists keep_billing_events interval default '1 year'::interval,
  add column if not exists welcome_once_per_identity boolean default true not null,
  add column if not exists keep_identities interval default '2 years'::interval,
  add column if not exists identity_key bytea default sha256((uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()))) not null;

comment on column private.settings.welcome_credits is
  'Credits of a new user, unless plans.welcome_credits says otherwise; 0 for none.';

comment on column private.settings.refund_grace is
  'How long credits can be spent that are given back after their end.';

comment on column private.settings.debtors_may_enqueue is
  'Whether who has a debt may ask for what costs nothing; else in_debt.';

create or replace function private.own_folders() returns text[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
  return private.folders_of(auth.uid());
end;
$$;

do $do$
declare
  v_policies text := $policies$
  create policy "Users read their own generated images" on storage.objects
  for select to authenticated using (
    bucket_id = 'generations'
    and split_part(name, '/', 1) = any ((select private.own_folders())::text[])
  );
  create policy "Users read their own input images" on storage.objects
  for select to authenticated using (
    bucket_id = 'inputs'
    and split_part(name, '/', 1) = any ((select private.own_folders())::text[])
  );
  create policy "Users add their own input images" on storage.objects
  for insert to authenticated with check (
    bucket_id = 'inputs' and split_part(name, '/', 1) = (select auth.uid())::text
    and private.may_store_input(name)
  );
  create policy "Users replace their own input images" on storage.objects
  for update to authenticated using (
    bucket_id = 'inputs' and split_part(name, '/', 1) = (select auth.uid())::text
  ) with check (
    bucket_id = 'inputs' and split_part(name, '/', 1) = (select auth.uid())::text
    and private.may_store_input(name)
  );
  create policy "Users delete their own input images" on storage.objects
  for delete to authenticated using (
    bucket_id = 'inputs'
    and split_part(name, '/', 1) = any ((select private.own_folders())::text[])
  );
$policies$;
begin
  if to_regclass('storage.objects') is null then
    raise notice 'Darkroom: no storage.objects here; buckets and their policies are skipped';
    return;
  end if;
  begin
    execute v_policies;
  exception when insufficient_privilege then
    raise notice 'Darkroom: no right to make policies on storage.objects; until its owner, or '
      'Supabase''s SQL editor, has run these, users reach no file: %', v_policies;
  end;
end;
$do$;

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

create or replace function private.concerns(
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

create or replace function private.most_usd(
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
  b.limit_usd - s.spent_usd - r.reserved_usd as room_usd,
  coalesce((s.spent_usd + r.reserved_usd) / nullif(b.limit_usd, 0), 1) as used,
  case
    when b.limit_usd = 0 then 'infinity'
    else (s.began + ('1 ' || b.period)::interval) at time zone 'UTC'
  end as ends_at,
  b as budget
from private.budgets as b
inner join private.budget_spendings as p on b.id = p.budget_id
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
  'share of the limit that both take. ends_at: when the period does.';

create or replace function private.note_budget() returns trigger
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

create or replace function private.asks_usd(p_job private.ready_jobs, p_route smallint) returns numeric
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

create or replace function private.budget_spent_until(
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

create or replace function private.awaits_budget(
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

create or replace function private.book_costs(p_jobs private.running_jobs[]) returns void
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

create or replace function private.refuse(
  p_token text, p_detail text, p_hint text default null, p_retry_after integer default null
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_status integer := (jsonb '{
    "invalid_input": 400, "not_authenticated": 401, "insufficient_credits": 402, "in_debt": 402,
    "requires_paid_plan": 403, "account_blocked": 403, "not_found": 404, "method_not_allowed": 405,
    "idempotency_conflict": 409, "price_changed": 409, "not_finished": 409, "already_finished": 409,
    "too_many_active": 429, "rate_limited": 429,
    "budget_spent": 503, "busy": 503, "model_paused": 503, "unavailable": 503
  }' ->> p_token)::integer;
begin
  if p_retry_after is null then
    raise exception using
      errcode = 'PT' || v_status, message = p_token, detail = p_detail, hint = coalesce(
        p_hint, 'Correct the argument and call again.'
      );
  end if;
  raise sqlstate 'PGRST' using
    message = json_build_object(
      'code', 'PT' || v_status,
      'message', p_token,
      'details', p_detail,
      'hint', format('Try again in %s seconds.', p_retry_after)
    )::text,
    detail = json_build_object(
      'status', v_status, 'headers', json_build_object('Retry-After', p_retry_after::text)
    )::text;
end;
$$;

create or replace function private.plan_of(p_entitlement public.entitlements) returns private.plans
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return (select p from private.plans as p where p.name = case
    when p_entitlement.paid_until > now() then 'paid'
    when p_entitlement.is_guest then 'guest'
    else 'free'
  end);
end;
$$;

create or replace function private.gate(p_user_id uuid, p_model text) returns private.gate
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_gate private.gate;
begin
  select
    e.user_id, e.credits, e.last_fair_key, p.name, p.weight, p.max_active, p.max_batch,
    -- A minute or a day that is over, too: refuse_limits looks closer.
    e.minute_jobs >= p.max_per_minute or e.day_burned >= p.max_burned_per_day or e.debt > 0
    or e.day_jobs >= p.max_per_minute::bigint * p.full_minutes_per_day
    or least(p.oldest_ready_at, p.looked_at) < now() - p.busy_after
    or e.blocked_until > now(),
    m.id is null or (m.requires_paid and p.name <> 'paid') or p.has_budgets or exists (
      select from private.breakers as b
      where b.paused_until > now() or e.user_id = any (b.failed_users || b.doubted_users)
    ),
    m, e.credits_end_at
  into v_gate
  from (select * from public.entitlements where user_id = p_user_id for update) as e
  inner join private.plans as p
    on p.name = case
      when e.paid_until > now() then 'paid' when e.is_guest then 'guest' else 'free'
    end
  left join public.models as m on m.id = p_model and m.is_active;
  if not found then
    perform private.refuse_unknown_user();
  elsif v_gate.credits_end_at <= now() then
    perform private.end_credits(array[p_user_id]);
    return private.gate(p_user_id, p_model);
  end if;
  return v_gate;
end;
$$;

create or replace function private.require_model(p_gate private.gate, p_name text) returns public.models
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_model public.models := p_gate.model;
  v_paused_until timestamptz;
begin
  if v_model.id is null then
    select m.* into v_model
    from public.model_aliases as a
    inner join public.models as m on m.id = a.model_id
    cross join lateral (
      select
        ('x' || left(md5(concat_ws(' ', p_gate.user_id, a.id, m.id)), 12))::bit(48)::bigint as n
    ) as drawn
    where a.id = p_name and a.weight > 0 and m.is_active
      and (p_gate.plan = 'paid' or not m.requires_paid)
    order by
      coalesce(
        private.paused_until(m, p_gate.user_id), private.budget_spent_until(m, p_gate.user_id)
      ) is not null,
      -ln((drawn.n + 1) / 281474976710657.0) / a.weight
    limit 1;
  end if;
  if v_model.id is null then
    perform private.refuse_missing('model: no such model', 'list_models() names them.');
  elsif v_model.requires_paid and p_gate.plan <> 'paid' then
    perform private.refuse(
      'requires_paid_plan', format('%s is for paid users', v_model.id),
      'Choose another model or a paid plan.'
    );
  end if;
  v_paused_until := private.paused_until(v_model, p_gate.user_id);
  if v_paused_until is not null then
    perform private.refuse(
      'model_paused', format('%s is paused', v_model.id), p_retry_after => ceil(
        extract(epoch from least(v_paused_until, now() + interval '1 hour') - now())
      )::integer
    );
  end if;
  if exists (
    select from private.budgets as b
    where b.on_breach <> 'alert' and coalesce(b.user_id, p_gate.user_id) = p_gate.user_id
      and (b.spent_until > now() or v_model.cost_usd is null)
  ) then
    v_paused_until := private.budget_spent_until(v_model, p_gate.user_id);
  end if;
  if v_paused_until is not null then
    perform private.refuse(
      'budget_spent', format('what %s may cost is spent, or not known', v_model.id),
      p_retry_after => ceil(
        extract(epoch from least(v_paused_until, now() + interval '1 hour') - now())
      )::integer
    );
  end if;
  return v_model;
end;
$$;

create or replace function private.is_busy(
  p_plan private.plans, p_provider text default null
) returns boolean
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  if least(p_plan.oldest_ready_at, p_plan.looked_at) < now() - p_plan.busy_after then
    return exists (
      select from (
        select r.user_id, r.model_id, r.route, r.queued_at from private.ready_jobs as r
        where r.run_at is null and r.fair_key >= (select f.fair_key from private.queue_floor as f)
        order by r.fair_key, r.seq limit 1000
      ) as next
      where next.queued_at < now() - p_plan.busy_after
        and next.user_id not in (select r.user_id from private.running_jobs as r)
        -- Nor does it wait for us while its model is paused, or nobody can make it.
        and not exists (
          select from private.paused_models as p
          where p.id = next.model_id
            and (p.paused_until is not null or p.resumed_at > now() - p_plan.busy_after)
        )
        and next.model_id not in (select u.id from private.unserved_models as u)
        and not exists (
          select from private.routes as w inner join private.providers as p on p.name = w.provider
          where w.model_id = next.model_id and w.place = next.route and p.max_running is not null
            and p.name is distinct from p_provider
        )
        and not private.awaits_budget(
          next.model_id, next.route, next.user_id, p_plan.busy_after
        )
    );
  end if;
  return false;
end;
$$;

create or replace function private.refuse_limits(p_user_id uuid, p_provider text) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_used public.entitlements := (
    select e from public.entitlements as e where e.user_id = p_user_id
  );
  v_plan private.plans := private.plan_of(v_used);
  v_max_per_day bigint := v_plan.max_per_minute::bigint * v_plan.full_minutes_per_day;
begin
  if v_used.blocked_until > now() then
    perform private.refuse(
      'account_blocked', format('until %s', v_used.blocked_until), 'Ask the app''s support.'
    );
  elsif v_used.debt > 0 and not (select s.debtors_may_enqueue from private.settings as s) then
    perform private.refuse(
      'in_debt', format('%s credits that were taken back are owed', v_used.debt),
      'What you buy pays for them first.'
    );
  elsif v_plan.max_active <= (
    select count(*) from (
      select from private.live_jobs as j where j.user_id = p_user_id limit v_plan.max_active
    ) as live
  ) then
    perform private.refuse(
      'too_many_active',
      format('%s jobs are queued or running, the plan''s limit', v_plan.max_active),
      p_retry_after => 5
    );
  elsif v_used.minute_started_at > now() - interval '1 minute'
    and v_used.minute_jobs >= v_plan.max_per_minute then
    perform private.refuse(
      'rate_limited', format('%s jobs in this minute, the plan''s limit', v_plan.max_per_minute),
      p_retry_after => ceil(
        extract(epoch from v_used.minute_started_at + interval '1 minute' - now())
      )::integer
    );
  elsif v_used.day_started_at > now() - interval '1 day' and (
    v_used.day_jobs >= v_max_per_day or v_used.day_burned >= v_plan.max_burned_per_day
  ) then
    perform private.refuse(
      'rate_limited', format(
        '%s jobs in this day, %s of them canceled when they ran: the plan''s limits are %s and %s',
        v_used.day_jobs, v_used.day_burned, v_max_per_day, v_plan.max_burned_per_day
      ),
      p_retry_after => ceil(
        extract(epoch from v_used.day_started_at + interval '1 day' - now())
      )::integer
    );
  elsif private.is_busy(v_plan, p_provider) then
    perform private.refuse('busy', 'Jobs wait too long to take in more.', p_retry_after => 60);
  end if;
end;
$$;

create or replace function private.check_source_images(
  p_model public.models, p_user_id uuid, p_params jsonb
) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_name text;
  v_problem text;
begin
  select i.name, q.problem into v_name, v_problem
  from unnest(p_model.image_inputs) as i (name)
  cross join jsonb_path_query(p_params -> i.name, 'lax $[*]') as v (source)
  cross join regexp_match(v.source #>> '{}', '^(?:(generations|inputs)/)?(.*)$') as p (part)
  cross join lateral (
    select case
      when p.part[1] = 'generations' then case when not exists (
        select from public.images as m
        inner join public.generations as g on g.id = m.generation_id
        where m.generation_id = private.path_id(p.part[2], 2) and m.storage_path = p.part[2]
          and m.user_id = p_user_id and g.deleted_at is null
      ) then 'no finished picture of yours' end
      when (
        private.owner_of(private.path_id(p.part[2], 1)) = p_user_id
        and private.is_plain_path(p.part[2])
      ) is not true
        then 'not a path in your folder of bucket inputs'
      when to_regclass('storage.objects') is not null
        and private.file_changed_at('inputs', p.part[2]) is null
        then 'no such file in bucket inputs'
    end as problem
  ) as q
  where v.source <> 'null' and q.problem is not null
  limit 1;
  if found then
    perform private.refuse_input(format('params.%s: %s', v_name, v_problem), format(
      'Upload the picture to inputs as %s/<name> and give that path, or give generations/<path> of '
      'a picture you have made.', p_user_id
    ));
  end if;
end;
$$;

create or replace function private.book(
  p_user_id uuid, p_kind text, p_given integer, p_bucket_id bigint default null,
  p_generation_id uuid default null, p_external_id text default null
) returns boolean
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_has public.entitlements;
  v_debt integer;
begin
  select * into v_has from public.entitlements where user_id = p_user_id for update;
  if not found then
    return false;
  end if;
  v_debt := case
    when p_given > 0 then -least(p_given, v_has.debt) else greatest(-p_given - v_has.credits, 0)
  end;
  insert into public.credit_ledger (
    user_id, generation_id, kind, amount, balance_after, external_id, bucket_id, debt
  )
  values (
    p_user_id, p_generation_id, p_kind, p_given + v_debt, v_has.credits + p_given + v_debt,
    p_external_id, p_bucket_id, v_debt
  )
  on conflict do nothing;
  if not found then
    return false;
  end if;
  if p_bucket_id is not null then
    update private.credit_buckets set credits = credits + p_given + v_debt where id = p_bucket_id;
    v_has.credits_end_at := (
      select min(b.expires_at) from private.credit_buckets as b
      where b.user_id = p_user_id and b.credits > 0
    );
  end if;
  update public.entitlements set
    credits = credits + p_given + v_debt, debt = debt + v_debt,
    credits_end_at = v_has.credits_end_at
  where user_id = p_user_id;
  return true;
end;
$$;

create or replace function private.end_credits(p_user_ids uuid[]) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_bucket private.credit_buckets;
begin
  perform from public.entitlements where user_id = any (p_user_ids) order by user_id for update;
  for v_bucket in
    select * from private.credit_buckets
    where user_id = any (p_user_ids) and credits > 0 and expires_at <= now() order by id
  loop
    perform private.book(v_bucket.user_id, 'expire', -v_bucket.credits, v_bucket.id);
  end loop;
  return cardinality(p_user_ids);
end;
$$;

create or replace function private.expire_credits(p_at_most integer default 1000) returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms' as $$
begin
  return private.skip_failing('select private.end_credits($1)', array(
    select b.user_id from private.credit_buckets as b
    where b.expires_at <= now() and b.credits > 0
    group by b.user_id order by min(b.expires_at)
    limit p_at_most + (select count(*) from private.skipped_rows)
  ));
end;
$$;

comment on function private.expire_credits is
  'Books what has ended (expire), each minute by pg_cron. It cannot be spent before that either. '
  'Answers of how many users.';

create or replace function private.spendable_credits(p_has public.entitlements) returns integer
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  if p_has.credits_end_at <= now() then
    return p_has.credits - (
      select coalesce(sum(b.credits), 0) from private.credit_buckets as b
      where b.user_id = p_has.user_id and b.expires_at <= now()
    );
  end if;
  return p_has.credits;
end;
$$;

create or replace function private.credits_in_order(p_user_id uuid, p_credits integer)
returns table (bucket_id bigint, external_id text, credits integer, before bigint)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return query
  with parts as (
    select b.id, b.external_id, b.credits::integer as credits, b.priority, b.expires_at
    from private.credit_buckets as b
    where b.user_id = p_user_id and b.credits > 0
  ),
  all_parts as (
    select * from parts
    union all
    select null, null, p_credits - (select coalesce(sum(p.credits), 0) from parts as p)::integer,
      0, 'infinity'
  )
  select
    a.id, a.external_id, a.credits,
    sum(a.credits) over (order by a.priority, a.expires_at, a.id) - a.credits
  from all_parts as a where a.credits > 0;
end;
$$;

create or replace function private.charge_buckets(
  p_user_id uuid, p_credits integer, p_job_ids uuid[], p_price bigint
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  with parts as (
    select
      j.id as generation_id, j.place, s.bucket_id, s.before,
      (
        least(s.before + s.credits, j.place * p_price)
        - greatest(s.before, (j.place - 1) * p_price)
      )::integer as credits
    from unnest(p_job_ids) with ordinality as j (id, place)
    inner join private.credits_in_order(p_user_id, p_credits) as s
      on s.before < j.place * p_price and s.before + s.credits > (j.place - 1) * p_price
  ),
  booked as (
    insert into public.credit_ledger (
      user_id, generation_id, kind, amount, balance_after, bucket_id
    )
    select
      p_user_id, p.generation_id, 'charge', -p.credits,
      p_credits - sum(p.credits) over (order by p.place, p.before), p.bucket_id
    from parts as p order by p.place, p.before
  )
  update private.credit_buckets as b set credits = b.credits - p.credits
  from (
    select q.bucket_id, sum(q.credits) as credits from parts as q group by q.bucket_id
  ) as p
  where b.id = p.bucket_id;
  update public.entitlements set credits_end_at = (
    select min(b.expires_at) from private.credit_buckets as b
    where b.user_id = p_user_id and b.credits > 0
  )
  where user_id = p_user_id;
end;
$$;

create or replace function private.refund_generation(
  p_user_id uuid, p_generation_id uuid, p_credits integer
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_left integer := p_credits;
  v_part integer;
  v_paid record;
begin
  perform private.end_credits(array[p_user_id])
  from public.entitlements where user_id = p_user_id and credits_end_at <= now();
  for v_paid in
    with paid as (
      select
        l.bucket_id, l.id, -l.amount as credits, coalesce(b.priority > 0, false) as is_last,
        b.expires_at <= now() as is_over
      from public.credit_ledger as l
      left join private.credit_buckets as b on b.id = l.bucket_id
      where l.generation_id = p_generation_id and l.kind = 'charge' and l.bucket_id is not null
    )
    select * from (
      select * from paid
      union all
      select null, null, g.price_credits - (select coalesce(sum(p.credits), 0) from paid as p),
        false, false
      from public.generations as g where g.id = p_generation_id
    ) as p
    order by p.is_last desc, p.bucket_id is not null, p.id desc
  loop
    v_part := least(v_left, v_paid.credits);
    continue when v_part = 0 and (p_credits > 0 or v_paid.bucket_id is not null);
    if v_paid.is_over then
      update private.credit_buckets set
        expires_at = now() + (select s.refund_grace from private.settings as s), is_extended = true
      where id = v_paid.bucket_id and not is_extended;
    end if;
    exit when not private.book(p_user_id, 'refund', v_part, v_paid.bucket_id, p_generation_id);
    v_left := v_left - v_part;
  end loop;
end;
$$;

create or replace function private.entitlement_json(p_user_id uuid) returns json
language sql stable set search_path = pg_catalog, pg_temp as $$
  select json_build_object(
    'user_id', e.user_id,
    'plan', p.name,
    'paid_until', e.paid_until,
    'blocked_until', e.blocked_until,
    'credits', private.spendable_credits(e),
    'debt', e.debt,
    'credits_ending', (
      select coalesce(
        json_agg(
          json_build_object('credits', b.credits, 'expires_at', b.expires_at) order by b.expires_at
        ), '[]'
      )
      from private.credit_buckets as b
      where b.user_id = p_user_id and b.credits > 0 and b.expires_at < 'infinity'
        and b.expires_at > now()
    ),
    'active_jobs', (select count(*) from private.live_jobs as j where j.user_id = p_user_id),
    'max_active', p.max_active,
    'minute_jobs', case
      when e.minute_started_at > now() - interval '1 minute' then e.minute_jobs
      else 0
    end,
    'max_per_minute', p.max_per_minute,
    'max_batch', p.max_batch,
    'is_busy', private.is_busy(p)
  )
  from public.entitlements as e
  cross join lateral private.plan_of(e) as p
  where e.user_id = p_user_id
$$;

create or replace function private.move_credits(
  p_user_id uuid, p_kind text, p_amount integer, p_external_id text,
  p_expires_at timestamptz default null, p_priority integer default 0, p_of text default null
) returns json
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_has public.entitlements;
  v_known public.credit_ledger;
  v_charged bigint;
  v_bucket_id bigint;
  v_part record;
  v_left bigint := -p_amount::bigint;
  v_is_booked boolean;
begin
  select * into v_has from public.entitlements where user_id = p_user_id for update;
  if not found then
    perform private.refuse_missing('user_id: no such user', 'Use the id of auth.users.');
  end if;
  select * into v_known from public.credit_ledger where external_id = p_external_id;
  if (private.owner_of(v_known.user_id), v_known.kind, v_known.amount - v_known.debt)
    = (p_user_id, p_kind, p_amount) then
    return json_build_object(
      'credits', private.spendable_credits(v_has), 'debt', v_has.debt, 'applied', false
    );
  elsif v_known.id is null then
    if v_has.credits_end_at <= now() then
      perform private.end_credits(array[p_user_id]);
      select * into v_has from public.entitlements where user_id = p_user_id;
    end if;
    -- Far below what an integer holds, also once what jobs under way were charged has come back: so
    -- no refund can ever overflow.
    select coalesce(sum(g.price_credits), 0) into v_charged
    from private.live_jobs as j inner join public.generations as g on g.id = j.job_id
    where j.user_id = p_user_id;
    if v_has.credits::bigint - v_has.debt + p_amount
      not between -1000000000 and 1000000000 - v_charged then
      perform private.refuse_input(format(
        'amount: the balance is %s, and %s are in jobs under way', v_has.credits - v_has.debt,
        v_charged
      ));
    end if;
    if p_amount > 0 and (p_expires_at < 'infinity' or p_priority <> 0) then
      insert into private.credit_buckets (user_id, external_id, priority, expires_at, credits)
      values (p_user_id, p_external_id, p_priority, coalesce(p_expires_at, 'infinity'), 0)
      returning id into v_bucket_id;
    elsif v_has.credits_end_at is not null then
      for v_part in
        select s.bucket_id, least(s.credits, greatest(v_left - s.before, 0))::integer as credits
        from (
          select c.bucket_id, c.credits, sum(c.credits) over (
            order by c.external_id = p_of is true desc, c.before desc
          ) - c.credits as before
          from private.credits_in_order(p_user_id, v_has.credits) as c
        ) as s
        where s.bucket_id is not null and v_left > s.before
      loop
        perform private.book(p_user_id, p_kind, -v_part.credits, v_part.bucket_id);
        perform private.book(p_user_id, p_kind, v_part.credits);
      end loop;
    end if;
    v_is_booked := private.book(
      p_user_id, p_kind, p_amount, v_bucket_id, p_external_id => p_external_id
    );
  end if;
  -- Or another user's took it just now.
  if v_is_booked is not true then
    perform private.refuse(
      'idempotency_conflict', 'external_id was used for another grant',
      'Use the payment''s own id, once for each payment.'
    );
  end if;
  select * into v_has from public.entitlements where user_id = p_user_id;
  return json_build_object('credits', v_has.credits, 'debt', v_has.debt, 'applied', true);
end;
$$;

create or replace function public.grant_credits(
  user_id uuid, amount integer, kind text, external_id text, expires_at timestamptz default null,
  priority integer default 0
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform private.require_writable();
  if ((kind = 'grant' and amount > 0) or (kind = 'adjust' and amount <> 0)) is not true then
    perform private.refuse_input(
      'kind: grant with a positive amount, or adjust with one that is not 0'
    );
  elsif coalesce(octet_length(external_id) not between 1 and 200, true) then
    perform private.refuse_input(
      'external_id: not 1 to 200 bytes', 'Use the payment''s id: repeats are applied once.'
    );
  elsif coalesce(priority not between -100 and 100, true) then
    perform private.refuse_input('priority: not -100 to 100');
  elsif expires_at = '-infinity' or (expires_at < 'infinity' or priority <> 0) and amount < 0 then
    perform private.refuse_input('expires_at, priority: of what is given, not of what is taken');
  end if;
  return private.move_credits(
    private.owner_of(user_id), kind, amount, external_id, expires_at, priority
  );
end;
$$;

comment on function public.grant_credits is
  'Adds credits to a user: kind grant (amount > 0) or adjust (either sign). They never end, or at '
  'expires_at; of several the smallest priority (-100 to 100) is spent first, of equal ones what '
  'ends first. What adjust takes and is not there becomes a debt, which later grants and refunds '
  'pay first. The same external_id is applied once. Answers {credits, debt, applied}. Errors: '
  'PT400 invalid_input, PT404 not_found, PT409 idempotency_conflict.';

create table private.billing_providers (
  name text primary key,
  takes_test_events boolean not null default false,
  constraint billing_providers_name_is_a_word check (
    name ~ '^[a-z][a-z0-9_]*$' and name <> 'set_paid'
  )
);

comment on table private.billing_providers is 'Whose billing events are taken.';

comment on column private.billing_providers.takes_test_events is
  'Whether events of a sandbox count as if they were real. Else they do nothing.';

create table public.credit_products (
  provider text,
  product_id text,
  credits integer not null,
  trial_credits integer not null default 0,
  makes_paid boolean not null default false,
  period interval,
  credits_end boolean not null default true,
  rollover_cap integer default 0,
  priority smallint not null default 0,
  grace interval not null default '1 day',
  grants_changes boolean not null default false,
  primary key (provider, product_id),
  constraint credit_products_credits_are_at_most_a_million check (
    credits between 0 and 1000000 and trial_credits between 0 and 1000000
  ),
  constraint credit_products_times_are_in_reach check (
    period > '0' and period <= '100 years' and grace between '0' and '1 year'
  ),
  constraint credit_products_rollover_cap_is_not_negative check (rollover_cap >= 0),
  constraint credit_products_priority_is_in_reach check (priority between -100 and 100)
);

comment on table public.credit_products is
  'What the products of a store give. One that gives nothing has a row too, of 0 credits: what is '
  'sold without one waits for it.';

comment on column public.credit_products.product_id is
  'Stripe: price_…, prod_…, plink_…, or metadata.product of a Checkout session. RevenueCat: '
  'product_id, of Google Play also without the base plan.';

comment on column public.credit_products.credits is
  'Of each one bought, or of each period of a subscription.';

comment on column public.credit_products.trial_credits is
  'Of a period that nobody pays for: a trial, a price of 0, a family''s share.';

comment on column public.credit_products.makes_paid is
  'Whether who has it is a paid user while it lasts.';

comment on column public.credit_products.period is
  'How long it lasts where the store says no end; null: for ever. Packs of credits are for ever: '
  'app stores forbid that what is bought once ends.';

comment on column public.credit_products.credits_end is
  'Whether the credits of a period end with it. What lasts for ever never ends.';

comment on column public.credit_products.rollover_cap is
  'How many credits of the period before, at most, go on into a period; null: all.';

comment on column public.credit_products.priority is
  'Of the credits: the smallest is spent first.';

comment on column public.credit_products.grace is
  'How much longer than a period its credits and its plan last, for renewals are paid late.';

comment on column public.credit_products.grants_changes is
  'Whether a change of plans within a period, of which a share is paid, grants as a period does.';

alter table public.credit_products enable row level security;

create table private.billing_events (
  provider text,
  event_id text,
  type text not null,
  happened_at timestamptz not null,
  received_at timestamptz not null default now(),
  user_id uuid,
  said jsonb,
  outcome text not null default 'waiting',
  credits integer not null default 0,
  detail text,
  waits_for text[],
  primary key (event_id, provider),
  constraint billing_events_outcome_is_known check (
    outcome in ('applied', 'repeated', 'older', 'waiting', 'ignored')
  ),
  constraint billing_events_have_id_type_and_time check (
    event_id <> '' and type <> '' and happened_at > '-infinity'
  )
);

comment on table private.billing_events is
  'Every billing event and what it did. Once its user is deleted it stays without user and what it '
  'said, so that it does nothing if it is sent once more.';

comment on column private.billing_events.said is
  'The event in our terms. Names and addresses that the provider sent are not kept.';

comment on column private.billing_events.waits_for is
  'What is not known yet: user, product or payment, and what the provider calls it.';

create index billing_events_waits_for_idx
on private.billing_events using gin (waits_for) with (fastupdate = off)
where waits_for is not null;

create index billing_events_user_id_idx
on private.billing_events (user_id) where user_id is not null;

create index billing_events_received_at_idx on private.billing_events (received_at);

create index billing_events_waiting_idx
on private.billing_events ((provider || ' ' || event_id) collate "C") where outcome = 'waiting';

create table private.billing_customers (
  provider text,
  name text,
  user_id uuid not null,
  happened_at timestamptz not null,
  primary key (name, provider)
);

comment on table private.billing_customers is
  'What else providers call our users: cus_…, $RCAnonymousID:…. Learnt from events that name both.';

create index billing_customers_user_id_idx on private.billing_customers (user_id);

create or replace function private.share_taken(p_taken_by jsonb) returns numeric
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select least(round(coalesce(sum((t.value ->> 'share')::numeric), 0), 12), 1)
  from jsonb_each(p_taken_by) as t
$$;

create table private.billing_purchases (
  provider text,
  purchase text,
  user_id uuid,
  product_id text not null,
  subscription text not null,  -- of a single purchase itself
  payments text[] not null,
  amount bigint,
  happened_at timestamptz not null,
  starts_at timestamptz not null,
  credits_until timestamptz not null,
  paid_until timestamptz,
  credits integer not null,
  rollover_cap integer,
  taken_by jsonb not null default '{}',
  taken numeric generated always as (private.share_taken(taken_by)) stored,
  given integer not null,
  short integer not null default 0,
  primary key (purchase, provider),
  constraint billing_purchases_have_a_name_and_an_end_after_their_start check (
    purchase ~ '^\S+$' and starts_at > '-infinity' and credits_until > starts_at and credits >= 0
  )
);

comment on table private.billing_purchases is
  'What was paid for, once each: a period of a subscription or a single purchase. Its user is '
  'taken out when deleted; the rest stays, so that nothing is granted twice.';

comment on column private.billing_purchases.payments is
  'All that the provider calls the payment: invoice, intent, charge, transaction.';

comment on column private.billing_purchases.amount is
  'Paid for all of the invoice, in the currency''s smallest unit; null: not known.';

comment on column private.billing_purchases.taken_by is
  'By refund or dispute: which share of the payment it has taken back, and since when.';

comment on column private.billing_purchases.given is
  'Granted, and moved into or out of its bucket since.';

comment on column private.billing_purchases.short is
  'What is due back but was spent, so that it was taken from what else the user has, or owes.';

create index billing_purchases_subscription_idx
on private.billing_purchases (subscription, provider, starts_at);

create index billing_purchases_payments_idx
on private.billing_purchases using gin (payments) with (fastupdate = off);

create index billing_purchases_user_id_idx
on private.billing_purchases (user_id) where user_id is not null;

create index billing_purchases_of_nobody_idx
on private.billing_purchases (happened_at) where user_id is null;

create table private.billing_subscriptions (
  provider text,
  subscription text,
  user_id uuid not null,
  owned_since timestamptz not null,
  paid_until timestamptz,
  happened_at timestamptz not null default '-infinity',
  primary key (subscription, provider)
);

comment on table private.billing_subscriptions is
  'Whose each subscription is, and until when it makes paid as last heard. provider set_paid: what '
  'set_paid said of a user.';

comment on column private.billing_subscriptions.happened_at is
  'When that was so. What was paid for later (billing_purchases) goes on top.';

create index billing_subscriptions_user_id_idx on private.billing_subscriptions (user_id);

comment on column private.settings.keep_billing_events is
  'How long billing events are kept; null: for ever.';

create domain private.billing_name as text
constraint billing_name_is_short check (octet_length(value) <= 200);

create type private.sale as (
  purchase private.billing_name, products private.billing_name array, quantity integer,
  subscription private.billing_name, starts_at timestamptz, ends_at timestamptz,
  is_trial boolean, is_change boolean
);

create type private.plan_state as (
  subscription private.billing_name, products private.billing_name array,
  paid_until timestamptz, is_end boolean
);

create type private.taking as (cause private.billing_name, amount bigint, paid bigint);

create type private.billing_event as (
  id private.billing_name, type private.billing_name, happened_at timestamptz, is_test boolean,
  users private.billing_name array, payments private.billing_name array, amount bigint,
  sales private.sale array, plans private.plan_state array, taken private.taking,
  moved_from private.billing_name array
);

create or replace function private.billed_user(p_provider text, p_names text[]) returns uuid
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_is_id text := '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$';
begin
  return (
    select e.user_id
    from unnest(p_names) with ordinality as n (name, place)
    left join private.billing_customers as c on c.provider = p_provider and c.name = n.name
    cross join lateral (
      select case when n.name ~* v_is_id then private.owner_of(n.name::uuid) end as id
    ) as i
    inner join public.entitlements as e on e.user_id in (i.id, c.user_id)
    order by n.place, e.user_id = c.user_id limit 1
  );
end;
$$;

create or replace function private.credit_product(
  p_provider text, p_products text[]
) returns public.credit_products
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_product public.credit_products;
begin
  select * into v_product from public.credit_products as p
  where p.provider = p_provider and p.product_id = any (p_products)
  order by array_position(p_products, p.product_id) limit 1;
  return v_product;
end;
$$;

create or replace function private.refresh_plan(p_user_id uuid) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_paid_until timestamptz;
begin
  with heard as (
    select
      s.provider = 'set_paid' as is_said, greatest(s.happened_at, max(p.happened_at)) as at,
      greatest(
        s.paid_until, max(p.paid_until) filter (where p.happened_at > s.happened_at)
      ) as paid_until
    from private.billing_subscriptions as s
    left join private.billing_purchases as p
      on p.provider = s.provider and p.subscription = s.subscription and p.taken < 1
    where s.user_id = p_user_id
    group by s.provider, s.subscription
    having s.provider = 'set_paid' or coalesce(s.paid_until, max(p.paid_until)) is not null
  )
  select max(h.paid_until) into v_paid_until from heard as h
  where h.is_said = (
    select coalesce(max(o.at) filter (where o.is_said) >= max(o.at), false) from heard as o
  );
  update public.entitlements set paid_until = v_paid_until
  where user_id = p_user_id and paid_until is distinct from v_paid_until;
end;
$$;

create or replace function private.settle_purchases(p_provider text, p_subscription text) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_into jsonb := '{}'::jsonb;
  v_of record;
  v_left integer;
  v_on integer;
  v_gives integer;
  v_short integer;
  v_name text;
  v_sum integer := 0;
begin
  perform private.end_credits(array(
    select p.user_id from private.billing_purchases as p
    where p.subscription = p_subscription and p.provider = p_provider and p.user_id is not null
  ));
  for v_of in
    select
      p.*, b.id as bucket_id, p.credits_until <= now() as is_over, b.credits::integer as has,
      floor(p.credits * p.taken + 0.000001)::integer as due,
      n.purchase as next, n.rollover_cap as next_cap,
      last_value(p.purchase) over (
        order by p.starts_at, p.purchase rows between unbounded preceding and unbounded following
      ) as last
    from private.billing_purchases as p
    left join public.credit_ledger as g on g.external_id = p.provider || ':' || p.purchase
    left join private.credit_buckets as b on b.id = g.bucket_id
    left join lateral (
      select * from private.billing_purchases as o
      where o.subscription = p.subscription and o.provider = p.provider
        and o.user_id = p.user_id and o.credits > 0 and o.starts_at > p.starts_at
        and o.starts_at <= p.credits_until and o.credits_until > p.credits_until
      order by o.product_id <> p.product_id, o.starts_at, o.purchase limit 1
    ) as n on true
    where p.subscription = p_subscription and p.provider = p_provider
      and p.user_id is not null and p.credits > 0
    order by p.starts_at, p.purchase
  loop
    -- What is not in the bucket any more was spent, or paid a debt, unless it has ended.
    if v_of.is_over then
      v_of.has := (
        select -sum(l.amount) from public.credit_ledger as l
        where l.user_id = v_of.user_id and l.bucket_id = v_of.bucket_id and l.kind = 'expire'
      );
    end if;
    v_left := v_of.credits - v_of.due - v_of.given + coalesce(v_of.has, 0)
      + coalesce((v_into ->> v_of.purchase)::integer, 0);
    v_short := greatest(-v_left, 0);
    v_left := greatest(v_left, 0);
    if v_of.next is not null then
      v_on := coalesce((v_into ->> v_of.next)::integer, 0);
      v_into := v_into || jsonb_build_object(
        v_of.next, v_on + least(v_left, coalesce(v_of.next_cap - v_on, v_left))
      );
      v_left := v_left - ((v_into ->> v_of.next)::integer - v_on);
    end if;
    v_gives := case when v_of.is_over or v_of.bucket_id is null then 0 else v_left - v_of.has end;
    continue when v_gives = 0 and v_short = v_of.short;
    v_name := format('%s:%s %s', p_provider, v_of.purchase, gen_random_uuid());
    if v_gives <> 0 then
      perform private.book(
        v_of.user_id, 'adjust', v_gives, v_of.bucket_id, p_external_id => v_name
      );
    end if;
    if v_short <> v_of.short then
      perform private.move_credits(
        v_of.user_id, 'adjust', v_of.short - v_short, 'short ' || v_name,
        p_of => p_provider || ':' || v_of.last
      );
    end if;
    update private.billing_purchases set given = given + v_gives, short = v_short
    where purchase = v_of.purchase and provider = p_provider;
    v_sum := v_sum + v_gives + v_of.short - v_short;
  end loop;
  return v_sum;
end;
$$;

create or replace function private.apply_kept(p_key text) returns boolean
language plpgsql set search_path = pg_catalog, pg_temp set enable_seqscan = off as $$
declare
  v_provider text := split_part(p_key, ' ', 1);
  v_event_id text := substr(p_key, length(v_provider) + 2);
  v_said private.billing_event;
  v_at timestamptz;
  v_payments text[];
  v_user_id uuid;
  v_from uuid[];
  v_payers uuid[];
  v_names text[];  -- of subscriptions
  v_sale private.sale;
  v_plan private.plan_state;
  v_product public.credit_products;
  v_purchase private.billing_purchases;
  v_keys text[];
  v_touched text[] := '{}'::text[];
  v_known text[] := '{}'::text[];
  v_waits_for text[] := '{}'::text[];
  v_credits integer := 0;
  v_rank integer := 1;  -- among outcomes
begin
  perform from private.billing_providers where name = v_provider for update;
  select r.* into v_said
  from private.billing_events as e
  cross join lateral jsonb_populate_record(null::private.billing_event, e.said) as r
  where e.provider = v_provider and e.event_id = v_event_id and e.outcome = 'waiting';
  if not found then
    return false;
  end if;
  v_at := v_said.happened_at;
  v_payments := v_said.payments;
  v_user_id := private.billed_user(v_provider, v_said.users);
  v_from := array(
    select f.user_id
    from unnest(v_said.moved_from) as m (name)
    cross join lateral private.billed_user(v_provider, array[m.name]) as f (user_id)
    where f.user_id <> v_user_id
  );
  v_names := array(
    select coalesce(t.subscription, t.purchase) from unnest(v_said.sales) as t
    where (private.credit_product(v_provider, t.products)).makes_paid and not exists (
      select from private.billing_purchases as p
      where p.purchase = t.purchase and p.provider = v_provider
    )
    union
    select p.subscription from unnest(v_said.plans) as p
  );
  v_payers := v_from || v_user_id || array(
    select s.user_id from private.billing_subscriptions as s
    where s.subscription = any (v_names) and s.provider = v_provider
  );
  perform from public.entitlements where user_id = any (v_payers || array(
    select p.user_id from private.billing_purchases as p where p.payments && v_payments
  ))
  order by user_id for update;
  if private.owner_of(v_user_id) <> v_user_id then  -- merged while this waited for the lock
    return private.apply_kept(p_key);
  end if;
  v_user_id := (select e.user_id from public.entitlements as e where e.user_id = v_user_id);
  if v_user_id is not null then
    -- Of those who go away with this, who is nobody yet is the same one.
    insert into private.billing_customers as c (provider, name, user_id, happened_at)
    select distinct v_provider, n.name, v_user_id, v_at
    from (
      select unnest(v_said.users)
      union all
      select m.name from unnest(v_said.moved_from) as m (name)
      where private.billed_user(v_provider, array[m.name]) is null
    ) as n (name)
    where n.name !~* '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
    on conflict (name, provider) do update
    set user_id = excluded.user_id, happened_at = excluded.happened_at
    where excluded.happened_at > c.happened_at and excluded.user_id <> c.user_id;
    v_rank := case when found or v_from <> '{}' then 2 else 1 end;
    v_known := array(
      select format('user %s:%s', v_provider, n.name)
      from unnest(v_said.users || v_said.moved_from) as n (name)
    );
    update private.billing_subscriptions set user_id = v_user_id, owned_since = v_at
    where provider = v_provider and user_id = any (v_from) and owned_since < v_at;
    -- A later event says whose it is now.
    insert into private.billing_subscriptions as s (provider, subscription, user_id, owned_since)
    select v_provider, n.name, v_user_id, v_at from unnest(v_names) as n (name)
    on conflict (subscription, provider) do update
    set user_id = excluded.user_id, owned_since = excluded.owned_since
    where excluded.owned_since > s.owned_since;
    v_waits_for := array(
      select format('product %s:%s', v_provider, n.name)
      from (
        select t.products from unnest(v_said.sales) as t
        union all
        select p.products from unnest(v_said.plans) as p where p.is_end is not true
      ) as o
      cross join unnest(o.products) as n (name)
      where n.name is not null and (private.credit_product(v_provider, o.products)) is null
    );
  elsif v_payments is null or v_said.sales is not null or v_said.plans is not null then
    v_waits_for := array(
      select format('user %s:%s', v_provider, u.name) from unnest(v_said.users) as u (name)
    );
    v_payments := null;
  end if;

  foreach v_sale in array coalesce(v_said.sales, '{}'::private.sale[]) loop
    v_product := private.credit_product(v_provider, v_sale.products);
    continue when v_user_id is null or v_product.product_id is null;
    v_sale.starts_at := coalesce(v_sale.starts_at, v_at);
    v_sale.ends_at := coalesce(
      v_sale.ends_at, v_sale.starts_at + v_product.period, 'infinity'
    ) + v_product.grace;
    v_purchase.credits := coalesce(v_sale.quantity, 1) * case
      when v_sale.is_change and not v_product.grants_changes then 0
      when v_sale.is_trial then v_product.trial_credits
      else v_product.credits
    end;
    insert into private.billing_purchases as p (
      provider, purchase, user_id, product_id, subscription, payments, amount, happened_at,
      starts_at, credits_until, paid_until, credits, given, rollover_cap
    )
    values (
      v_provider, v_sale.purchase, v_user_id, v_product.product_id,
      coalesce(v_sale.subscription, v_sale.purchase), coalesce(v_payments, '{}'),
      v_said.amount, v_at, v_sale.starts_at,
      case when v_product.credits_end then v_sale.ends_at else 'infinity' end,
      case when v_product.makes_paid then v_sale.ends_at end,
      v_purchase.credits, v_purchase.credits, v_product.rollover_cap
    )
    on conflict (purchase, provider) do nothing
    returning * into v_purchase;
    v_rank := greatest(v_rank, case when found then 5 else 3 end);
    continue when not found;
    v_touched := v_touched || v_purchase.subscription;
    v_credits := v_credits + v_purchase.credits;
    if v_purchase.credits > 0 then
      perform private.move_credits(
        v_user_id, 'grant', v_purchase.credits, v_provider || ':' || v_purchase.purchase,
        v_purchase.credits_until, v_product.priority
      );
    end if;
  end loop;

  foreach v_plan in array coalesce(v_said.plans, '{}'::private.plan_state[]) loop
    v_product := private.credit_product(v_provider, v_plan.products);
    v_plan.is_end := v_plan.is_end is true;
    continue when v_user_id is null or v_product.product_id is null and not v_plan.is_end;
    -- Of what is told of the same second, an end comes last.
    update private.billing_subscriptions as s set paid_until = n.paid_until, happened_at = n.at
    from (
      select
        v_at + v_plan.is_end::integer * interval '1 microsecond' as at,
        case when v_product.makes_paid
          then v_plan.paid_until + (not v_plan.is_end)::integer * v_product.grace
        end as paid_until
    ) as n
    where s.provider = v_provider and s.subscription = v_plan.subscription
      and (n.at, coalesce(n.paid_until, '-infinity'))
        > (s.happened_at, coalesce(s.paid_until, '-infinity'));
    v_rank := greatest(v_rank, case when found then 5 else 4 end);
    v_touched := v_touched || v_plan.subscription::text;
  end loop;

  if v_payments is not null then
    v_keys := array(
      select p.purchase from private.billing_purchases as p where p.payments && v_payments
      union
      select p.purchase
      from unnest(v_said.sales) as s
      inner join private.billing_purchases as p
        on p.purchase = s.purchase and p.provider = v_provider
    );
    if v_keys <> '{}' then
      v_known := v_known || array(select 'payment ' || n.name from unnest(v_payments) as n (name));
    elsif v_said.sales is null then
      v_waits_for := v_waits_for || array(
        select 'payment ' || n.name from unnest(v_payments) as n (name)
      );
    end if;
    update private.billing_purchases as p set payments = array(
      select distinct n.name from unnest(p.payments || v_payments) as n (name)
    )
    where p.provider = v_provider and p.purchase = any (v_keys) and not p.payments @> v_payments;
    v_rank := greatest(v_rank, case when found then 5 when v_keys <> '{}' then 3 end);
    for v_purchase in
      update private.billing_purchases as p
      set taken_by = p.taken_by || jsonb_build_object((v_said.taken).cause, to_jsonb(n))
      from private.billing_purchases as o
      cross join lateral (
        select v_at as at, greatest((v_said.taken).amount, 0)::numeric / greatest(
          coalesce((v_said.taken).paid, nullif(o.amount, 0), (v_said.taken).amount), 1
        ) as share
      ) as n
      cross join lateral jsonb_to_record(o.taken_by -> (v_said.taken).cause) as w (
        at timestamptz, share numeric
      )
      where o.provider = v_provider and o.purchase = any (v_keys)
        and p.provider = o.provider and p.purchase = o.purchase
        and (v_said.taken).cause is not null
        and ((n.at, n.share) <= (w.at, w.share)) is not true
      returning p.*
    loop
      v_touched := v_touched || v_purchase.subscription;
    end loop;
    if v_keys <> '{}' and (v_said.taken).cause is not null then
      v_rank := greatest(v_rank, case when found then 5 else 4 end);
    end if;
  end if;

  select v_credits + coalesce(sum(private.settle_purchases(v_provider, t.name)), 0)
  into v_credits
  from (select distinct unnest(v_touched) order by 1) as t (name);
  perform private.refresh_plan(u.user_id)
  from (
    select unnest(v_payers)
    union
    select s.user_id from private.billing_subscriptions as s
    where s.subscription = any (v_touched) and s.provider = v_provider
    order by 1
  ) as u (user_id);
  update private.billing_events as e set
    user_id = coalesce(v_user_id, v_purchase.user_id),
    credits = e.credits + v_credits,
    outcome = case
      when v_waits_for <> '{}' then 'waiting'
      else (array['ignored', 'applied', 'repeated', 'older', 'applied'])[v_rank]
    end,
    detail = case when v_waits_for = '{}' and v_rank = 1 and v_said.sales is not null then
      'it names no ' || case when v_user_id is null then 'user' else 'product' end
    end,
    waits_for = nullif(v_waits_for, '{}')
  where e.provider = v_provider and e.event_id = v_event_id
    and (v_credits <> 0 or e.waits_for is distinct from v_waits_for);
  perform private.skip_failing(
    'select count(private.apply_kept(e)) from unnest($1) as e', array(
      select e.provider || ' ' || e.event_id from private.billing_events as e
      where e.waits_for && v_known and e.event_id <> v_event_id
      order by e.happened_at, e.event_id
    )
  );
  return v_waits_for = '{}';
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
  if pg_column_size(event) > 262144 then
    perform private.refuse_input('event: over 256 KiB');
  end if;
  select p.takes_test_events into v_takes_tests
  from private.billing_providers as p where p.name = v_name for update;
  if not found then
    perform private.refuse_input(
      'provider: not known', 'Add it to private.billing_providers, or correct its name.'
    );
  end if;
  begin
    if jsonb_typeof(event) = 'string' then  -- as some gateways hand an argument on
      event := (event #>> '{}')::jsonb;
    end if;
    v_said := jsonb_populate_record(null::private.billing_event, case v_name
      when 'stripe' then private.read_stripe(event)
      when 'revenuecat' then private.read_revenuecat(event)
      else event
    end);
    if v_said.happened_at > now() then  -- what comes next is not to be older than that
      v_said.happened_at := now();
    end if;
    v_said.users := nullif(array_remove(v_said.users, null), '{}');
    v_said.payments := nullif(array(
      select v_name || ':' || p.name from unnest(v_said.payments) as p (name) where p.name <> ''
    ), '{}');
    v_said.sales := nullif(v_said.sales, '{}');
    v_said.plans := nullif(v_said.plans, '{}');
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

comment on function public.apply_billing_event is
  'Does what an event of a provider says, once, in whatever order events come. provider: stripe or '
  'revenuecat, with their events as they send them, or another one of private.billing_providers, '
  'with {id, type, happened_at, is_test, users: [the user''s id and other names, best first], '
  'payments: [names of the payment], amount, sales: [{purchase (what is paid for), products: [], '
  'quantity, subscription, starts_at, ends_at, is_trial, is_change}], plans: [{subscription, '
  'products: [], paid_until, is_end}], taken: {cause, amount (taken back by now), paid}, '
  'moved_from: [users]}, of which id, type and happened_at must be there. Stripe''s events name '
  'the user in metadata.user_id or client_reference_id, RevenueCat''s in app_user_id. Answers '
  '{event_id, outcome, detail, user_id, credits (given, or taken if negative)}; outcome: applied, '
  'repeated, older (something newer is known), waiting (for a user, product or payment: it is '
  'kept, and applied once that is known), ignored. Whatever is answered need not be sent again. '
  'Errors: PT400 invalid_input, PT503 unavailable.';

create or replace function private.apply_waiting(
  p_place text, p_at_most integer, out place text, out done integer
)
language sql set search_path = pg_catalog, pg_temp as $$
  select
    case when count(*) = p_at_most then max(w.key collate "C") end,
    private.skip_failing(
      'select count(*) filter (where private.apply_kept(w)) from unnest($1) as w',
      array_agg(w.key order by w.happened_at, w.key)
    )
  from (
    select e.provider || ' ' || e.event_id as key, e.happened_at
    from private.billing_events as e
    where e.outcome = 'waiting' and (e.provider || ' ' || e.event_id) collate "C" > p_place
    order by (e.provider || ' ' || e.event_id) collate "C" limit p_at_most
  ) as w
$$;

create or replace function private.trim_billing_events(
  p_place text, p_at_most integer, out place text, out done integer
)
language sql set search_path = pg_catalog, pg_temp as $$
  with events as (
    delete from private.billing_events as e where e.ctid = any (array(
      select o.ctid from private.billing_events as o
      where o.received_at < now() - (select s.keep_billing_events from private.settings as s)
      order by o.received_at limit p_at_most for update skip locked
    ))
    returning 1
  ),
  purchases as (
    delete from private.billing_purchases as p using private.settings as s
    where p.user_id is null and p.happened_at < now() - s.keep_billing_events returning 1
  )
  select null, ((select count(*) from events) + (select count(*) from purchases))::integer
$$;

create or replace function public.set_paid(
  user_id uuid, paid_until timestamptz, happened_at timestamptz default null,
  event_id text default null
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_has public.entitlements;
  v_at timestamptz := least(coalesce(happened_at, 'infinity'), now());
begin
  perform private.require_writable();
  if octet_length(event_id) not between 1 and 200 or happened_at = '-infinity' then
    perform private.refuse_input('event_id: not 1 to 200 bytes, or happened_at: no time');
  end if;
  user_id := private.owner_of(user_id);
  select * into v_has from public.entitlements as e where e.user_id = set_paid.user_id for update;
  if not found then
    perform private.refuse_missing('user_id: no such user', 'Use the id of auth.users.');
  end if;
  if event_id is not null then
    insert into private.billing_events (
      provider, event_id, type, happened_at, user_id, outcome
    )
    values ('set_paid', set_paid.event_id, 'set_paid', v_at, set_paid.user_id, 'applied')
    on conflict do nothing;
    if not found then
      return private.entitlement_json(user_id);
    end if;
  end if;
  -- Without a time it is what holds now, and if that is so already, nothing changes.
  if happened_at is not null or paid_until is distinct from v_has.paid_until then
    insert into private.billing_subscriptions as s (
      provider, subscription, user_id, owned_since, paid_until, happened_at
    )
    values (
      'set_paid', set_paid.user_id::text, set_paid.user_id, v_at, set_paid.paid_until, v_at
    )
    on conflict (subscription, provider) do update
    set paid_until = excluded.paid_until, happened_at = excluded.happened_at
    where (excluded.happened_at, coalesce(excluded.paid_until, '-infinity'))
      > (s.happened_at, coalesce(s.paid_until, '-infinity'));
    perform private.refresh_plan(user_id);
  end if;
  return private.entitlement_json(user_id);
end;
$$;

comment on function public.set_paid is
  'Makes a user paid until a time (infinity: without end; null: not paid), as of happened_at (null:'
  ' now): what was said of a later time, here or by billing events, stays. The same event_id does '
  'nothing again, nor does saying what holds. Answers the entitlement. Errors: PT400 '
  'invalid_input, PT404 not_found.';

comment on column private.settings.welcome_once_per_identity is
  'Whether who signs up again with an address that was welcomed gets no welcome credits. false: '
  'each account gets them, and no address is kept.';

comment on column private.settings.keep_identities is
  'How long after its welcome an address is known; null: for ever.';

comment on column private.settings.identity_key is
  'Secret of this installation: without it nobody can find an address by its hash. A new one '
  'forgets all of them.';

create table private.welcomed_identities (
  identity bytea primary key,
  welcomed_at timestamptz not null default now()
);

comment on table private.welcomed_identities is
  'Addresses that were given welcome credits, as identities_of hashes them. They outlive their '
  'accounts, for settings.keep_identities.';

create index welcomed_identities_welcomed_at_idx on private.welcomed_identities (welcomed_at);

create table private.merged_users (
  user_id uuid primary key,
  into_id uuid not null,
  merged_at timestamptz not null default now(),
  constraint merged_users_are_two check (user_id <> into_id)
);

comment on table private.merged_users is
  'Users who have become part of another by merge_user. Their files stay where they are: the '
  'folder is the other''s from then on, also when the user is gone from Auth.';

comment on column private.merged_users.into_id is
  'Never one who was merged: whoever is, takes all of these along.';

create index merged_users_into_id_idx on private.merged_users (into_id);

create or replace function private.owner_of(p_folder uuid) returns uuid
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return coalesce(
    (select m.into_id from private.merged_users as m where m.user_id = p_folder), p_folder
  );
end;
$$;

create or replace function private.folders_of(p_user_id uuid) returns uuid[]
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return array(
    select p_user_id where private.owner_of(p_user_id) = p_user_id
    union all
    select m.user_id from private.merged_users as m where m.into_id = p_user_id
  );
end;
$$;

create or replace function private.identities_of(p_user jsonb) returns bytea[]
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return array(
    select sha256(s.identity_key || convert_to(address.text, 'UTF8'))
    from private.settings as s
    cross join regexp_replace(
      lower(btrim(p_user ->> 'email')), '^([^+@]+)\+.*(@[^@]+)$', '\1\2'
    ) as e (mail)
    cross join lateral (values
      ('mail:' || case
        when e.mail ~ '^[^@]+@(gmail|googlemail)\.com$'
          then replace(split_part(e.mail, '@', 1), '.', '') || '@gmail.com'
        else e.mail
      end),
      ('phone:' || regexp_replace(p_user ->> 'phone', '\D', '', 'g'))
    ) as address (text)
    where address.text not in ('mail:', 'phone:')
    order by address.text
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

create or replace function private.follow_changed_user() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform private.follow_user(new.id);
  return null;
exception when others then
  perform private.note_skipped('follow_user', new.id::text, sqlstate, sqlerrm);
  return null;
end;
$$;

create or replace function private.follow_users(
  p_place text, p_at_most integer, out place text, out done integer
)
language sql set search_path = pg_catalog, pg_temp as $$
  select null, private.skip_failing(
    'select count(private.follow_user(u)) from unnest($1) as u',
    array(
      select s.key::uuid from private.skipped_rows as s
      where s.step = 'follow_user' order by s.last_at limit p_at_most
    )
  )
$$;

create or replace function private.trim_identities(
  p_place text, p_at_most integer, out place text, out done integer
)
language sql set search_path = pg_catalog, pg_temp as $$
  with forgotten as (
    delete from private.welcomed_identities as w
    where w.identity = any (array(
      select i.identity from private.welcomed_identities as i
      where i.welcomed_at <= now() - (select s.keep_identities from private.settings as s)
      order by i.welcomed_at limit p_at_most
    ))
    returning 1
  )
  select null, count(*)::integer from forgotten
$$;

create or replace function public.merge_user(
  from_user_id uuid, to_user_id uuid, allow_permanent boolean default false
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_from public.entitlements;
  v_bucket private.credit_buckets;
  v_rest integer;
  v_generations integer := 0;
  v_is_new boolean;
begin
  perform private.require_writable();
  if (from_user_id <> to_user_id) is not true then
    perform private.refuse_input('from_user_id, to_user_id: not two users');
  end if;
  perform from public.entitlements as e
  where e.user_id in (from_user_id, to_user_id) order by e.user_id for update;
  v_is_new := private.owner_of(from_user_id) = from_user_id;
  select * into v_from from public.entitlements as e where e.user_id = from_user_id;
  if not v_is_new and private.owner_of(from_user_id) <> private.owner_of(to_user_id) then
    perform private.refuse(
      'idempotency_conflict', 'from_user_id: was merged into another user', 'Nothing was changed.'
    );
  elsif not exists (
    select from public.entitlements as e where e.user_id = private.owner_of(to_user_id)
  ) or (v_is_new and v_from.user_id is null) then
    perform private.refuse_missing(
      'from_user_id, to_user_id: no such user', 'Use the ids of auth.users.'
    );
  elsif v_is_new then
    if private.owner_of(to_user_id) <> to_user_id then
      perform private.refuse_input('to_user_id: was merged into another user');
    elsif not v_from.is_guest and allow_permanent is not true then
      perform private.refuse_input(
        'from_user_id: no guest', 'Pass allow_permanent if that account is to end.'
      );
    elsif exists (select from private.live_jobs as j where j.user_id = from_user_id) then
      perform private.refuse(
        'not_finished', 'from_user_id: jobs are queued or running',
        'Wait for their end, or cancel them first.'
      );
    end if;
    insert into private.merged_users (user_id, into_id) values (from_user_id, to_user_id);
    update private.merged_users as m set into_id = to_user_id where m.into_id = from_user_id;
    perform private.end_credits(array[from_user_id]);
    for v_bucket in
      select * from private.credit_buckets as b where b.user_id = from_user_id order by b.id
    loop
      if v_bucket.credits > 0 then
        perform private.book(from_user_id, 'adjust', -v_bucket.credits, v_bucket.id);
      end if;
      update private.credit_buckets set user_id = to_user_id where id = v_bucket.id;
      if v_bucket.credits > 0 then
        perform private.book(
          to_user_id, 'adjust', v_bucket.credits, v_bucket.id,
          p_external_id => format('merge:%s:%s', from_user_id, v_bucket.id)
        );
      end if;
    end loop;
    select e.credits - e.debt into v_rest
    from public.entitlements as e where e.user_id = from_user_id;
    if v_rest <> 0 then
      perform private.move_credits(from_user_id, 'adjust', -v_rest, 'merge:' || from_user_id);
      perform private.move_credits(
        to_user_id, 'adjust', v_rest, format('merge:%s:rest', from_user_id)
      );
    end if;
    update private.billing_customers as c set user_id = to_user_id where c.user_id = from_user_id;
    update private.billing_purchases as p set user_id = to_user_id where p.user_id = from_user_id;
    -- What set_paid said is one row of each user.
    with said as (
      delete from private.billing_subscriptions as b
      where b.subscription = from_user_id::text and b.provider = 'set_paid' returning b.*
    )
    insert into private.billing_subscriptions as b (
      provider, subscription, user_id, owned_since, paid_until, happened_at
    )
    select 'set_paid', to_user_id::text, to_user_id, s.owned_since, s.paid_until, s.happened_at
    from said as s
    on conflict (subscription, provider) do update set
      paid_until = greatest(b.paid_until, excluded.paid_until),
      happened_at = greatest(b.happened_at, excluded.happened_at);
    update private.billing_subscriptions as b set user_id = to_user_id
    where b.user_id = from_user_id;
    update private.billing_events as b set user_id = to_user_id where b.user_id = from_user_id;
    perform private.refresh_plan(u.id) from unnest(array[from_user_id, to_user_id]) as u (id);
    update public.entitlements as e set blocked_until = 'infinity' where e.user_id = from_user_id;
    -- A key that both have used is that of the one who stays.
    update public.batches as b set user_id = to_user_id, idempotency_key = case
      when not exists (
        select from public.batches as o
        where o.user_id = to_user_id and o.idempotency_key = b.idempotency_key
      ) then b.idempotency_key
    end
    where b.user_id = from_user_id;
    update public.generations as g set user_id = to_user_id, idempotency_key = case
      when not exists (
        select from public.generations as o
        where o.user_id = to_user_id and o.idempotency_key = g.idempotency_key
      ) then g.idempotency_key
    end
    where g.user_id = from_user_id;
    get diagnostics v_generations = row_count;
    update public.images as i
    set user_id = to_user_id, merged_from = coalesce(i.merged_from, from_user_id)
    where i.user_id = from_user_id;
  end if;
  return (
    select json_build_object(
      'user_id', e.user_id, 'generations', v_generations, 'applied', v_is_new,
      'credits', private.spendable_credits(e)
    )
    from public.entitlements as e where e.user_id = private.owner_of(to_user_id)
  );
end;
$$;

comment on function public.merge_user is
  'Makes a guest part of another user, with credits, history and files, once. The guest is blocked '
  'from then on and may be deleted; what is granted to it goes to the other. allow_permanent says '
  'that the one who is merged may be no guest. Answers {user_id (who has all of it), '
  'generations (moved now), credits, applied}. Errors: PT400 invalid_input, PT404 not_found, PT409 '
  'not_finished (the guest''s jobs are queued or running: ask again later) | idempotency_conflict '
  '(was merged into another).';

create or replace function private.read_stripe(p_event jsonb) returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_type text := p_event ->> 'type';
  v_at timestamptz := to_timestamp((p_event ->> 'created')::bigint);
  v_of jsonb := p_event #> '{data,object}';
  v_said jsonb := jsonb_build_object(
    'id', p_event -> 'id', 'type', v_type, 'happened_at', v_at,
    'is_test', p_event -> 'livemode' = 'false'
  );
begin
  if v_type not in (
    'invoice.paid', 'invoice.payment_succeeded', 'invoice_payment.paid', 'charge.refunded',
    'checkout.session.completed', 'checkout.session.async_payment_succeeded'
  ) and v_type !~ '^(charge\.dispute|customer\.subscription)\.(cre|upd|del|clos|funds|paus|resum)' then
    return v_said;
  end if;
  v_said := v_said || jsonb_build_object('users', jsonb_build_array(
    v_of #> '{metadata,user_id}', v_of -> 'client_reference_id',
    v_of #> '{parent,subscription_details,metadata,user_id}',
    v_of #> '{subscription_details,metadata,user_id}', v_of #> '{lines,data,0,metadata,user_id}',
    v_of -> 'customer'
  ));
  if v_type like 'invoice.%' then
    return v_said || jsonb_build_object(
      'amount', v_of -> 'amount_paid',
      'payments', jsonb_build_array(
        v_of -> 'id', v_of -> 'payment_intent', v_of -> 'charge',
        v_of #> '{payments,data,0,payment,payment_intent}'
      ),
      'sales', (
        select jsonb_agg(jsonb_build_object(
          'purchase', coalesce(
            s.subscription || ':' || (p.price ->> 'price') || ':' || (l.line #>> '{period,start}'),
            (v_of ->> 'id') || ':' || (l.line ->> 'id')
          ),
          'products', jsonb_build_array(p.price -> 'price', p.price -> 'product'),
          'quantity', l.line -> 'quantity',
          'subscription', s.subscription,
          'starts_at', case when s.subscription is not null
            then to_timestamp((l.line #>> '{period,start}')::bigint) end,
          'ends_at', case when s.subscription is not null
            then to_timestamp((l.line #>> '{period,end}')::bigint) end,
          'is_trial', s.subscription is not null and l.line -> 'amount' = '0'
            and v_of ->> 'billing_reason' is distinct from 'subscription_cycle',
          'is_change', p.item -> 'proration' = 'true'
            or v_of ->> 'billing_reason' = 'subscription_update'
        ))
        from jsonb_array_elements(v_of #> '{lines,data}') as l (line)
        cross join lateral (
          select
            coalesce(
              nullif(l.line #> '{parent,subscription_item_details}', 'null'),
              nullif(l.line #> '{parent,invoice_item_details}', 'null'), l.line
            ) as item,
            coalesce(
              l.line #> '{pricing,price_details}', jsonb_build_object(
                'price', l.line #> '{price,id}', 'product', l.line #> '{price,product}'
              )
            ) as price
        ) as p
        cross join lateral (
          select case
            when p.item -> 'proration' = 'true' or l.line ->> 'type' = 'subscription'
              or l.line #>> '{parent,type}' = 'subscription_item_details'
              then p.item ->> 'subscription'
          end as subscription
        ) as s
        where (l.line ->> 'amount')::bigint >= 0
      )
    );
  elsif v_type = 'invoice_payment.paid' then
    return v_said || jsonb_build_object('payments', jsonb_build_array(
      v_of -> 'invoice', v_of #> '{payment,payment_intent}', v_of #> '{payment,charge}'
    ));
  elsif v_type like 'checkout.%' then
    return v_said || case
      when v_of ->> 'mode' = 'payment' and v_of ->> 'payment_status' <> 'unpaid'
        and v_of ->> 'invoice' is null then jsonb_build_object(
          'amount', v_of -> 'amount_total',
          'payments', jsonb_build_array(v_of -> 'id', v_of -> 'payment_intent'),
          'sales', jsonb_build_array(jsonb_build_object(
            'purchase', v_of -> 'id', 'quantity', 1,
            'products', jsonb_build_array(v_of #> '{metadata,product}', v_of -> 'payment_link')
          ))
        )
      else '{}'
    end;
  elsif v_type = 'charge.refunded' then
    return v_said || jsonb_build_object(
      'payments', jsonb_build_array(v_of -> 'id', v_of -> 'payment_intent', v_of -> 'invoice'),
      'taken', jsonb_build_object(
        'cause', 'refund', 'amount', v_of -> 'amount_refunded', 'paid', v_of -> 'amount'
      )
    );
  elsif v_type like 'charge.dispute.%' then
    -- No money is gone while the bank only asks (warning_…), nor once the dispute is won.
    return v_said || jsonb_build_object(
      'payments', jsonb_build_array(v_of -> 'charge', v_of -> 'payment_intent'),
      'taken', jsonb_build_object('cause', v_of -> 'id', 'amount', case
        when v_of ->> 'status' ~ '^(won|prevented|charge_refunded|warning_)' then '0'
        else v_of -> 'amount'
      end)
    );
  elsif v_of ->> 'status' = 'incomplete' then
    return v_said;
  end if;
  return v_said || jsonb_build_object('plans', (
    select jsonb_agg(jsonb_build_object(
      'subscription', v_of -> 'id',
      'products', jsonb_build_array(i.item #> '{price,id}', i.item #> '{price,product}'),
      'paid_until', case
        when v_of ->> 'status' in ('active', 'trialing') then to_timestamp(
          coalesce(i.item ->> 'current_period_end', v_of ->> 'current_period_end')::bigint
        )
        when v_of ->> 'status' = 'past_due' then to_timestamp(
          coalesce(i.item ->> 'current_period_start', v_of ->> 'current_period_start')::bigint
        )
        else coalesce(to_timestamp((v_of ->> 'ended_at')::bigint), v_at)
      end,
      'is_end', v_of ->> 'status' not in ('active', 'trialing', 'past_due')
    ))
    from jsonb_array_elements(v_of #> '{items,data}') as i (item)
  ));
end;
$$;

create or replace function private.read_revenuecat(p_event jsonb) returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_of jsonb := coalesce(p_event -> 'event', p_event);
  v_type text := v_of ->> 'type';
  v_products jsonb := jsonb_build_array(
    v_of -> 'product_id', split_part(v_of ->> 'product_id', ':', 1)
  );
  v_subscription text := coalesce(v_of ->> 'original_transaction_id', v_of ->> 'transaction_id');
  v_ends_at timestamptz := to_timestamp((v_of ->> 'expiration_at_ms')::bigint / 1000.0);
  v_said jsonb := jsonb_build_object(
    'id', v_of -> 'id', 'type', v_type, 'is_test', v_of ->> 'environment' = 'SANDBOX',
    'happened_at', to_timestamp((v_of ->> 'event_timestamp_ms')::bigint / 1000.0)
  );
begin
  if v_type = 'TRANSFER' then
    return v_said || jsonb_build_object(
      'users', v_of -> 'transferred_to', 'moved_from', v_of -> 'transferred_from'
    );
  elsif v_type not in (
    'INITIAL_PURCHASE', 'RENEWAL', 'NON_RENEWING_PURCHASE', 'CANCELLATION', 'UNCANCELLATION',
    'EXPIRATION', 'BILLING_ISSUE', 'SUBSCRIPTION_EXTENDED', 'TEMPORARY_ENTITLEMENT_GRANT',
    'REFUND_REVERSED'
  ) then
    return v_said;
  end if;
  v_said := v_said || jsonb_build_object(
    'users', jsonb_build_array(v_of -> 'app_user_id', v_of -> 'original_app_user_id')
      || jsonb_path_query_array(v_of, '$.aliases[0 to 99]'),
    'payments', jsonb_build_array(v_of -> 'transaction_id')
  );
  if v_type in ('INITIAL_PURCHASE', 'RENEWAL', 'NON_RENEWING_PURCHASE') then
    return v_said || jsonb_build_object('sales', jsonb_build_array(jsonb_build_object(
      'purchase', case
        when v_type = 'NON_RENEWING_PURCHASE' then v_of ->> 'transaction_id'
        else concat_ws(':', v_subscription, v_of ->> 'product_id', v_of ->> 'purchased_at_ms')
      end,
      'products', v_products,
      'quantity', 1,
      'subscription', case when v_type <> 'NON_RENEWING_PURCHASE' then v_subscription end,
      'starts_at', to_timestamp((v_of ->> 'purchased_at_ms')::bigint / 1000.0),
      'ends_at', v_ends_at,
      'is_trial', v_of ->> 'period_type' = 'TRIAL' or v_of -> 'is_family_share' = 'true'
    )));
  elsif v_type = 'REFUND_REVERSED' or v_of ->> 'cancel_reason' = 'CUSTOMER_SUPPORT' then
    v_said := v_said || jsonb_build_object('taken', jsonb_build_object(
      'cause', 'refund', 'amount', (v_type <> 'REFUND_REVERSED')::integer, 'paid', 1
    ));
  else
    v_said := v_said - 'payments';
  end if;
  return v_said || case when v_ends_at is null then '{}' else jsonb_build_object(
    'plans', jsonb_build_array(jsonb_build_object(
      'subscription', coalesce(v_subscription, 'temporary:' || (v_of ->> 'app_user_id')),
      'products', v_products,
      'paid_until', greatest(
        v_ends_at, to_timestamp((v_of ->> 'grace_period_expiration_at_ms')::bigint / 1000.0)
      ),
      'is_end', v_type = 'EXPIRATION' or v_said ? 'taken'
    ))
  ) end;
end;
$$;

create or replace function private.accept(
  p_gate private.gate, p_name text, p_params jsonb, p_prompts text[], p_inputs jsonb[],
  p_idempotency_key text default null, p_batch_id uuid default null, p_retry_of uuid default null,
  p_is_free boolean default false, p_max_price integer default null
) returns json
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_model public.models := p_gate.model;
  v_jobs integer := cardinality(p_inputs);
  v_images numeric := case jsonb_typeof(p_inputs[1] -> v_model.image_count_input)
    when 'number' then (p_inputs[1] -> v_model.image_count_input)::numeric  -- the same in each
    when 'string' then coalesce(
      substring(p_inputs[1] ->> v_model.image_count_input from '^\d{1,4}$')::numeric,
      v_model.max_images
    )
    else v_model.max_images
  end;
  v_price bigint := v_images * case
    when p_is_free then 0
    when p_gate.plan = 'paid' then v_model.paid_price_credits
    else v_model.price_credits
  end;
  v_clock bigint := coalesce(pg_sequence_last_value('private.virtual_clock'), 0);
  v_us bigint := date_part('epoch', clock_timestamp()) * 1000000;
  v_ids uuid[];
  v_is_anybody_asleep boolean;
begin
  if p_gate.may_be_over_limits and not p_is_free then
    perform private.refuse_limits(p_gate.user_id, v_model.provider);
  end if;
  with queue as (
    select
      greatest(v_clock, case when live.jobs > 0 then p_gate.last_fair_key end) as base,
      greatest(v_model.price_credits * v_images, 1)::bigint * 1000 / p_gate.weight as step
    from (
      select count(*) as jobs from (
        select from private.live_jobs as j
        where j.user_id = p_gate.user_id limit p_gate.max_active
      ) as counted
    ) as live
    where v_images between 1 and v_model.max_images and v_price * v_jobs <= p_gate.credits
      and v_price <= p_max_price is not false
      and (p_is_free or live.jobs < p_gate.max_active)
  ),
  jobs as materialized (
    select
      encode(
        int8send(
          (v_us + j.place) / 1000 * 65536 + 28672 + (v_us + j.place) % 1000 * 4096 / 1000
        ) || substring(uuid_send(gen_random_uuid()) from 9),
        'hex'
      )::uuid as id,
      j.prompt, j.input, j.place, q.base + q.step * j.place as fair_key
    from queue as q
    cross join unnest(p_prompts, p_inputs) with ordinality as j (prompt, input, place)
  ),
  charged as (
    update public.entitlements as e set
      credits = e.credits - v_price * v_jobs,
      last_fair_key = q.base + q.step * v_jobs,
      minute_started_at = case
        when e.minute_started_at > now() - interval '1 minute' then e.minute_started_at else now()
      end,
      minute_jobs = v_jobs + case
        when e.minute_started_at > now() - interval '1 minute' then e.minute_jobs else 0
      end,
      day_started_at = case
        when e.day_started_at > now() - interval '1 day' then e.day_started_at else now()
      end,
      day_jobs = v_jobs + case
        when e.day_started_at > now() - interval '1 day' then e.day_jobs else 0
      end,
      day_burned = case
        when e.day_started_at > now() - interval '1 day' then e.day_burned else 0
      end
    from queue as q
    where e.user_id = p_gate.user_id
  ),
  booked as (
    insert into public.credit_ledger (user_id, generation_id, kind, amount, balance_after)
    select p_gate.user_id, j.id, 'charge', -v_price, p_gate.credits - v_price * j.place
    from jobs as j
    where p_gate.credits_end_at is null or v_price = 0
  ),
  made as (
    insert into public.generations (
      id, user_id, model_id, alias_id, batch_id, retry_of, prompt, input, provider_input,
      price_credits, image_count, queue_distance, idempotency_key
    )
    select
      j.id, p_gate.user_id, v_model.id, nullif(p_name, v_model.id), p_batch_id,
      p_retry_of, j.prompt, p_params, j.input, v_price, v_images, j.fair_key - v_clock,
      p_idempotency_key
    from jobs as j
  ),
  queued as (
    insert into private.ready_jobs (job_id, user_id, model_id, fair_key)
    select j.id, p_gate.user_id, v_model.id, j.fair_key from jobs as j
  )
  select
    array(select j.id from jobs as j), exists (select from private.workers as w where w.asleep)
  into v_ids, v_is_anybody_asleep;
  if v_ids = '{}' then
    if not p_is_free then
      perform private.refuse_limits(p_gate.user_id, v_model.provider);
    end if;
    if v_images not between 1 and v_model.max_images then
      perform private.refuse_input(format(
        'params.%s: not between 1 and %s', v_model.image_count_input, v_model.max_images
      ));
    end if;
    if v_price > p_max_price then
      perform private.refuse(
        'price_changed', format('the price is %s, seen was %s', v_price, p_max_price),
        'Read list_models() again and show the new price.'
      );
    end if;
    if v_price * v_jobs > p_gate.credits then
      perform private.refuse(
        'insufficient_credits', format('need %s, have %s', v_price * v_jobs, p_gate.credits),
        'Buy credits or choose a cheaper model.'
      );
    end if;
    -- One of those counted has ended since.
    perform private.refuse(
      'too_many_active',
      format('%s jobs were queued or running, the plan''s limit', p_gate.max_active),
      p_retry_after => 1
    );
  end if;
  if p_gate.credits_end_at is not null and v_price > 0 then
    perform private.charge_buckets(p_gate.user_id, p_gate.credits, v_ids, v_price);
  end if;
  if coalesce(p_batch_id, p_retry_of) is not null then
    update public.batches set job_ids = v_ids where id = p_batch_id;
    insert into private.retries (retry_of, generation_id)
    select p_retry_of, v_ids[1] where p_retry_of is not null;
  end if;
  if p_params ?| v_model.image_inputs then
    insert into private.sources (source_id, generation_id)
    select distinct private.path_id(v.path #>> '{}', 3), j.id
    from unnest(v_ids) as j (id)
    cross join unnest(v_model.image_inputs) as i (name)
    cross join jsonb_path_query(
      p_params -> i.name, 'lax $[*] ? (@ starts with "generations/")'
    ) as v (path);
  end if;
  -- Whoever gives to many wakes at the end, when no other user's row is waited for.
  if v_is_anybody_asleep and not p_is_free then
    perform private.wake_workers(v_jobs, array(
      select w.provider from private.routes as w where w.model_id = v_model.id order by w.place
    ));
  end if;
  return json_build_object(
    'job_id', v_ids[1],
    'status', 'queued',
    'reused', false,
    'credits_left', p_gate.credits - v_price * v_jobs,
    'queue_position', null,
    'eta_seconds', null,
    'poll_after_ms', 1000,
    'size', case
      when p_params ?| '{aspect_ratio,width,height}' and not p_inputs[1] @> p_params
        then private.size_sent(p_inputs[1])
    end
  );
end;
$$;

create or replace function private.enqueue_generation(
  p_model text, p_prompt text, p_params jsonb, p_idempotency_key text,
  p_max_price_credits integer
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
declare
  v_user_id uuid;
  v_prompts text[] := array[coalesce(p_prompt, '')];
  v_params jsonb := coalesce(p_params, '{}');
  v_gate private.gate;
  v_inputs jsonb[];
  v_known public.generations;
begin
  -- As caller_id() and require_writable() do, whose calls would cost more than all they do.
  begin
    v_user_id := coalesce(
      nullif(current_setting('request.jwt.claim.sub', true), ''),
      nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'
    )::uuid;
  exception when data_exception then
    null;
  end;
  if v_user_id is null or current_setting('transaction_read_only') <> 'off'
    or current_setting('default_transaction_read_only') <> 'off' then
    v_user_id := private.require_user_id(p_writes => true);
  end if;
  v_gate := private.gate(v_user_id, p_model);
  -- Sizes first, by what they take in memory. What is longer may still be right.
  if (
    jsonb_typeof(v_params) = 'object' and pg_column_size(v_params) < 500
    and octet_length(v_params::text) <= 1000 and octet_length(v_prompts[1]) <= 1000
    and octet_length(p_idempotency_key) between 1 and 200 is not false
  ) is not true then
    v_params := private.read_request(v_prompts, v_params, p_idempotency_key);
  end if;
  if p_idempotency_key is not null then
    select * into v_known from public.generations
    where user_id = v_user_id and idempotency_key = p_idempotency_key;
    if found and (coalesce(v_known.alias_id, v_known.model_id), v_known.prompt, v_known.input)
      is distinct from (p_model, v_prompts[1], v_params) then
      perform private.refuse(
        'idempotency_conflict', 'idempotency_key was used with another payload',
        'Use a new key for a new request.'
      );
    elsif v_known.deleted_at is not null then
      perform private.refuse_missing(
        'idempotency_key: its job was deleted',
        'restore_generation brings it back. Use a new key for a new request.'
      );
    elsif found then
      return private.known_answer(v_known, v_gate.credits);
    end if;
  end if;
  if v_gate.is_model_unclear then
    v_gate.model := private.require_model(v_gate, p_model);
  end if;
  v_inputs := private.provider_inputs(v_gate.model, v_user_id, v_params, v_prompts);
  if v_params @> '{"reuse": true}' then
    select * into v_known
    from (
      select * from public.generations where user_id = v_user_id order by id desc limit 200
    ) as g
    where g.input ? 'seed'
      and (g.model_id, g.provider_input, g.status) = ((v_gate.model).id, v_inputs[1], 'completed')
      and g.deleted_at is null and not g.input ?| (v_gate.model).image_inputs
      and g.image_count = (select count(*) from public.images as i where i.generation_id = g.id)
    order by g.id desc limit 1;
    if found then
      return private.known_answer(v_known, v_gate.credits, true);
    end if;
  end if;
  return private.accept(
    v_gate, p_model, v_params, v_prompts, v_inputs, p_idempotency_key,
    p_max_price => p_max_price_credits
  );
end;
$$;

create or replace function private.batch_json(p_batch public.batches) returns json
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_answer json;
begin
  select json_build_object(
    'batch_id', p_batch.id,
    'job_ids', coalesce(json_agg(g.id order by g.id), '[]'),
    'status', case when bool_or(g.finished_at is null) then 'active' else 'finished' end,
    'queued', count(*) filter (where g.status = 'queued'),
    'processing', count(*) filter (where g.status = 'processing'),
    'completed', count(*) filter (where g.status = 'completed'),
    'failed', count(*) filter (where g.status = 'failed'),
    'canceled', count(*) filter (where g.status = 'canceled'),
    'progress', coalesce(
      round(sum(case when g.finished_at is null then r.progress else 100 end) / count(*)), 0
    ),
    'credits_left', (
      select private.spendable_credits(e)
      from public.entitlements as e where e.user_id = p_batch.user_id
    ),
    'poll_after_ms', case when bool_or(g.finished_at is null)
      then private.poll_after_ms(p_batch.created_at)
    end,
    'created_at', p_batch.created_at
  ) into v_answer
  from unnest(p_batch.job_ids) as j (id)
  cross join lateral (
    select * from public.generations where id = j.id and deleted_at is null offset 0
  ) as g
  left join private.running_jobs as r on r.job_id = g.id
  having count(*) > 0;
  if v_answer is null then
    perform private.refuse_missing(
      'batch_id: its jobs were deleted',
      'restore_generation brings them back. Use a new key for a new request.'
    );
  end if;
  return v_answer;
end;
$$;

create or replace function private.enqueue_batch(
  p_model text, p_prompts text[], p_params jsonb, p_idempotency_key text,
  p_max_price_credits integer
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
declare
  v_user_id uuid := private.require_user_id(p_writes => true);
  v_prompts text[];
  v_params jsonb;
  v_gate private.gate;
  v_hash text;
  v_batch public.batches;
begin
  -- 100: the most that any plan may allow.
  if coalesce(cardinality(p_prompts) not between 1 and 100, true) or array_ndims(p_prompts) > 1 then
    perform private.refuse_input('prompts: not 1 to 100 texts');
  end if;
  v_prompts := array(select coalesce(p.prompt, '') from unnest(p_prompts) as p (prompt));
  v_params := private.read_request(v_prompts, p_params, p_idempotency_key, 'prompts[%1$s]');
  if v_params ? 'reuse' then
    perform private.refuse_input('params.reuse: not in a batch');
  end if;
  -- No model has a longer name, and JSON may be six times as long as the text it holds.
  v_hash := md5(jsonb_build_array(left(p_model, 200), p_prompts, v_params)::text);
  v_gate := private.gate(v_user_id, p_model);
  select * into v_batch from public.batches
  where user_id = v_user_id and idempotency_key = p_idempotency_key;
  if v_batch.request_hash <> v_hash then
    perform private.refuse(
      'idempotency_conflict', 'idempotency_key was used with another payload',
      'Use a new key for a new request.'
    );
  elsif v_batch.id is null then
    if cardinality(p_prompts) > v_gate.max_batch then
      perform private.refuse_input(format('prompts: not 1 to %s texts', v_gate.max_batch));
    elsif v_gate.is_model_unclear then
      v_gate.model := private.require_model(v_gate, p_model);
    end if;
    insert into public.batches (user_id, request_hash, idempotency_key)
    values (v_user_id, v_hash, p_idempotency_key)
    returning * into v_batch;
    perform private.accept(
      v_gate, p_model, v_params, v_prompts,
      private.provider_inputs(
        v_gate.model, v_user_id, v_params, v_prompts, 'prompts[%1$s]'
      ),
      p_batch_id => v_batch.id, p_max_price => p_max_price_credits
    );
    select * into v_batch from public.batches where id = v_batch.id;
  end if;
  return private.batch_json(v_batch);
end;
$$;

create or replace function private.retry_generation(
  p_job_id uuid, p_max_price_credits integer
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
declare
  v_user_id uuid := private.require_user_id(p_writes => true);
  v_old public.generations := private.require_generation(p_job_id, v_user_id);
  v_gate private.gate := private.gate(v_user_id, v_old.model_id);
  v_known public.generations;
begin
  if v_old.finished_at is null then
    perform private.refuse(
      'not_finished', format('the job is %s', v_old.status),
      'Wait for its end, or cancel it first.'
    );
  elsif v_old.status = 'completed' then
    perform private.refuse('already_finished', 'the job is completed', 'Enqueue a new one.');
  end if;
  select g.* into v_known
  from private.retries as r inner join public.generations as g on g.id = r.generation_id
  where r.retry_of = p_job_id and g.status not in ('failed', 'canceled') and g.deleted_at is null
  order by g.id limit 1;
  if found then
    return private.known_answer(v_known, v_gate.credits);
  end if;
  if v_gate.is_model_unclear then
    v_gate.model := private.require_model(v_gate, v_old.model_id);
  end if;
  return private.accept(
    v_gate, coalesce(v_old.alias_id, v_old.model_id), v_old.input, array[v_old.prompt],
    private.provider_inputs(v_gate.model, v_user_id, v_old.input, array[v_old.prompt]),
    p_retry_of => p_job_id, p_max_price => p_max_price_credits
  );
end;
$$;

create or replace function public.redrive_failed(
  code text, since timestamptz, at_most integer default 1000
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid;
  v_credits bigint;
  v_is_blocked boolean;
  v_wish record;
  v_redriven integer := 0;
  v_reason text;
  v_skipped jsonb := '{}'::jsonb;
begin
  perform private.require_writable();
  if not exists (select from private.error_codes as c where c.code = redrive_failed.code) then
    perform private.refuse_input('code: not a code of private.error_codes');
  elsif since is null or coalesce(at_most not between 1 and 10000, true) then
    perform private.refuse_input('since: missing, or at_most: not between 1 and 10000');
  end if;
  <<users>>
  for v_user_id in
    select distinct g.user_id from public.generations as g
    where g.status = 'failed' and g.error_code = redrive_failed.code and g.finished_at >= since
      and g.deleted_at is null
    order by g.user_id
  loop
    select private.spendable_credits(e), e.blocked_until > now() into v_credits, v_is_blocked
    from public.entitlements as e where e.user_id = v_user_id for update;
    v_credits := v_credits - (
      select coalesce(sum(w.price_credits), 0) from private.wishes_of(v_user_id) as w
      where w.given_at >= since
    );
    for v_wish in
      select g as last, w.price_credits as price
      from private.wishes_of(v_user_id) as w
      inner join public.generations as g on g.id = w.last_id
      where w.is_open and g.status = 'failed' and g.error_code = redrive_failed.code
        and g.finished_at >= since
      order by g.id
    loop
      exit users when v_redriven = at_most;
      begin
        v_reason := case when v_is_blocked then 'account_blocked' else 'insufficient_credits' end;
        if v_wish.price <= v_credits is not false and v_is_blocked is not true then
          perform private.redrive_generation(v_wish.last);
          v_reason := null;
        end if;
      exception
        -- One that fits no more must not stop all others.
        when others then
          v_reason := case when sqlstate like 'PT%' then sqlerrm else 'internal' end;
          if v_reason = 'internal' then
            raise warning 'redrive_failed: %: % %', (v_wish.last).id, sqlstate, sqlerrm
              using errcode = '01000';
          end if;
      end;
      if v_reason is null then
        v_redriven := v_redriven + 1;
        v_credits := v_credits - v_wish.price;
      else
        v_skipped := v_skipped
          || jsonb_build_object(v_reason, coalesce((v_skipped ->> v_reason)::integer, 0) + 1);
      end if;
    end loop;
  end loop;
  perform private.wake_workers(v_redriven);
  return json_strip_nulls(
    json_build_object('redriven', v_redriven, 'skipped', nullif(v_skipped, '{}'))
  );
end;
$$;

create or replace function private.jobs_json(p_ids uuid[], p_user_id uuid default null) returns json[]
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return (
    select array_agg(json_build_object(
      'job_id', j.id,
      'status', j.status,
      'stage', (j.running).stage,
      'progress', (j.running).progress,
      'attempt', case when j.finished_at is null then coalesce(
        (j.running).attempt,
        (select r.attempt from private.ready_jobs as r where r.job_id = j.id)
      ) end,
      'cancel_requested', coalesce((j.running).cancel_requested, false),
      'queue_position', (j.forecast).queue_position,
      'eta_seconds', (j.forecast).eta_seconds,
      'poll_after_ms', case when j.finished_at is null then
        private.poll_after_ms(j.created_at, (j.forecast).due_seconds) end,
      'model', j.model_id,
      'alias', j.alias_id,
      'batch_id', j.batch_id,
      'retry_of', j.retry_of,
      'idempotency_key', j.idempotency_key,
      'prompt', j.prompt,
      'params', j.input,
      'price_credits', j.price_credits,
      'refunded_credits', coalesce((
        select sum(l.amount - l.debt) from public.credit_ledger as l
        where l.generation_id = j.id and l.kind = 'refund'
      ), 0),
      'error', case when j.error_code is not null then
        json_build_object('code', j.error_code, 'message', j.error_message) end,
      'images', coalesce((
        select json_agg(json_build_object(
          'position', i.position, 'path', i.storage_path, 'preview_path', i.preview_path,
          'content_type', i.content_type,
          'width', i.width, 'height', i.height, 'bytes', i.bytes, 'blurhash', i.blurhash,
          'is_public', i.share_id is not null
        ) order by i.position)
        from public.images as i where i.generation_id = j.id
      ), '[]'),
      'is_favorite', j.is_favorite,
      'tags', j.tags,
      'created_at', j.created_at,
      'started_at', j.started_at,
      'finished_at', j.finished_at
    ) order by j.id desc)
    from (
      select
        g.*,
        case when g.finished_at is null then (
          select r from private.running_jobs as r where r.job_id = g.id
        ) end as running,
        case when g.finished_at is null then (
          select f from unnest(private.forecast_jobs(p_ids)) as f where f.job_id = g.id
        ) end as forecast
      -- Not any (p_ids), which would look into all partitions.
      from (select distinct unnest(p_ids) as id) as i
      cross join lateral (
        select h.* from public.generations as h where h.id = i.id offset 0
      ) as g
      where (p_user_id is null or (g.user_id = p_user_id and g.deleted_at is null))
      offset 0  -- else what is looked up once is looked up for each of its fields
    ) as j
  );
end;
$$;

create or replace function private.list_models() returns json
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select coalesce(json_agg(json_build_object(
    'id', m.id,
    'title', m.title,
    'price_credits', m.price_credits,
    'paid_price_credits', m.paid_price_credits,
    'requires_paid', m.requires_paid,
    'paused_until', greatest(
      private.paused_until(m, auth.uid()),
      case when (select count(*) > 0 from private.budgets)
        then private.budget_spent_until(m, auth.uid())
      end
    ),
    'max_images', m.max_images,
    'inputs', (
      select coalesce(json_object_agg(p.key, p.value order by p.key), '{}')
      from jsonb_each(m.input_schema -> 'properties') as p
      where p.key = any (m.client_inputs)
    ),
    'image_inputs', array(
      select i.name from unnest(m.image_inputs) as i (name) where i.name = any (m.client_inputs)
    )
  ) order by m.id), '[]')
  from public.models as m
  where m.is_active
$$;

create or replace function private.heartbeat(
  p_worker_id bigint, p_job_ids uuid[], p_tokens bigint[], p_progress smallint[],
  p_is_listening boolean default true
) returns table (job_id uuid, verdict text)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
begin
  update private.running_jobs as r set
    lease_until = now() + s.lease,
    progress = case
      when p_progress[array_position(p_tokens, r.token)] is null then r.progress
      else least(100, greatest(0, p_progress[array_position(p_tokens, r.token)]))
    end
  from private.settings as s
  where r.job_id = any (p_job_ids) and r.token = any (p_tokens);
  -- Last: a claim of the same worker, which holds jobs that others may wait for, waits for it.
  update private.workers set seen_at = now(), is_listening = p_is_listening
  where id = p_worker_id;
  -- A new look, for the first may have waited.
  return query
  select j.id, case
    when held.is_canceled is false then 'ok'
    -- Where even the generation is gone, no other worker stops what was bought.
    when held.is_canceled is null
      and exists (select from public.generations as g where g.id = j.id) then 'lost'
    else 'canceled'
  end
  from unnest(p_job_ids) with ordinality as j (id, place)
  cross join lateral (
    select (
      select r.cancel_requested from private.running_jobs as r
      where r.job_id = j.id and r.token = p_tokens[j.place]
    ) as is_canceled
  ) as held
  order by j.id, j.place;
end;
$$;

create or replace function private.pick_admitted_jobs(
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

create or replace function private.refund_due(
  p_status text, p_price integer, p_charged integer, p_stored integer, p_percent integer
) returns integer
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  return case p_status
    when 'completed' then p_price / p_charged * (p_charged - p_stored)
    else ceil(p_price::numeric * p_percent / 100)
  end;
end;
$$;

create or replace function private.end_jobs(
  p_jobs private.running_jobs[], p_status text, p_metrics jsonb[] default '{}',
  p_stored integer[] default '{}', p_code text default null, p_detail text default null
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_ids uuid[] := array(select j.job_id from unnest(p_jobs) as j);
  v_burned uuid[] := '{}'::uuid[];
  v_ended record;
  v_message text;
  v_percent integer;
begin
  if p_code is not null then
    select e.message, e.refund_percent into v_message, v_percent
    from private.error_codes as e where e.code = p_code;
  elsif p_status = 'canceled' then
    v_burned := array(
      select j.job_id from unnest(p_jobs) with ordinality as j
      where j.token is not null and p_metrics[j.ordinality]
        @@ '$.is_asked == false || $.is_billed == false' is not true
    );
    select s.running_cancel_refund_percent into v_percent from private.settings as s;
  end if;
  for v_ended in
    with ended as (
      update public.generations as g set
        status = p_status, finished_at = now(), updated_at = now(),
        error_code = case p_status when 'failed' then p_code end,
        error_message = case p_status when 'failed' then v_message end,
        refund_percent = case
          when p_code is not null or g.id = any (v_burned) then nullif(v_percent, 100)
        end
      where g.id = any (v_ids)
      returning
        g.id, g.user_id, g.price_credits, g.image_count, g.refund_percent,
        array_position(v_ids, g.id) as place
    )
    select e.*, p_stored[e.place] as stored from ended as e
    where p_stored[e.place] is distinct from e.image_count
    order by e.user_id
  loop
    if v_ended.stored not between 1 and v_ended.image_count then
      raise exception '% images stored, % charged', v_ended.stored, v_ended.image_count using
        errcode = 'invalid_parameter_value', detail = format('job %s', v_ended.id);
    end if;
    if v_ended.id = any (v_burned) then
      update public.entitlements set day_burned = day_burned + 1
      where user_id = v_ended.user_id;
    end if;
    perform private.refund_generation(v_ended.user_id, v_ended.id, private.refund_due(
      p_status, v_ended.price_credits, v_ended.image_count, v_ended.stored,
      coalesce(v_ended.refund_percent, 100)
    ));
  end loop;
  perform private.record_attempts(p_jobs, p_status, p_metrics, p_code, p_detail);
end;
$$;

create or replace function private.requeue_job(
  p_job private.running_jobs, p_outcome text, p_attempts_used integer, p_delay interval,
  p_resumes boolean, p_metrics jsonb default '{}', p_code text default null,
  p_detail text default null, p_route smallint default null
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  insert into private.ready_jobs (
    job_id, user_id, model_id, fair_key, attempt, run_at,
    provider_job_id, create_started_at, handles, sent_input, reserved_usd, route
  )
  select
    p_job.job_id, p_job.user_id, p_job.model_id, c.last_value, p_attempts_used,
    case when p_delay > interval '0' then now() + p_delay end,
    case when p_resumes then p_job.provider_job_id end,
    case when p_resumes then p_job.create_started_at end,
    case when p_resumes then p_job.handles end,
    case when p_resumes then p_job.sent_input end,
    case when p_resumes then p_job.reserved_usd end, coalesce(p_route, p_job.route)
  from private.virtual_clock as c;
  update public.generations set status = 'queued', updated_at = now() where id = p_job.job_id;
  perform private.record_attempts(array[p_job], p_outcome, array[p_metrics], p_code, p_detail);
end;
$$;

create or replace function private.wake_for(p_jobs private.running_jobs[]) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_model_id text;
  v_route smallint;
begin
  for v_model_id, v_route in
    select r.model_id, r.route from private.ready_jobs as r
    where r.job_id = any (array(select j.job_id from unnest(p_jobs) as j)) and r.run_at is null
  loop
    perform private.wake_workers(1, array(
      select w.provider from private.routes as w
      where w.model_id = v_model_id order by w.place <> v_route, w.place
    ));
  end loop;
end;
$$;

create or replace function private.complete_jobs(
  p_job_ids uuid[], p_tokens bigint[], p_images jsonb[], p_metrics jsonb[]
) returns table (token bigint, verdict text)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
declare
  v_jobs private.running_jobs[] := private.end_leases(p_job_ids, p_tokens);
  v_metrics jsonb[];
  v_stored integer[];
begin
  if cardinality(v_jobs) < cardinality(p_tokens) then
    return query select a.token, 'repeated' from private.attempts as a
    where a.generation_id = any (p_job_ids) and a.token = any (p_tokens)
      and a.outcome = 'completed';
  end if;
  with ended as (
    select j.*, array_position(p_tokens, j.token) as place
    from unnest(v_jobs) with ordinality as j
  ),
  written as (
    insert into public.images (
      generation_id, position, user_id, storage_path, preview_path, content_type,
      width, height, bytes, blurhash
    )
    select
      e.job_id, i.position, e.user_id, i.storage_path, i.preview_path, i.content_type,
      i.width, i.height, i.bytes, i.blurhash
    from ended as e
    cross join lateral jsonb_populate_recordset(null::public.images, p_images[e.place]) as i
  )
  select
    array_agg(p_metrics[e.place] order by e.ordinality),
    array_agg(coalesce(jsonb_array_length(p_images[e.place]), 0) order by e.ordinality)
  into v_metrics, v_stored
  from ended as e;
  perform private.end_jobs(v_jobs, 'completed', v_metrics, v_stored);
  perform private.book_costs(v_jobs);
  if exists (
    select from private.breakers as b where b.failures > 0 or b.times_opened > 0
  ) then
    perform private.note_successes(v_jobs);
  end if;
  return query select j.token, 'completed' from unnest(v_jobs) as j;
end;
$$;

create or replace function private.end_failed_attempt(
  p_job private.running_jobs, p_code text, p_detail text,
  p_retry_after_seconds double precision default null, p_metrics jsonb default '{}'
) returns text
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_error private.error_codes;
  v_settings private.settings;
  v_attempts_used integer;
  v_claims_before integer;
  v_route smallint := p_job.route;
  v_resumes boolean;
  v_detail text;
begin
  if p_job.cancel_requested then
    perform private.end_jobs(
      array[p_job], 'canceled', array[p_metrics], p_code => p_code, p_detail => p_detail
    );
    return 'canceled';
  end if;
  select * into strict v_settings from private.settings;
  -- A code that is not ours becomes internal; what came is kept in the detail.
  select * into strict v_error from private.error_codes
  where code in (p_code, 'internal') order by code = p_code desc limit 1;
  v_detail := concat_ws(': ', nullif(p_code, v_error.code), p_detail);
  v_attempts_used := p_job.attempt - case when v_error.uses_attempt then 0 else 1 end;
  v_resumes := v_error.resumes and not p_metrics @> '{"is_asked": false}';
  select count(*) into v_claims_before from private.attempts where generation_id = p_job.job_id;
  if v_attempts_used >= v_settings.max_attempts then
    select min(w.place) into v_route from private.model_routes as w
    where w.model_id = p_job.model_id and w.place > p_job.route;
    v_attempts_used := 0;
    v_resumes := false;
  end if;
  if v_error.pauses_model
    or v_error.is_retryable and v_route is not null
    and v_claims_before + 1 < v_settings.max_claims and exists (
      select from public.generations
      where id = p_job.job_id and created_at > now() - v_settings.give_up_after
    ) then
    perform private.requeue_job(
      p_job, 'retried', v_attempts_used,
      case
        when v_error.pauses_model or v_route <> p_job.route then '0'
        else private.retry_delay(v_claims_before, p_retry_after_seconds)
      end,
      v_resumes,
      -- What the next attempt resumes is paid once: it will be booked there.
      case when v_resumes then '{}' else p_metrics end, v_error.code, v_detail, v_route
    );
    return 'retried';
  end if;
  perform private.end_jobs(
    array[p_job], 'failed', array[p_metrics], p_code => v_error.code, p_detail => v_detail
  );
  return 'failed';
end;
$$;

create or replace function private.fail_jobs(
  p_job_ids uuid[], p_tokens bigint[], p_codes text[], p_details text[],
  p_retry_after_seconds double precision[], p_metrics jsonb[]
) returns table (token bigint, verdict text)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
declare
  v_jobs private.running_jobs[] := private.end_leases(p_job_ids, p_tokens);
  v_job private.running_jobs;
  v_at integer;
begin
  if cardinality(v_jobs) < cardinality(p_tokens) then
    return query select a.token, 'repeated' from private.attempts as a
    where a.generation_id = any (p_job_ids) and a.token = any (p_tokens)
      and a.outcome in ('retried', 'failed', 'canceled');
  end if;
  foreach v_job in array array(select j from unnest(v_jobs) as j order by j.user_id, j.job_id) loop
    v_at := array_position(p_tokens, v_job.token);
    token := v_job.token;
    verdict := private.end_failed_attempt(
      v_job, p_codes[v_at], p_details[v_at], p_retry_after_seconds[v_at],
      coalesce(p_metrics[v_at], '{}')
    );
    return next;
  end loop;
  perform private.book_costs(v_jobs);
  perform private.note_failures(v_jobs);
  perform private.wake_for(v_jobs);
end;
$$;

create or replace function private.release_job(
  p_job_id uuid, p_token bigint, p_resumes boolean default true
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_job private.running_jobs := private.end_lease(
    p_job_id, p_token, '{released,canceled,failed}'
  );
begin
  if v_job.cancel_requested then
    perform private.end_jobs(
      array[v_job], 'canceled',
      array[case when p_resumes then '{}'::jsonb else '{"is_asked": false}' end]
    );
  elsif exists (
    select from public.generations as g cross join private.settings as s
    where g.id = v_job.job_id and (
      select count(*) from private.attempts as a where a.generation_id = g.id
    ) >= case
      when g.created_at < now() - s.give_up_after then s.max_attempts
      else s.max_claims - 1
    end
  ) then
    perform private.end_jobs(array[v_job], 'failed', p_code => 'internal');
  elsif v_job.job_id is not null then
    perform private.requeue_job(
      v_job, 'released', v_job.attempt - 1, interval '0', p_resumes,
      case when p_resumes then '{}'::jsonb else '{"is_asked": false}' end
    );
  end if;
  perform private.book_costs(array[v_job]);
  perform private.wake_for(array[v_job]);
end;
$$;

create or replace function private.cancel_job(
  p_job_id uuid, p_token bigint, p_metrics jsonb default null
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_job private.running_jobs := private.end_lease(p_job_id, p_token, '{canceled}');
begin
  if v_job.cancel_requested then
    perform private.end_jobs(array[v_job], 'canceled', array[p_metrics]);
    perform private.book_costs(array[v_job]);
  elsif v_job.job_id is not null then
    raise exception 'nobody asked to cancel job %', p_job_id
      using errcode = 'invalid_parameter_value';
  end if;
end;
$$;

create or replace function private.cancel_jobs(p_user_id uuid, p_job_ids uuid[]) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_job_id uuid;
  v_worker_id bigint;
  v_job private.running_jobs;  -- without a lease
  v_taken private.running_jobs[] := array[]::private.running_jobs[];
begin
  foreach v_job_id in array array(select j.id from unnest(p_job_ids) as j (id) order by j.id) loop
    -- A job may go from ready to running, or back, between two looks.
    for v_look in 1 .. 5 loop
      delete from private.ready_jobs where job_id = v_job_id and user_id = p_user_id
      returning job_id, user_id, model_id, route, reserved_usd
      into v_job.job_id, v_job.user_id, v_job.model_id, v_job.route, v_job.reserved_usd;
      if found then
        v_taken := v_taken || v_job;
        exit;
      end if;
      update private.running_jobs set cancel_requested = true
      where job_id = v_job_id and user_id = p_user_id and not cancel_requested
      returning worker_id into v_worker_id;
      if found then
        perform pg_notify('darkroom_worker_' || v_worker_id, 'cancel');
        exit;
      end if;
    end loop;
  end loop;
  -- No attempt is under way. If an earlier one was billed, it was we who broke it off.
  perform private.end_jobs(v_taken, 'canceled');
  perform private.book_costs(v_taken);
end;
$$;

create or replace function private.refresh_queue_state() returns void
language sql set search_path = pg_catalog, pg_temp as $$
  with due as (
    select p.name from private.plans as p
    where p.looked_at < now() - interval '10 seconds' order by p.name for update skip locked
  )
  update private.plans set
    oldest_ready_at = (
      select min(r.queued_at) from private.ready_jobs as r
      where r.run_at is null and not r.model_id = any (array(
        select p.id from private.paused_models as p where p.paused_until is not null
        union all
        select u.id from private.unserved_models as u
      )) and not (
        (select count(*) > 0 from private.budgets as b where b.on_breach <> 'alert')
        and private.awaits_budget(r.model_id, r.route, r.user_id)
      )
    ),
    looked_at = now()
  where name in (select d.name from due as d)
$$;

create or replace function private.end_stale_jobs(p_ids uuid[]) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_id uuid;
  v_job private.running_jobs;
  v_jobs private.running_jobs[] := '{}'::private.running_jobs[];
begin
  foreach v_id in array p_ids loop
    delete from private.running_jobs where job_id = v_id returning * into strict v_job;
    -- The lease first: after an outage both have passed, and the result may be there to fetch.
    if v_job.lease_until < now() then
      perform private.end_failed_attempt(
        v_job, 'internal', format('lease of worker %s ran out', v_job.worker_id)
      );
    else
      perform private.end_failed_attempt(v_job, 'timeout', 'deadline passed');
    end if;
    v_jobs := v_jobs || v_job;
  end loop;
  perform private.book_costs(v_jobs);
  return cardinality(p_ids);
end;
$$;

create or replace function private.recover_stale_jobs(p_at_most integer default 100) returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms' as $$
declare
  v_began timestamptz := clock_timestamp();
  v_stale private.running_jobs[] := '{}'::private.running_jobs[];
  v_recovered integer;
begin
  -- Reads all of running_jobs, for an index on what each heartbeat changes would cost more.
  if private.is_due('private.recovery_due') then
    v_stale := array(
      select r from private.running_jobs as r
      where r.lease_until < now() or r.deadline_at < now()
      -- Those that were skipped before take no places of others.
      order by r.user_id limit p_at_most + (select count(*) from private.skipped_rows)
      for update skip locked
    );
    perform private.put_off('private.recovery_due', v_began);
  end if;
  v_recovered := private.skip_failing(
    'select private.end_stale_jobs($1)', array(select j.job_id from unnest(v_stale) as j)
  );
  perform private.skip_failing('select private.refresh_model_stats()', array['*']);
  perform private.skip_failing('select private.note_failures($1)', v_stale);
  perform private.wake_for(v_stale);
  perform private.refresh_queue_state();
  return v_recovered;
end;
$$;

comment on column private.expired_files.user_id is
  'After whom the folder is named; the user may be gone already.';

create or replace function private.list_expired_files(p_at_most integer default 100)
returns table (bucket text, path text)
language sql security definer set search_path = pg_catalog, pg_temp as $$
  with due as (
    select f.ctid, case
      when f.bucket = 'inputs' then (
        select private.file_changed_at(f.bucket, f.path) > f.marked_at
          or exists (select from private.live_jobs as j where j.user_id = e.user_id)
        from public.entitlements as e where e.user_id = private.owner_of(f.user_id)
      )
      when f.generation_id is null then private.is_output(f.path)
      else (
        select g.deleted_at is null or private.is_source(g.id)
        from public.generations as g where g.id = f.generation_id
      )
    end as is_needed
    from private.expired_files as f
    where f.try_at <= now() order by f.try_at limit p_at_most for update skip locked
  ),
  kept as (
    delete from private.expired_files as f
    where f.ctid = any (array(select d.ctid from due as d where d.is_needed))
  )
  update private.expired_files as f
  set try_at = now() + (select s.lease from private.settings as s)
  where f.ctid = any (array(select d.ctid from due as d where d.is_needed is not true))
  returning f.bucket, f.path
$$;

create or replace function private.lock_jobs(p_user_id uuid) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_id uuid;
  v_locked integer;
begin
  for v_look in 1 .. 20 loop
    v_locked := 0;
    for v_id in
      select j.job_id from private.live_jobs as j where j.user_id = p_user_id order by j.job_id
    loop
      while exists (select from private.live_jobs as j where j.job_id = v_id) loop
        perform from private.ready_jobs where job_id = v_id for update;
        if not found then
          perform from private.running_jobs where job_id = v_id for update;
        end if;
        if found then
          v_locked := v_locked + 1;
          exit;
        end if;
      end loop;
    end loop;
    begin
      perform from public.entitlements where user_id = p_user_id for update;
      exit when v_locked = (
        select count(*) from private.live_jobs as j where j.user_id = p_user_id
      );
      raise sqlstate 'DR003' using message = 'jobs_moved';
    exception when sqlstate 'DR003' then
      null;
    end;
  end loop;
end;
$$;

create or replace function private.lock_jobs_of_deleted_user() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform private.lock_jobs(old.id);
  return old;
end;
$$;

create or replace function private.erase_deleted_user() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_folders uuid[] := private.folders_of(old.user_id);
  v_files text[];
  v_job private.running_jobs;
  v_jobs private.running_jobs[] := '{}'::private.running_jobs[];
begin
  perform from public.generations where user_id = old.user_id order by id for update;
  v_files := array(
    select concat('generations/', f.path)
    from public.images as i
    cross join lateral (values (i.storage_path), (i.preview_path)) as f (path)
    where i.user_id = old.user_id and f.path is not null
    order by f.path
  );
  if to_regclass('storage.objects') is not null then
    -- From <id>/ up to <id>0, the next character: operators that the index of names serves.
    v_files := v_files || array(
      select concat(o.bucket_id, '/', o.name)
      from unnest(v_folders) as f (id)
      inner join storage.objects as o
        on o.name ~>=~ concat(f.id, '/') and o.name ~<~ concat(f.id, '0')
      where o.bucket_id in ('generations', 'inputs')
      order by o.name
    );
  end if;
  perform private.skip_failing('select private.mark_files($1)', v_files);
  for v_job in
    with ready as (delete from private.ready_jobs where user_id = old.user_id returning *),
    running as (delete from private.running_jobs where user_id = old.user_id returning *)
    select j.* from ready as r
    cross join lateral jsonb_populate_record(null::private.running_jobs, to_jsonb(r)) as j
    union all
    select r.* from running as r
  loop
    v_jobs := v_jobs || v_job;
    perform pg_notify('darkroom_worker_' || v_job.worker_id, 'cancel')
    where v_job.worker_id is not null;
  end loop;
  perform private.book_costs(v_jobs);
  delete from private.budgets where user_id = old.user_id;
  delete from public.generations where user_id = old.user_id;
  delete from public.batches where user_id = old.user_id;
  delete from private.credit_buckets where user_id = old.user_id;
  -- So that nothing is granted once more, what was paid for stays, without whom.
  delete from private.billing_customers where user_id = old.user_id;
  delete from private.billing_subscriptions where user_id = old.user_id;
  update private.billing_purchases set user_id = null where user_id = old.user_id;
  update private.billing_events
  set user_id = null, said = null, outcome = 'ignored', waits_for = null
  where user_id = old.user_id;
  perform private.erase_ledgers(v_folders);
  delete from private.merged_users where into_id = old.user_id;
  return null;
end;
$$;

create or replace function private.expire_generations(p_ids uuid[]) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_settings private.settings := (select s from private.settings as s);
  v_files integer;
  v_ids uuid[] := array(
    select g.id from public.generations as g
    where g.id = any (p_ids) and g.finished_at is not null and (
      g.deleted_at <= now() - v_settings.keep_deleted
      or g.finished_at <= now() - v_settings.keep_generations and not g.is_favorite
    ) and not private.is_source(g.id)
    order by g.id for update skip locked
  );
begin
  update public.generations set deleted_at = now()
  where id = any (v_ids) and deleted_at is null;
  insert into private.expired_files (bucket, path, user_id, generation_id)
  select 'generations', f.path, coalesce(i.merged_from, i.user_id), i.generation_id
  from public.images as i
  cross join lateral (values (i.storage_path), (i.preview_path)) as f (path)
  where i.generation_id = any (v_ids) and f.path is not null
  order by f.path
  on conflict (bucket, path) do nothing;
  get diagnostics v_files = row_count;
  return v_files + private.erase_generations(v_ids);
end;
$$;

create or replace function private.erase_ledgers(p_user_ids uuid[]) returns integer
language sql set search_path = pg_catalog, pg_temp as $$
  with erased as (
    delete from public.credit_ledger as l
    using private.settings as s
    where l.user_id = any (array(
        select u.id from unnest(p_user_ids) as u (id)
        where not exists (
          select from public.entitlements as e
          where e.user_id in (u.id, private.owner_of(u.id))
        )
      ))
      and l.created_at <= clock_timestamp() - s.keep_ledger_of_deleted_users
    returning l.id
  )
  select count(*)::integer from erased
$$;

create or replace function private.trim_ledger(
  p_place text, p_at_most integer, out place text, out done integer
)
language sql set search_path = pg_catalog, pg_temp as $$
  with recursive walk (user_id, step) as (
    select p_place::uuid, 0
    union all
    select (
      select l.user_id from public.credit_ledger as l
      where l.user_id > w.user_id order by l.user_id limit 1
    ), w.step + 1
    from walk as w where w.user_id is not null and w.step < p_at_most
  )
  select
    case when count(w.user_id) > p_at_most then max(w.user_id::text collate "C") end,
    private.skip_failing('select private.erase_ledgers($1)', array_agg(w.user_id))
  from walk as w
$$;

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

create view private.broken_books with (security_invoker = true) as
select
  'balance' as rule, e.user_id, null::uuid as generation_id,
  format('credits are %s, the ledger ends at %s', e.credits, coalesce(l.balance_after, 0)) as detail
from public.entitlements as e
-- Not c.user_id = e.user_id: the planner may then walk the ids of all users down to this one's.
left join lateral (
  select c.user_id, c.id, c.balance_after
  from public.credit_ledger as c
  where (c.user_id, c.id) <= (e.user_id, 9223372036854775807)
  order by c.user_id desc, c.id desc limit 1
) as l on e.user_id = l.user_id and e.ledger_after < l.id
where e.credits <> coalesce(l.balance_after, 0)
union all
select
  'ledger', l.user_id, l.generation_id,
  format('entry %s: %s and %s are not %s', l.id, l.balance_before, l.amount, l.balance_after)
from (
  select
    c.*, lag(c.balance_after, 1, 0) over (partition by c.user_id order by c.id) as balance_before
  from public.credit_ledger as c
  -- Of a user who is gone the oldest entries may be, too.
  inner join public.entitlements as e on c.user_id = e.user_id and c.id > e.ledger_after
) as l
-- As bigint: a sum that does not fit is wrong, too.
where l.balance_before::bigint + l.amount <> l.balance_after
union all
select
  'place', g.user_id, g.id,
  format('%s, and %s', g.status, case
    when ready.job_id is not null then 'ready'
    when running.job_id is not null then 'running'
    else 'neither ready nor running'
  end)
from public.generations as g
left join private.ready_jobs as ready on g.id = ready.job_id
left join private.running_jobs as running on g.id = running.job_id
where (g.status = 'queued', g.status = 'processing')
  <> (ready.job_id is not null, running.job_id is not null)
union all
select 'place', j.user_id, j.job_id, 'queued or running, and no generation of its user'
from private.live_jobs as j
left join public.generations as g on j.job_id = g.id and j.user_id = g.user_id
where g.id is null
union all
select
  'charge', g.user_id, g.id,
  format('the price is %s, charged were %s', g.price_credits, coalesce(-l.amount, 0))
from public.generations as g
left join (
  select c.generation_id, sum(c.amount) as amount
  from public.credit_ledger as c where c.kind = 'charge' group by c.generation_id
) as l on g.id = l.generation_id
where coalesce(-l.amount, 0) <> g.price_credits
union all
-- By the rule by which jobs end (75).
select
  'refund', g.user_id, g.id,
  format('%s at the price of %s, refunded were %s', g.status, g.price_credits, l.amount)
from public.generations as g
cross join lateral (
  select sum(k.amount - k.debt)::integer as amount from public.credit_ledger as k
  where k.generation_id = g.id and k.kind = 'refund'
) as l
where case
  when g.status in ('queued', 'processing') then l.amount is not null
  else coalesce(l.amount, 0) <> private.refund_due(
    g.status, g.price_credits, g.image_count,
    (select count(*) from public.images as i where i.generation_id = g.id)::integer,
    coalesce(g.refund_percent, 100)
  )
end
union all
select
  'debt', e.user_id, null,
  format(
    'the debt is %s beside %s credits, its entries say %s', e.debt, e.credits, coalesce(l.debt, 0)
  )
from public.entitlements as e
left join (
  select c.user_id, sum(c.debt) as debt
  from public.credit_ledger as c
  inner join public.entitlements as u on c.user_id = u.user_id and c.id > u.ledger_after
  where c.debt <> 0 group by c.user_id
) as l on e.user_id = l.user_id
where e.debt <> coalesce(l.debt, 0) or (e.debt > 0 and e.credits > 0)
union all
select
  'bucket', b.user_id, null,
  format('bucket %s has %s, its entries say %s', b.id, b.credits, coalesce(l.amount, 0))
from private.credit_buckets as b
left join (
  select c.bucket_id, sum(c.amount) as amount
  from public.credit_ledger as c where c.bucket_id is not null group by c.bucket_id
) as l on b.id = l.bucket_id
where b.credits <> coalesce(l.amount, 0)
union all
select
  'end', e.user_id, null,
  format('credits are %s and end at %s, in buckets are %s until %s',
    e.credits, e.credits_end_at, b.credits, b.ends_at)
from public.entitlements as e
cross join lateral (
  select coalesce(sum(k.credits), 0) as credits, min(k.expires_at) as ends_at
  from private.credit_buckets as k where k.user_id = e.user_id and k.credits > 0
) as b
where e.credits < b.credits or e.credits_end_at is distinct from b.ends_at;

comment on view private.broken_books is
  'Are the books right? One row for each broken rule: balance and ledger (each entry follows from '
  'the one before, the balance is the last), place (queued is ready, processing is running, and '
  'nothing else is), charge (the price, once), refund (what was charged but not made), debt and '
  'bucket (each the sum of its entries), end (no more is in buckets than there is, and nothing '
  'ends before credits_end_at).';

create or replace function private.recent_broken_books(
  p_at_most integer default 200
) returns setof private.broken_books
language plpgsql stable set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off as $$
declare
  v_ids uuid[] := array(select g.id from public.generations as g order by g.id desc limit p_at_most)
    || array(
      select a.generation_id from private.attempts as a
      where a.ended_at > now() - interval '15 minutes' order by a.ended_at desc limit p_at_most
    );
begin
  return query
  select b.* from private.broken_books as b
  where b.rule in ('balance', 'end') and b.user_id = any (array(
    select g.user_id from public.generations as g where g.id = any (v_ids)
  ))
  union all
  select b.* from private.broken_books as b
  where b.rule in ('place', 'refund') and b.generation_id = any (v_ids);
end;
$$;

create table private.exported_tables (
  name text primary key,
  owner text not null default 'user_id',
  left_out text[] not null default '{}'
);

comment on table private.exported_tables is
  'What export_user() answers: tables that have rows of users. An app may add its own.';

comment on column private.exported_tables.name is 'With its schema.';

comment on column private.exported_tables.owner is
  'The column that says whose a row is. generation_id: it is shown with the generation.';

comment on column private.exported_tables.left_out is
  'Columns that are not the user''s: providers'' words, costs, tokens of workers.';

create or replace function public.export_user(
  user_id uuid, after text[] default null, page_size integer default 500
) returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set jit = off as $$
declare
  v_with_each text;
  v_table record;
  v_found integer;
  v_rows jsonb;
  v_left integer := page_size;
  v_tables jsonb := '{}'::jsonb;
  v_files jsonb := '[]'::jsonb;
  v_next text[];
begin
  if coalesce(page_size not between 1 and 1000, true) then
    perform private.refuse_input('page_size: not between 1 and 1000');
  elsif after is not null and after[1] is distinct from 'storage.objects'
    and not exists (select from private.exported_tables as e where e.name = after[1]) then
    perform private.refuse_input('after: not what next_after was');
  end if;
  select string_agg(format(
    ' || jsonb_build_object(%L, array(select to_jsonb(c) - %L::text[] from %s as c'
    ' where c.generation_id = t.id))', split_part(e.name, '.', 2), e.left_out, e.name::regclass
  ), '') into v_with_each
  from private.exported_tables as e where e.owner = 'generation_id';
  for v_table in
    select e.*, key.names, key.columns, key.bounds
    from private.exported_tables as e
    cross join lateral (
      select
        array_agg(a.attname order by k.place) as names,
        string_agg(format('t.%I', a.attname), ', ' order by k.place) as columns,
        string_agg(
          format('$4[%s]::%s', k.place + 1, format_type(a.atttypid, null)), ', ' order by k.place
        ) as bounds
      from pg_index as i
      cross join unnest(i.indkey::smallint[]) with ordinality as k (attnum, place)
      inner join pg_attribute as a on a.attrelid = i.indrelid and a.attnum = k.attnum
      where i.indrelid = e.name::regclass and i.indisprimary
    ) as key
    where e.owner <> 'generation_id' and (after is null or e.name >= after[1])
    order by e.name
  loop
    exit when v_left = 0 or after[1] = 'storage.objects';
    begin
      execute format(
        'select count(*), jsonb_agg(r.row) from (select to_jsonb(t) - $1 %s as row from %s as t'
        ' where t.%I = $2 %s order by %s limit $3) as r',
        case when v_table.name = 'public.generations' then v_with_each end,
        v_table.name::regclass, v_table.owner,
        case when v_table.name = after[1] then
          format('and (%s) > (%s)', v_table.columns, v_table.bounds)
        end,
        v_table.columns
      ) into v_found, v_rows using v_table.left_out, user_id, v_left, after;
    exception when data_exception then
      perform private.refuse_input('after: not what next_after was');
    end;
    continue when v_found = 0;
    v_tables := v_tables || jsonb_build_object(split_part(v_table.name, '.', 2), v_rows);
    v_left := v_left - v_found;
    v_next := v_table.name || array(
      select v_rows -> -1 ->> n.name from unnest(v_table.names) with ordinality as n (name, place)
      order by n.place
    );
  end loop;
  -- In the order of the index that serves prefixes; one name may be in both buckets.
  if v_left > 0 and to_regclass('storage.objects') is not null then
    select
      count(*),
      coalesce(jsonb_agg(
        jsonb_build_object('bucket', o.bucket_id, 'path', o.name)
        order by o.name collate "C", o.bucket_id
      ), '[]'),
      array['storage.objects', max(o.name collate "C")]
    into v_found, v_files, v_next
    from (
      select each.bucket_id, each.name
      -- The folders of guests who became this user, too.
      from unnest(user_id || array(
        select m.user_id from private.merged_users as m where m.into_id = export_user.user_id
      )) as folder (id)
      cross join lateral (
        select f.bucket_id, f.name from storage.objects as f
        where f.name ~>~ greatest(
          concat(folder.id, '/'), case after[1] when 'storage.objects' then after[2] end
        ) and f.name ~<~ concat(folder.id, '0') and f.bucket_id in ('generations', 'inputs')
        order by f.name using ~<~ fetch first v_left rows with ties
      ) as each
      order by each.name using ~<~ fetch first v_left rows with ties
    ) as o;
    v_left := v_left - v_found;
  end if;
  if after is null and v_tables = '{}' and v_files = '[]' then
    perform private.refuse_missing('user_id: no such user', 'Use the id of auth.users.');
  end if;
  return json_build_object(
    'user_id', user_id,
    'entitlement', private.entitlement_json(user_id),
    'tables', v_tables,
    'files', v_files,
    'next_after', case when v_left <= 0 then v_next end
  );
end;
$$;

comment on function public.export_user is
  'All that is known of a user, page by page: {user_id, entitlement (as get_entitlement shows it), '
  'tables {name: rows, oldest first; generations with their images and attempts}, files [{bucket, '
  'path}: to be fetched from Storage], next_after}. Call again with after = next_after, until it '
  'is null; a page has at most page_size (1 to 1000) rows and files. What auth.users holds is not '
  'in it. Books and files of each of merged_users are told under its own id: call it for them, '
  'too. Errors: PT400 invalid_input, PT404 not_found.';

create view private.queue_by_model with (security_invoker = true) as
select
  n.model_id, m.provider,
  coalesce(case when not p.is_paused then q.waiting - q.held - q.delayed end, 0) as ready,
  coalesce(case when not p.is_paused then q.delayed end, 0) as delayed,
  coalesce(case when p.is_paused then q.waiting else q.held end, 0) as paused,
  coalesce(r.running, 0) as running,
  case when not p.is_paused and q.waiting - q.held > q.delayed
    then extract(epoch from now() - q.ready_since)
  end as oldest_ready_seconds
from (
  select
    j.model_id, count(*) as waiting, count(*) filter (where b.is_held) as held,
    count(*) filter (where j.run_at > now() and not b.is_held) as delayed,
    min(coalesce(j.run_at, j.queued_at)) filter (where not b.is_held) as ready_since
  from private.ready_jobs as j
  cross join lateral (
    select
      (select count(*) > 0 from private.budgets as o where o.on_breach <> 'alert')
      and private.awaits_budget(j.model_id, j.route, j.user_id) as is_held
  ) as b
  group by j.model_id
) as q
full outer join (
  select j.model_id, count(*) as running from private.running_jobs as j group by j.model_id
) as r on q.model_id = r.model_id
cross join lateral (select coalesce(q.model_id, r.model_id) as model_id) as n
left join public.models as m on n.model_id = m.id
cross join lateral (
  select count(*) > 0 as is_paused
  from private.paused_models as x where x.id = n.model_id and x.paused_until > now()
) as p
order by n.model_id;

comment on view private.queue_by_model is
  'How many jobs of each model wait or run? ready (may be claimed now), delayed (a retry that is '
  'put off), paused (or waiting for a budget), running; oldest_ready_seconds: since the first of '
  'the ready may be claimed.';

create or replace function private.alert_states(h jsonb) returns table (
  alert text, severity text, is_raised boolean, value numeric, threshold numeric, detail text,
  hint text
)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select
    rule.alert, rule.severity,
    coalesce(m.value::numeric > rule.threshold and (m.cases >= rule.min_cases) is not false, false),
    m.value::numeric, rule.threshold, m.detail, rule.hint
  from private.alert_rules as rule
  cross join jsonb_to_record(h) as x (
    depth jsonb, running jsonb, rates jsonb, workers jsonb, routines jsonb, paused jsonb,
    unserved jsonb, vacuum jsonb, outbox jsonb, books jsonb, skipped jsonb, budgets jsonb
  )
  cross join lateral (
    select (x.workers ->> 'alive')::integer as alive, (x.workers ->> 'listening')::integer as listen
  ) as w
  left join lateral (
    select s.* from jsonb_each(x.routines) as s
    order by (s.value ->> 'runs_missed')::numeric desc nulls last limit 1
  ) as r on true
  left join lateral (values
    ('depth', x.depth ->> 'ready', null::bigint, (x.depth ->> 'ready') || ' jobs are ready'),
    ('oldest_age', x.depth ->> 'oldest_ready_seconds', null,
      format('a job has waited for %s s', round((x.depth ->> 'oldest_ready_seconds')::numeric))),
    ('error_rate', x.rates ->> 'error_rate', (x.rates ->> 'attempts_of_15_minutes')::bigint,
      format('of %s attempts in 15 minutes, %s %% ended in an error',
        x.rates ->> 'attempts_of_15_minutes', round(100 * (x.rates ->> 'error_rate')::numeric))),
    ('burned', x.rates ->> 'burned_of_15_minutes', null,
      format('%s running jobs canceled in 15 minutes, by %s users: the provider may bill them',
        x.rates ->> 'burned_of_15_minutes', x.rates ->> 'burned_by_users')),
    ('stuck', x.running ->> 'stale_seconds', null,
      format('%s running jobs are past lease or deadline, one for %s s',
        x.running ->> 'stale', round((x.running ->> 'stale_seconds')::numeric))),
    ('no_worker', case when w.alive = 0 then x.depth ->> 'ready' end, null,
      (x.depth ->> 'ready') || ' jobs are ready and no worker is alive'),
    ('unserved', (select sum(u.value::integer) from jsonb_each_text(x.unserved) as u)::text, null, (
      select string_agg(
        format('%s jobs wait for %s, which no living worker serves', u.value, u.key), '; '
        order by u.key
      )
      from jsonb_each_text(x.unserved) as u
    )),
    ('not_listening', (w.alive - w.listen)::text, null,
      format('%s of %s workers', w.alive - w.listen, w.alive)),
    ('cron_silent', r.value ->> 'runs_missed', null,
      concat(r.key, ' last ran at ', r.value ->> 'last_run_at')),
    ('paused', jsonb_array_length(x.paused)::text, null, (
      select string_agg(concat(
        p.kind, ' ', p.name, ' until ' || p.paused_until, ': ' || p.pause_reason
      ), '; ' order by p.name)
      from jsonb_to_recordset(x.paused)
        as p (kind text, name text, paused_until text, pause_reason text)
    )),
    ('budget', (select max(b.used) from jsonb_to_recordset(x.budgets) as b (used numeric))::text,
      null, (
        select string_agg(format(
          '%s: %s of %s USD of this %s', b.scope, round(b.used * b.limit_usd, 2),
          round(b.limit_usd, 2), b.period
        ), '; ' order by b.used desc, b.scope)
        from jsonb_to_recordset(x.budgets)
          as b (scope text, period text, limit_usd numeric, used numeric)
        where b.used > rule.threshold
      )),
    ('vacuum_held_back', x.vacuum ->> 'oldest_transactions', null, (
      select concat_ws(
        ' ', v.kind, v.pid, quote_ident(v.name), v.state,
        'since ' || date_trunc('second', v.since), format('(%s transactions)', v.age_transactions)
      )
      from private.vacuum_holders as v order by v.age_transactions desc nulls last limit 1
    )),
    ('dead_deliveries', x.outbox ->> 'dead', null,
      (x.outbox ->> 'dead') || ' deliveries to webhooks were given up'),
    ('skipped_rows', x.skipped ->> 'rows', null,
      format('%s rows since %s: %s', x.skipped ->> 'rows', x.skipped ->> 'since', (
        select string_agg(concat(s.key, ' ', s.value), ', ' order by s.key)
        from jsonb_each_text(x.skipped -> 'steps') as s
      ))),
    ('books', ((x.books ->> 'recent_problems')::integer
      + coalesce((x.books ->> 'problems')::integer, 0))::text, null,
      format('%s problems among what moved last, %s at the check of %s',
        x.books ->> 'recent_problems', coalesce(x.books ->> 'problems', 'none'),
        coalesce(x.books ->> 'checked_at', 'never')))
  ) as m (alert, value, cases, detail) on m.alert = rule.alert
$$;

create or replace function private.health_of(p_models jsonb) returns json
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  -- More than a monitor: who asks may pause what the reasons are about.
  v_is_operator boolean := has_function_privilege(
    coalesce(nullif(current_setting('role', true), 'none'), session_user),
    'public.pause_model(text, timestamptz, text)', 'execute'
  );
  v_health jsonb;
  v_alerts jsonb;
begin
  v_health := jsonb_build_object(
    'depth', (
      select jsonb_build_object(
        'ready', coalesce(sum(m.ready), 0), 'delayed', coalesce(sum(m.delayed), 0),
        'paused', coalesce(sum(m.paused), 0), 'oldest_ready_seconds', max(m.oldest_ready_seconds)
      )
      from jsonb_populate_recordset(null::private.queue_by_model, p_models) as m
    ),
    'running', (
      select jsonb_build_object(
        'jobs', count(*), 'stale', count(*) filter (where r.stuck_for > '0'),
        'stale_seconds', extract(epoch from max(r.stuck_for) filter (where r.stuck_for > '0'))
      )
      from private.running_now as r
    ),
    'rates', private.rates_health(),
    'workers', (
      select jsonb_build_object(
        'alive', count(*), 'asleep', count(*) filter (where w.asleep),
        'listening', count(*) filter (where w.is_listening),
        'slots', coalesce(sum(w.slots), 0), 'slots_used', coalesce(sum(w.slots_used), 0)
      )
      from private.worker_activity as w where w.is_alive
    ),
    'routines', (
      select coalesce(jsonb_object_agg(r.name, jsonb_build_object(
        'last_run_at', r.last_run_at, 'every_seconds', extract(epoch from r.every),
        'runs_missed',
        trunc(extract(epoch from now() - r.last_run_at) / extract(epoch from r.every))
      )), '{}')
      from private.routines as r where r.every is not null
    ),
    'unserved', (
      select coalesce(jsonb_object_agg(u.provider, u.jobs), '{}')
      from (
        select m.provider, sum(m.ready) as jobs
        from jsonb_populate_recordset(null::private.queue_by_model, p_models) as m
        where m.ready > 0 and m.model_id in (select n.id from private.unserved_models as n)
        group by m.provider
      ) as u
    ),
    'paused', (
      select coalesce(jsonb_agg(to_jsonb(p) ||
        case when v_is_operator then '{}' else '{"pause_reason": null}'::jsonb end
      ), '[]')
      from private.paused_now as p
    ),
    'budgets', (
      select coalesce(jsonb_agg(to_jsonb(b) order by b.used desc, b.scope), '[]')
      from (
        select
          case when s.user_id is null then s.scope else 'a user' end as scope,
          s.period, s.limit_usd, s.spent_usd, s.reserved_usd, round(s.used, 4) as used,
          s.on_breach, s.ends_at
        from private.budget_states as s order by s.used desc limit 20
      ) as b
    ),
    'vacuum', (
      select jsonb_build_object(
        'oldest_transactions', coalesce(max(h.age_transactions), 0),
        'sees_all_sessions', pg_has_role(current_user, 'pg_read_all_stats', 'usage')
      )
      from private.vacuum_holders as h
    ),
    'outbox', private.outbox_health(),
    'books', (
      select jsonb_build_object(
        'recent_problems', (select count(*) from private.recent_broken_books()),
        'checked_at', max(r.last_run_at), 'problems', (max(r.result ->> 'problems'))::integer,
        'examples', coalesce(
          jsonb_agg(r.result -> 'examples') filter (where v_is_operator) -> 0, '[]'
        )
      )
      from private.routines as r where r.name = 'check_books' and r.result is not null
    ),
    -- What routines passed over within a day; who was only locked counts from the third time. And
    -- files that Storage would not delete for a day, and what was sold to nobody we know, or was
    -- nothing we know, for an hour.
    'skipped', (
      select jsonb_build_object(
        'rows', coalesce(sum(s.rows), 0), 'since', min(s.first_at),
        'steps', coalesce(jsonb_object_agg(s.step, s.rows), '{}')
      )
      from (
        select r.step, count(*) as rows, min(r.first_at) as first_at
        from private.skipped_rows as r
        where r.last_at > now() - interval '1 day'
          and (r.times > 2 or r.code not in ('40P01', '55P03'))
        group by r.step
        union all
        select 'storage', count(*), min(o.marked_at)
        from (
          select f.marked_at from private.expired_files as f
          where f.marked_at < now() - interval '1 day' order by f.marked_at limit 1000
        ) as o
        having count(*) > 0
        union all
        select 'billing', count(*), min(w.received_at)
        from (
          select e.received_at from private.billing_events as e
          where e.outcome = 'waiting' and e.said ? 'sales'
            and e.received_at < now() - interval '1 hour'
          limit 1000
        ) as w
        having count(*) > 0
      ) as s
    )
  );
  select coalesce(jsonb_agg(jsonb_build_object(
    'alert', s.alert, 'severity', s.severity, 'detail', s.detail, 'hint', s.hint
  ) order by s.severity, s.alert), '[]') into v_alerts
  from private.alert_states(v_health) as s where s.is_raised;
  return (
    select json_object_agg(p.key, p.value order by p.key <> 'status', p.key <> 'alerts')
    from jsonb_each(v_health || jsonb_build_object(
      'status', coalesce(v_alerts #>> '{0,severity}', 'ok'), 'alerts', v_alerts
    )) as p
  );
end;
$$;

comment on function public.queue_health is
  'How the queue is, for monitors: {status (ok | warning | critical), alerts [{alert, severity, '
  'detail, hint}], depth {ready, delayed, paused, oldest_ready_seconds}, running {jobs, stale, '
  'stale_seconds}, rates {last_minute, per_minute_of_15, attempts_of_15_minutes, error_rate, '
  'burned_of_15_minutes, burned_by_users}, workers {alive, asleep, listening, slots, slots_used}, '
  'routines {name: {last_run_at, every_seconds, runs_missed}}, paused, unserved {provider: ready '
  'jobs}, budgets [{scope, period, limit_usd, spent_usd, reserved_usd, used, on_breach, ends_at}] '
  '(the twenty most used), vacuum {oldest_transactions, sees_all_sessions}, outbox {pending, '
  'oldest_pending_seconds, dead}, books {recent_problems, checked_at, problems, examples}, skipped '
  '{rows, since, steps}}. A monitor is shown no reasons and no examples. Thresholds are rows of '
  'private.alert_rules.';

create or replace function public.enqueue_generation(
  model text, prompt text, params jsonb default '{}', idempotency_key text default null,
  max_price_credits integer default null
) returns json
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  return private.enqueue_generation(
    model, prompt, params, idempotency_key, max_price_credits
  );
end;
$$;

comment on function public.enqueue_generation is
  'Asks for a picture: checks, charges and queues in one transaction. Answers {job_id, status, '
  'reused, credits_left, queue_position and eta_seconds (null here: get_job_status tells them), '
  'poll_after_ms, size (what the model takes for the width and height or aspect_ratio asked for; '
  'null: just that)}. The same idempotency_key and payload answer with the same job and charge '
  'nothing. With params.reuse = true and a seed, a finished generation of the same input is '
  'answered, free, if it is among your last 200. max_price_credits is the most that one generation '
  'may cost, as the user saw it; null: whatever it costs. Errors: PT400 invalid_input, PT401 '
  'not_authenticated, PT402 insufficient_credits | in_debt, PT403 requires_paid_plan | '
  'account_blocked, PT404 not_found (also where the job of the key is deleted), PT409 '
  'idempotency_conflict | price_changed, PT429 too_many_active | rate_limited, PT503 '
  'budget_spent | busy | model_paused | unavailable.';

create or replace function public.enqueue_batch(
  model text, prompts text[], params jsonb default '{}', idempotency_key text default null,
  max_price_credits integer default null
) returns json
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  return private.enqueue_batch(model, prompts, params, idempotency_key, max_price_credits);
end;
$$;

comment on function public.enqueue_batch is
  'Asks for one generation of each prompt (as many as your plan''s max_batch), all or nothing. '
  'Answers as get_batch_status does. The same idempotency_key and request answer with the same '
  'batch and charge nothing; once all its jobs are deleted it is not found. An error of one prompt '
  'names it in details, prompts[0] being the first. Errors: those of enqueue_generation.';

create or replace function public.retry_generation(
  job_id uuid, max_price_credits integer default null
) returns json
language sql set search_path = pg_catalog, pg_temp
return private.retry_generation(job_id, max_price_credits);

comment on function public.retry_generation is
  'Asks again for what failed or was canceled: a new job, charged as any, with a new seed unless '
  'you gave one. While a retry of it is under way or done, answers with that one. Answers as '
  'enqueue_generation does. Errors: those of enqueue_generation, PT409 not_finished | '
  'already_finished.';

comment on function public.get_entitlement is
  'Your plan, balance, limits and what is used of them: {user_id, plan (guest | free | paid), '
  'paid_until, blocked_until (nothing is taken in before), credits, debt (what you owe: later '
  'credits pay it first), credits_ending [{credits, expires_at}], active_jobs, max_active, '
  'minute_jobs, max_per_minute, max_batch, is_busy (requests are refused as busy now)}. Errors: '
  'PT401 not_authenticated.';

comment on function public.list_models is
  'The catalogue: [{id, title, price_credits and paid_price_credits (per image), requires_paid, '
  'paused_until (null unless it is, or its budget is spent; may be infinity), max_images, inputs '
  '{name: JSON schema of a param}, image_inputs [those that take a picture: a path in bucket '
  'inputs, or generations/<path of an image>]}].';

do $$
begin
  execute (
    select string_agg(format('alter table private.%I enable row level security', c.relname), ';')
    from pg_class as c where c.relnamespace = 'private'::regnamespace and c.relkind in ('r', 'p')
  );
end;
$$;

-- Data, by hand.

-- What was given back of canceled jobs was a setting of that day.
update public.generations as g set refund_percent = l.amount * 100 / g.price_credits
from (
  select generation_id, sum(amount)::bigint as amount
  from public.credit_ledger where kind = 'refund' group by generation_id
) as l
where g.status = 'canceled' and l.generation_id = g.id and l.amount < g.price_credits;

-- What was said of who is paid.
insert into private.billing_subscriptions (
  provider, subscription, user_id, owned_since, paid_until, happened_at
)
select 'set_paid', user_id::text, user_id, now(), paid_until, now()
from public.entitlements where paid_until is not null;

-- What holds from now on.

alter table public.credit_ledger add constraint credit_ledger_amount_and_generation_match_kind CHECK (
CASE
    WHEN ((kind)::text = 'charge'::text) THEN (amount <= 0)
    ELSE private.fits_kind((kind)::text, amount, generation_id, debt)
END);

alter table public.images add constraint images_path_is_the_owners CHECK (starts_with(storage_path, concat(COALESCE(merged_from, user_id), '/', generation_id, '/', "position", '.')));

alter table public.images add constraint images_preview_path_is_the_owners CHECK (starts_with(preview_path, concat(COALESCE(merged_from, user_id), '/', generation_id, '/', "position", '.')));

alter table private.error_codes add constraint error_codes_refund_is_a_percentage CHECK (((refund_percent >= 0) AND (refund_percent <= 100)));

alter table private.plans add constraint plans_name_is_known CHECK ((name = ANY (ARRAY['guest'::text, 'free'::text, 'paid'::text])));

alter table private.plans add constraint plans_welcome_credits_are_at_most_a_million CHECK (((welcome_credits >= 0) AND (welcome_credits <= 1000000)));

alter table private.settings add constraint settings_refund_grace_is_not_negative CHECK ((refund_grace >= '00:00:00'::interval));

alter table private.settings add constraint settings_keep_billing_events_outlives_a_month CHECK (((keep_billing_events >= '1 mon'::interval) AND (keep_billing_events <= '1000 years'::interval)));

alter table private.settings add constraint settings_keep_identities_is_in_reach CHECK (((keep_identities >= '00:00:00'::interval) AND (keep_identities <= '1000 years'::interval)));

create trigger budgets_are_looked_at_again
after insert or delete or update of provider, model_id, plan, user_id, period, limit_usd, on_breach
on private.budgets
for each row execute function private.note_budget();

create or replace trigger darkroom_create_entitlement
after insert on auth.users
for each row execute function private.follow_changed_user();

create constraint trigger darkroom_follow_user
after update on auth.users deferrable initially deferred
for each row execute function private.follow_changed_user();

insert into private.exported_tables (name, owner, left_out) values
('public.entitlements', 'user_id', '{}'),
('public.credit_ledger', 'user_id', '{}'),
('private.credit_buckets', 'user_id', '{}'),
('private.billing_customers', 'user_id', '{}'),
('private.billing_events', 'user_id', '{}'),
('private.billing_purchases', 'user_id', '{}'),
('private.billing_subscriptions', 'user_id', '{}'),
('private.merged_users', 'into_id', '{}'),
('public.batches', 'user_id', '{}'),
('public.generations', 'user_id', '{}'),
('public.images', 'generation_id', '{}'),
(
  'private.attempts', 'generation_id',
  '{token,worker_id,error_detail,provider_job_id,provider_seconds,provider_images,cost_usd}'
)
on conflict do nothing;

insert into private.retention_walks (name) values
('apply_waiting'), ('expire_deleted'), ('expire_old'), ('expire_orphans'), ('follow_users'),
('trim_attempts'), ('trim_billing_events'), ('trim_identities'), ('trim_ledger')
on conflict do nothing;

insert into private.billing_providers (name) values ('stripe'), ('revenuecat')
on conflict do nothing;

insert into private.plans (
  name, max_active, max_per_minute, full_minutes_per_day, max_burned_per_day, max_batch, weight,
  busy_after, welcome_credits
) values
('guest', 1, 5, 10, 2, 1, 1, '5 minutes', 0),
('free', 3, 10, 30, 5, 3, 1, '10 minutes', null),
('paid', 20, 60, 100, 50, 100, 4, '30 minutes', null)
on conflict do nothing;

insert into private.alert_rules (alert, threshold, unit, min_cases, severity, hint) values
('depth', 10000, 'ready jobs', 0, 'warning',
  'Start more workers, or give them more slots. Which model: private.queue_by_model.'),
('oldest_age', 300, 'seconds', 0, 'warning',
  'Start more workers, or give them more slots. Which model: private.queue_by_model.'),
('error_rate', 0.25, 'share of attempts', 20, 'critical',
  'private.attempts says of which model and in which words; is_active = false takes one off.'),
('burned', 20, 'purchases', 0, 'warning',
  'Users cancel what the provider bills: lower plans.max_burned_per_day.'),
('stuck', 120, 'seconds', 0, 'critical',
  'Nobody recovers them, see private.running_now: start a worker or pg_cron.'),
('no_worker', 0, 'ready jobs', 0, 'critical',
  'Start a worker, or look into the log of the one that stopped.'),
('unserved', 0, 'ready jobs', 0, 'critical',
  'Give a worker the key that private.providers names, and restart it; or pause the model.'),
('not_listening', 0, 'workers', 0, 'warning',
  'They only poll: LISTEN does not work through a transaction pooler. Connect them directly.'),
('cron_silent', 3, 'runs missed', 0, 'warning',
  'See cron.job_run_details. Where a routine is no longer to run, set routines.every to null.'),
('paused', 0, 'pauses', 0, 'warning',
  'Jobs of private.paused_now wait. If the provider refused, see its billing and key.'),
('budget', 0.8, 'share of a limit', 0, 'warning',
  'See private.budget_states: raise limit_usd in private.budgets, or look who asks for so much.'),
('vacuum_held_back', 1000000, 'transactions', 0, 'warning',
  'Dead rows pile up in the queue. End what private.vacuum_holders names.'),
('skipped_rows', 0, 'rows', 0, 'warning',
  'Mend what private.skipped_rows names: it is tried again. storage: see the worker''s log.'),
('books', 0, 'problems', 0, 'critical',
  'See private.broken_books. Once it is mended, select private.check_books() to check anew.')
on conflict do nothing;

do $$
begin
  perform private.skip_failing(
    'select count(private.follow_user(u)) from unnest($1) as u',
    array(
      select u.id from auth.users as u
      where not exists (select from public.entitlements as e where e.user_id = u.id)
    )
  );
end;
$$;

do $$
declare
  v_job record;
begin
  if current_database() is distinct from current_setting('cron.database_name', true) then
    raise notice 'Darkroom: no pg_cron for this database; workers do its work on their own';
    return;
  end if;
  create extension if not exists pg_cron with schema pg_catalog;
  for v_job in
    select * from (values
      ('recover_stale_jobs', '* * * * *', interval '1 minute'),
      ('expire_credits', '* * * * *', interval '1 minute'),
      ('apply_retention', '* * * * *', interval '1 minute'),
      ('trim_history', '17 3 * * *', interval '1 day'),
      ('check_books', '47 3 * * *', interval '1 day')
    ) as job (name, schedule, every)
  loop
    perform cron.schedule(
      'darkroom_' || v_job.name, v_job.schedule,
      format('select private.%1$s(), private.note_run(%1$L)', v_job.name)
    );
    insert into private.routines (name, every) values (v_job.name, v_job.every)
    on conflict (name) do update set every = coalesce(routines.every, excluded.every);
  end loop;
end;
$$;

notify pgrst, 'reload schema';

notify pgrst, 'reload config';

do $c$ begin if to_regprocedure('public.enqueue_batch(pg_catalog.text,pg_catalog.text[],pg_catalog.jsonb,pg_catalog.text)') is not null then comment on function public.enqueue_batch(pg_catalog.text,pg_catalog.text[],pg_catalog.jsonb,pg_catalog.text) is null; end if; end $c$;

do $c$ begin if to_regprocedure('public.enqueue_generation(pg_catalog.text,pg_catalog.text,pg_catalog.jsonb,pg_catalog.text)') is not null then comment on function public.enqueue_generation(pg_catalog.text,pg_catalog.text,pg_catalog.jsonb,pg_catalog.text) is null; end if; end $c$;

do $c$ begin if to_regprocedure('public.grant_credits(pg_catalog.uuid,integer,pg_catalog.text,pg_catalog.text)') is not null then comment on function public.grant_credits(pg_catalog.uuid,integer,pg_catalog.text,pg_catalog.text) is null; end if; end $c$;

do $c$ begin if to_regprocedure('public.retry_generation(pg_catalog.uuid)') is not null then comment on function public.retry_generation(pg_catalog.uuid) is null; end if; end $c$;

do $c$ begin if to_regprocedure('public.set_paid(pg_catalog.uuid,timestamp with time zone)') is not null then comment on function public.set_paid(pg_catalog.uuid,timestamp with time zone) is null; end if; end $c$;

-- Whoever is here was welcomed. Guests, and who is banned or deleted, are what Auth says.
if exists (select from private.settings where welcome_once_per_identity) then
  insert into private.welcomed_identities (identity)
  select distinct i.identity
  from auth.users as u cross join unnest(private.identities_of(to_jsonb(u))) as i (identity)
  on conflict do nothing;
end if;
perform private.skip_failing(
  'select count(private.follow_user(u)) from unnest($1) as u', array(
    select u.id from auth.users as u
    where to_jsonb(u) ->> 'is_anonymous' = 'true'
      or coalesce(to_jsonb(u) ->> 'banned_until', to_jsonb(u) ->> 'deleted_at') is not null
  )
);
drop function private.create_entitlement_of_new_user(), private.create_entitlement(uuid);

revoke all on function private.accept(private.gate,text,jsonb,text[],jsonb[],text,uuid,uuid,boolean,integer) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.apply_kept(text) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.apply_waiting(text,integer) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.asks_usd(private.ready_jobs,smallint) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.awaits_budget(text,smallint,uuid,interval) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.billed_user(text,text[]) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.book(uuid,text,integer,bigint,uuid,text) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.book_costs(private.running_jobs[]) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.budget_spent_until(public.models,uuid) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.charge_buckets(uuid,integer,uuid[],bigint) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.concerns(private.budgets,text,smallint,uuid) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.credit_product(text,text[]) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.credits_in_order(uuid,integer) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.end_credits(uuid[]) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.enqueue_batch(text,text[],jsonb,text,integer) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

grant execute on function private.enqueue_batch(text,text[],jsonb,text,integer) to anon, authenticated;

revoke all on function private.enqueue_generation(text,text,jsonb,text,integer) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

grant execute on function private.enqueue_generation(text,text,jsonb,text,integer) to anon, authenticated;

revoke all on function private.expire_credits(integer) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.fits_kind(text,integer,uuid,integer) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.folders_of(uuid) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.follow_changed_user() from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.follow_user(uuid) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.follow_users(text,integer) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.has_room(private.budget_states,numeric) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.hold_budgets() from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.identities_of(jsonb) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.is_held(private.budget_states[],numeric,text,smallint,uuid) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.lock_jobs(uuid) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.most_usd(numeric,text,integer,interval) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.move_credits(uuid,text,integer,text,timestamp with time zone,integer,text) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.note_budget() from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.own_folders() from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

grant execute on function private.own_folders() to authenticated;

revoke all on function private.owner_of(uuid) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.pick_admitted_jobs(integer,text[],boolean) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.read_revenuecat(jsonb) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.read_stripe(jsonb) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.recent_broken_books(integer) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.refresh_plan(uuid) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.retry_generation(uuid,integer) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

grant execute on function private.retry_generation(uuid,integer) to anon, authenticated;

revoke all on function private.settle_purchases(text,text) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.share_taken(jsonb) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.spendable_credits(public.entitlements) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.trim_billing_events(text,integer) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.trim_identities(text,integer) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.wake_for(private.running_jobs[]) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.within_budgets(uuid[],smallint[],private.budget_states[]) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function public.apply_billing_event(text,jsonb) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

grant execute on function public.apply_billing_event(text,jsonb) to service_role;

revoke all on function public.enqueue_batch(text,text[],jsonb,text,integer) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

grant execute on function public.enqueue_batch(text,text[],jsonb,text,integer) to anon, authenticated;

revoke all on function public.enqueue_generation(text,text,jsonb,text,integer) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

grant execute on function public.enqueue_generation(text,text,jsonb,text,integer) to anon, authenticated;

revoke all on function public.export_user(uuid,text[],integer) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

grant execute on function public.export_user(uuid,text[],integer) to service_role;

revoke all on function public.grant_credits(uuid,integer,text,text,timestamp with time zone,integer) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

grant execute on function public.grant_credits(uuid,integer,text,text,timestamp with time zone,integer) to service_role;

revoke all on function public.merge_user(uuid,uuid,boolean) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

grant execute on function public.merge_user(uuid,uuid,boolean) to service_role;

revoke all on function public.retry_generation(uuid,integer) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

grant execute on function public.retry_generation(uuid,integer) to anon, authenticated;

revoke all on function public.set_paid(uuid,timestamp with time zone,timestamp with time zone,text) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

grant execute on function public.set_paid(uuid,timestamp with time zone,timestamp with time zone,text) to service_role;

revoke all on table public.credit_products from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

grant delete on table public.credit_products to service_role;

grant insert on table public.credit_products to service_role;

grant select on table public.credit_products to service_role;

grant update on table public.credit_products to service_role;

-- The optional parts, where they are.

if v_has_95 then
create or replace function private.move_gallery() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  update public.generation_tags set user_id = new.into_id where user_id = new.user_id;
  update public.prompt_templates set user_id = new.into_id where user_id = new.user_id;
  with moved as (delete from public.image_likes as l where l.user_id = new.user_id returning l.*)
  insert into public.image_likes (generation_id, position, user_id, created_at)
  select m.generation_id, m.position, new.into_id, m.created_at from moved as m
  on conflict do nothing;
  return null;
end;
$$;

create trigger merged_users_move_gallery after insert on private.merged_users
for each row execute function private.move_gallery();

insert into private.exported_tables (name) values
('public.image_likes'), ('public.prompt_templates');

revoke all on function private.move_gallery() from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;
end if;

if v_has_96 then
create or replace function private.move_pushes() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  update private.push_tokens set user_id = new.into_id where user_id = new.user_id;
  update private.deliveries as d set user_id = new.into_id
  from public.generations as g
  where g.user_id = new.user_id and d.generation_id = g.id and d.user_id = new.user_id;
  return null;
end;
$$;

create trigger merged_users_move_pushes after insert on private.merged_users
for each row execute function private.move_pushes();

insert into private.exported_tables (name, owner, left_out) values
('private.push_tokens', 'user_id', '{}'),
('private.deliveries', 'generation_id', '{token,attempts,run_at,last_status,last_error,ticket}');

revoke all on function private.move_pushes() from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;
end if;

if v_has_97 then
create view private.waiting_now with (security_invoker = true) as
select
  r.job_id, r.user_id, (private.plan_of(e)).name as plan, r.model_id,
  case
    when exists (
      select from private.paused_models as p where p.id = r.model_id and p.paused_until > now()
    ) or private.awaits_budget(r.model_id, r.route, r.user_id) then 'paused'
    when r.run_at > now() then 'delayed'
    else 'ready'
  end as state,
  g.created_at, now() - g.created_at as waiting, r.attempt as attempts_used, r.run_at, r.fair_key
from private.ready_jobs as r
inner join public.generations as g on r.job_id = g.id
inner join public.entitlements as e on r.user_id = e.user_id
order by r.fair_key, r.seq;

comment on view private.waiting_now is
  'What waits, since when, and whose turn is next? In the order of the queue.';

create view private.costs with (security_invoker = true) as
select
  entry.day, entry.user_id, entry.model_id,
  array_remove(array_agg(distinct entry.provider), null) as providers,
  count(entry.outcome)::integer as attempts,
  count(*) filter (where entry.outcome = 'completed')::integer as completed,
  coalesce(sum(entry.images), 0)::integer as images,
  coalesce(sum(entry.provider_seconds), 0)::numeric as provider_seconds,
  coalesce(sum(entry.cost_usd), 0) as cost_usd,
  count(*) filter (where entry.provider_job_id is not null and entry.cost_usd is null)::integer
    as unknown_costs,
  coalesce(-sum(entry.amount) filter (where entry.kind = 'charge'), 0) as credits_charged,
  coalesce(sum(entry.amount) filter (where entry.kind = 'refund'), 0) as credits_refunded,
  -coalesce(sum(entry.amount), 0) * s.credit_usd - coalesce(sum(entry.cost_usd), 0) as margin_usd
from (
  select
    (a.ended_at at time zone 'utc')::date as day, g.user_id, a.model_id, a.provider,
    a.outcome, a.provider_images as images, a.provider_seconds::numeric, a.cost_usd,
    a.provider_job_id, null as kind, null as amount
  from private.attempts as a
  inner join public.generations as g on a.generation_id = g.id
  union all
  select
    (l.created_at at time zone 'utc')::date, l.user_id, g.model_id, null, null, null, null, null,
    null, l.kind, l.amount - l.debt
  from public.credit_ledger as l
  inner join public.generations as g on l.generation_id = g.id
) as entry
cross join private.settings as s
group by entry.day, entry.user_id, entry.model_id, s.credit_usd;

comment on view private.costs is
  'What did each user cost and pay, by model and day? Sum it by what you want to know. Days are '
  'UTC''s: of an attempt the day it ended, of a credit the day it was booked. images are those the '
  'provider billed; unknown_costs counts attempts that asked the provider and whose price is not '
  'known, so that cost_usd is too low by them (a retry that goes on from the same provider job is '
  'one of them); margin_usd is there once settings.credit_usd says what a credit is worth.';
end if;
end;
$upgrade$;
