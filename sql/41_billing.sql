-- Billing: what a store's products give, and what the events of Stripe, RevenueCat or another
-- provider do.
--
-- An event is read into our own terms (43) and kept; apply_kept() makes of it what it says. Events
-- come several times, purchases under several ids, and all in any order, so nothing here depends on
-- that. What is sold is a row by what is paid for (a subscription's period, a payment), and grants
-- once. A state (until when a subscription is paid, how much was taken back) is that of the latest
-- time. What periods have left is settled anew from all that is known of them. What speaks of
-- something not known yet (a user, a product, a payment) waits until it is.
--
-- Events of one provider are applied one after the other: each locks the provider's row. Keys begin
-- with what tells rows apart, not with the provider: a planner that knows nothing of a table yet
-- would look through all that the provider has.

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
revoke all on table public.credit_products from public, anon, authenticated, service_role;
grant select, insert, update, delete on table public.credit_products to service_role;

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

-- Which share of a purchase refunds and disputes have taken back.
create function private.share_taken(p_taken_by jsonb) returns numeric
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

alter table private.settings
add column keep_billing_events interval default '1 year',
add constraint settings_keep_billing_events_outlives_a_month check (
  keep_billing_events between '1 month' and '1000 years'
);

comment on column private.settings.keep_billing_events is
  'How long billing events are kept; null: for ever.';

-- An event in our terms.
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

-- The user whom a provider calls by one of these names: the first that is a user's id, or is known.
create function private.billed_user(p_provider text, p_names text[]) returns uuid
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

-- What a provider sells under one of these names: the first that is known.
create function private.credit_product(
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

-- Tells the entitlement until when the user is paid: what set_paid said, or the longest of the
-- subscriptions, whichever was heard of last.
create function private.refresh_plan(p_user_id uuid) returns void
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

-- Moves credits until a subscription's periods, or a single purchase, have what is right by all
-- that is known of them: what they granted, but for what is due back, and of each what is left goes
-- on into the next, up to the cap of that. It goes on as soon as the next is known, also before
-- that begins: what ends first is spent first, so all of it stays spendable, and the rest ends by
-- itself. A period that is over has nothing to give back but may have something to pass on, where
-- the next is paid late. What is due back but spent is taken from what else there is, or owed.
-- Answers the credits given or, if negative, taken.
create function private.settle_purchases(p_provider text, p_subscription text) returns integer
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

-- Does what an event says that waits, as far as that is not done yet, and then what waited for it.
-- True if it waits no more. The key: provider and event's id, with a space between.
--
-- Locks: the provider, the entitlements of all whom it is about, in order of user id.
create function private.apply_kept(p_key text) returns boolean
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

-- What a provider says, in our terms.
create function private.read_event(p_provider text, p_event jsonb) returns private.billing_event
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

-- Locks: as apply_kept does.
create function public.apply_billing_event(provider text, event jsonb) returns json
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

-- A step of retention (85), each minute: applies what waits for what is here by now.
create function private.apply_waiting(
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

-- A step of retention: erases events, and purchases of users who are gone.
create function private.trim_billing_events(
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

-- Locks: the entitlement row.
create function public.set_paid(
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
