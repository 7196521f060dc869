-- What operators set: the plans of users, and one row of settings. Other files add what is theirs.
--
-- Whoever changes a row changes the product from the next request on; nothing is started anew.

create table private.plans (
  name text primary key,
  max_active integer not null,
  max_per_minute integer not null,
  full_minutes_per_day smallint not null default 30,
  max_burned_per_day integer not null default 5,
  max_batch integer not null,
  weight integer not null,
  welcome_credits integer,
  busy_after interval,
  oldest_ready_at timestamptz,
  looked_at timestamptz not null default now(),
  has_budgets boolean not null default false,
  constraint plans_name_is_known check (name in ('guest', 'free', 'paid')),
  constraint plans_limits_are_positive check (
    least(max_active, max_per_minute, full_minutes_per_day, max_burned_per_day) > 0
    and max_batch between 1 and 100
  ),
  constraint plans_weight_is_a_step_of_the_queue check (weight between 1 and 1000),
  constraint plans_welcome_credits_are_at_most_a_million check (
    welcome_credits between 0 and 1000000
  ),
  constraint plans_busy_after_is_positive check (
    busy_after > interval '0' and busy_after <= interval '1000 years'
  )
) with (fillfactor = 50);

comment on table private.plans is 'Limits of guests, free and paid users.';
comment on column private.plans.full_minutes_per_day is
  'Times max_per_minute: jobs enqueued in a day, each of which keeps its row.';
comment on column private.plans.max_burned_per_day is
  'Jobs of a day that a user may cancel when the provider may bill us already; then no more are '
  'let in.';
comment on column private.plans.max_batch is
  'Prompts of one batch. A batch is let in whole while there is room for one job more, and then '
  'counts in full.';
comment on column private.plans.weight is 'Share of the queue against other users'' weights.';
comment on column private.plans.welcome_credits is
  'Credits that a user begins this plan with; null: settings.welcome_credits.';
comment on column private.plans.oldest_ready_at is
  'queued_at of the job that could be claimed longest at looked_at; null: there was none. Too dear '
  'to look up in every enqueue, and here because each of them reads its plan.';
comment on column private.plans.has_budgets is
  'Whether a budget (29) may refuse anybody. Kept by a trigger there; here for the same reason.';
comment on column private.plans.busy_after is
  'Requests are refused as busy while a job has waited this long whose user has nothing running; '
  'null: never.';

create table private.settings (
  id boolean primary key default true,
  welcome_credits integer not null default 10,
  max_prompt_chars integer not null default 4000,
  max_params_bytes integer not null default 8192,
  lease interval not null default '60 seconds',
  heartbeat interval not null default '15 seconds',
  max_attempts smallint not null default 3,
  max_claims smallint not null default 100,
  retry_base interval not null default '2 seconds',
  retry_cap interval not null default '60 seconds',
  give_up_after interval not null default '1 hour',
  running_cancel_refund_percent smallint not null default 100,
  refund_grace interval not null default '1 day',
  debtors_may_enqueue boolean not null default false,
  credit_usd numeric(12, 6),
  broadcasts boolean not null default true,
  breaker_failures smallint not null default 5,
  breaker_provider_failures smallint not null default 15,
  breaker_users smallint not null default 3,
  breaker_window interval not null default '5 minutes',
  breaker_pause interval not null default '30 seconds',
  breaker_pause_cap interval not null default '15 minutes',
  constraint settings_is_one_row check (id),
  -- So short ones need no look here.
  constraint settings_sizes_are_a_thousand_at_least check (
    least(max_prompt_chars, max_params_bytes) >= 1000
  ),
  constraint settings_credit_is_not_negative check (credit_usd >= 0),
  constraint settings_welcome_credits_are_not_negative check (welcome_credits >= 0),
  constraint settings_welcome_credits_are_at_most_a_million check (welcome_credits <= 1000000),
  constraint settings_refund_grace_is_not_negative check (refund_grace >= '0'),
  constraint settings_lease_outlives_three_heartbeats check (lease >= 3 * heartbeat),
  constraint settings_max_attempts_is_positive check (max_attempts > 0),
  constraint settings_max_claims_leave_room_for_all_attempts check (max_claims >= max_attempts),
  constraint settings_running_cancel_refund_is_a_percentage check (
    running_cancel_refund_percent between 0 and 100
  ),
  constraint settings_breaker_limits_are_positive check (
    least(breaker_failures, breaker_provider_failures, breaker_users) > 0
    and least(breaker_window, breaker_pause, breaker_pause_cap) > interval '0'
  )
);

comment on table private.settings is 'The one row of operator settings.';
comment on column private.settings.welcome_credits is
  'Credits of a new user, unless plans.welcome_credits says otherwise; 0 for none.';
comment on column private.settings.lease is
  'How long a worker may be silent before its jobs are given to others.';
comment on column private.settings.heartbeat is 'How often workers beat.';
comment on column private.settings.max_claims is
  'A job claimed this often is not retried any more, whether or not its attempts counted.';
comment on column private.settings.retry_base is
  'Retry n of a job waits retry_base * 2^(n-1), at most retry_cap, or down to half of that.';
comment on column private.settings.give_up_after is 'A job this old is not retried any more.';
comment on column private.settings.refund_grace is
  'How long credits can be spent that are given back after their end.';
comment on column private.settings.debtors_may_enqueue is
  'Whether who has a debt may ask for what costs nothing; else in_debt.';
comment on column private.settings.credit_usd is
  'What a credit earns, in US dollars, for margin_usd of the cost views; null: not said.';
comment on column private.settings.running_cancel_refund_percent is
  'Share of the price given back when a job is canceled after the provider was asked for it.';
comment on column private.settings.broadcasts is
  'Whether each new state of a job is broadcast where Supabase Realtime is; else clients poll.';
comment on column private.settings.breaker_failures is
  'Failures in a row, with no success between, that pause a model.';
comment on column private.settings.breaker_provider_failures is
  'The same for a provider. A model that is paused adds none, so several must fail.';
comment on column private.settings.breaker_users is
  'From how many users the failures must come, for no few users'' input pauses a model for all.';
comment on column private.settings.breaker_window is 'Failures in a row count for this long.';
comment on column private.settings.breaker_pause is
  'Pause n in a row lasts breaker_pause * 2^(n-1), at most breaker_pause_cap.';
