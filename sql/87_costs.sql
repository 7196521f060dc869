-- What making pictures costs, and what it earns: by day, by model, by user.
--
-- The provider's side is from attempts (every one, whatever came of it), the users' side from the
-- ledger. Both are summed in costs; the other views sum that up. Days are UTC's: of an attempt the
-- day it ended, of a credit the day it was booked. What retention has removed is not counted.
--
-- Read them as the owner; see 83. margin_usd is there once settings.credit_usd says what a credit
-- is worth. What subscriptions bring is not in it.

create view private.costs with (security_invoker = true) as
select
  entry.day, entry.user_id, entry.model_id,
  count(entry.outcome)::integer as attempts,
  count(*) filter (where entry.outcome = 'completed')::integer as completed,
  coalesce(sum(entry.images), 0)::integer as images,
  coalesce(sum(entry.provider_seconds), 0)::numeric as provider_seconds,
  coalesce(sum(entry.cost_usd), 0) as cost_usd,
  count(*) filter (where entry.provider_job_id is not null and entry.cost_usd is null)::integer
    as unknown_costs,
  coalesce(-sum(entry.amount) filter (where entry.kind = 'charge'), 0) as credits_charged,
  coalesce(sum(entry.amount) filter (where entry.kind = 'refund'), 0) as credits_refunded
from (
  select
    (a.ended_at at time zone 'utc')::date as day, g.user_id, a.model_id, a.outcome,
    a.provider_images as images, a.provider_seconds::numeric, a.cost_usd, a.provider_job_id,
    null as kind, null as amount
  from private.attempts as a
  inner join public.generations as g on a.generation_id = g.id
  union all
  select
    (l.created_at at time zone 'utc')::date, l.user_id, g.model_id, null, null, null, null, null,
    l.kind, l.amount
  from public.credit_ledger as l
  inner join public.generations as g on l.generation_id = g.id
) as entry
group by entry.day, entry.user_id, entry.model_id;

comment on view private.costs is
  'What did each user cost and pay, by model and day? images are those the provider billed; '
  'unknown_costs counts attempts that asked the provider and whose price is not known, so that '
  'cost_usd is too low by them (a retry that goes on from the same provider job is one of them).';

create view private.cost_by_day with (security_invoker = true) as
select
  c.day, c.model_id, count(distinct c.user_id) as users, sum(c.attempts) as attempts,
  sum(c.completed) as completed, sum(c.images) as images,
  sum(c.provider_seconds) as provider_seconds, sum(c.cost_usd) as cost_usd,
  sum(c.unknown_costs) as unknown_costs, sum(c.credits_charged) as credits_charged,
  sum(c.credits_refunded) as credits_refunded,
  sum((c.credits_charged - c.credits_refunded) * s.credit_usd - c.cost_usd) as margin_usd
from private.costs as c cross join private.settings as s
group by c.day, c.model_id
order by c.day desc, cost_usd desc, c.model_id asc;

comment on view private.cost_by_day is 'What did each model cost and earn on each day?';

create view private.cost_by_model with (security_invoker = true) as
select
  d.model_id, sum(d.completed)::bigint as completed, sum(d.images)::bigint as images,
  sum(d.provider_seconds) as provider_seconds, sum(d.cost_usd) as cost_usd,
  sum(d.unknown_costs)::bigint as unknown_costs,
  round(sum(d.cost_usd) / nullif(sum(d.images), 0), 6) as cost_usd_per_image,
  sum(d.credits_charged) as credits_charged, sum(d.credits_refunded) as credits_refunded,
  sum(d.margin_usd) as margin_usd
from private.cost_by_day as d
group by d.model_id
order by cost_usd desc, d.model_id asc;

comment on view private.cost_by_model is
  'What does an image of each model really cost, failed and canceled attempts included?';

create view private.cost_by_user with (security_invoker = true) as
select
  c.user_id, sum(c.attempts) as attempts, sum(c.images) as images,
  sum(c.provider_seconds) as provider_seconds, sum(c.cost_usd) as cost_usd,
  sum(c.unknown_costs) as unknown_costs, sum(c.credits_charged) as credits_charged,
  sum(c.credits_refunded) as credits_refunded,
  sum((c.credits_charged - c.credits_refunded) * s.credit_usd - c.cost_usd) as margin_usd
from private.costs as c cross join private.settings as s
group by c.user_id
order by cost_usd desc, c.user_id asc;

comment on view private.cost_by_user is 'Which users cost most, and do they pay for it?';
