"""A day of work in the tables, made up: hills of requests, an outage, models fast and slow."""

from database import Database

# Model, share of the requests, mean seconds, US dollars of one.
MODELS = [
    ("black-forest-labs/flux-schnell", 0.40, 3.0, 0.003),
    ("black-forest-labs/flux-dev", 0.25, 9.0, 0.025),
    ("black-forest-labs/flux-1.1-pro", 0.12, 7.0, 0.04),
    ("recraft-ai/recraft-v3", 0.10, 14.0, 0.04),
    ("stability-ai/sdxl", 0.08, 11.0, 0.006),
    ("bytedance/seedream-3", 0.05, 20.0, 0.03),
]

# $1 rows a day, one of $2 users each. Requests come in two hills; between 7 and 6 hours ago one
# provider's answers were mostly errors, and jobs began late.
REQUESTS = """
with model as (
  select * from unnest(%(names)s::text[], %(shares)s::numeric[], %(seconds)s::float[],
    %(costs)s::numeric[]) with ordinality as m (id, share, mean, cost, nr)
),
bounds as (
  select *, sum(share) over (order by nr) as upper from model
),
request as (
  select
    n,
    now() - interval '1 day' * (1 - t.share) as at,
    0.3 + 1.5 * exp(-power((t.share - 0.33) / 0.15, 2))
      + 1.1 * exp(-power((t.share - 0.76) / 0.12, 2)) as busy,
    t.share between 0.71 and 0.755 as is_outage,
    ('x' || substr(md5('a' || n), 1, 6))::bit(24)::integer / 16777216.0 as dice,
    ('x' || substr(md5('b' || n), 1, 6))::bit(24)::integer / 16777216.0 as luck,
    ('x' || substr(md5('c' || n), 1, 6))::bit(24)::integer / 16777216.0 as pace
  from generate_series(1, %(count)s) as n
  cross join lateral (select n / %(count)s::float as share) as t
),
taken as (
  select
    r.*, m.id as model_id, m.cost,
    interval '1 second' * (
      case when r.is_outage then 40 + 160 * sin((r.n %% 97) / 97.0)
        else r.busy * r.busy * 2.5 * (0.4 + r.pace) end
    ) as waited,
    interval '1 second' * m.mean
      * (0.7 + 0.6 * r.pace + case when r.pace > 0.97 then 1.5 else 0 end) as ran,
    case
      when r.is_outage and r.luck < 0.45 then 'provider_error'
      when r.luck < 0.006 then 'provider_error'
      when r.luck < 0.013 then 'moderated'
      when r.luck < 0.015 then 'provider_timeout'
    end as error_code
  from request as r
  inner join bounds as m on r.dice >= m.upper - m.share and r.dice < m.upper
  where ('x' || substr(md5('d' || r.n), 1, 6))::bit(24)::integer / 16777216.0 < r.busy / 2.15
),
made as (
  insert into public.generations (id, user_id, model_id, prompt, input, provider_input, status,
    error_code, error_message, price_credits, image_count, created_at, started_at, finished_at)
  select
    (left(private.first_id_of(t.at)::text, 14) || '7' || substr(md5(t.n::text), 1, 3) || '-8'
      || substr(md5(t.n::text), 4, 3) || '-' || substr(md5(t.n::text), 8, 12))::uuid,
    (%(users)s::uuid[])[1 + t.n %% cardinality(%(users)s::uuid[])], t.model_id,
    'a lighthouse at dusk', jsonb_build_object('n', t.n), '{}',
    case when t.error_code is null then 'completed' else 'failed' end, t.error_code,
    case when t.error_code is not null then '-' end, 0, 1, t.at, t.at + t.waited,
    t.at + t.waited + t.ran
  from taken as t where t.at + t.waited + t.ran < now()
  returning id, (input ->> 'n')::integer as n
)
insert into private.attempts (generation_id, token, model_id, attempt, worker_id, started_at,
  ended_at, outcome, error_code, error_detail, provider_job_id, provider_seconds, provider_images,
  cost_usd)
select
  m.id, t.n, t.model_id, 1, 1, t.at + t.waited, t.at + t.waited + t.ran,
  case when t.error_code is null then 'completed' else 'failed' end, t.error_code,
  case t.error_code
    when 'moderated' then 'NSFW content detected in all outputs'
    when 'provider_error' then 'create: HTTP 502: upstream connect error or disconnect'
    when 'provider_timeout' then 'no answer within 60 s'
  end,
  md5(t.n::text), extract(epoch from t.ran), 1, case when t.error_code is null then t.cost end
from made as m
inner join taken as t on t.n = m.n
order by t.at + t.waited + t.ran
"""


def have_a_day(db: Database, users: list[str], count: int) -> None:
    """Let so many requests of these users have come and been worked on within the last day."""
    names, shares, seconds, costs = (list(column) for column in zip(*MODELS, strict=True))
    values = {"names": names, "shares": shares, "seconds": seconds, "costs": costs}
    with db.connect() as connection:
        connection.execute("set session_replication_role = replica")  # no triggers: it is history
        connection.execute(REQUESTS, values | {"users": users, "count": count})
        connection.execute("analyze public.generations, private.attempts")
