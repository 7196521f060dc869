-- Fills a database with a year of generations, as if all of it had happened: :users users, :finished
-- finished generations with what belongs to them, :ready waiting and :running running ones. For psql.

set session_replication_role = replica;
set synchronous_commit = off;
set search_path = pg_catalog, pg_temp;

create temporary table people as
select
  n as number, ('00000000-0000-4000-8000-' || lpad(n::text, 12, '0'))::uuid as id
from generate_series(1, :users) as n;
-- One in twenty is of the same user.
create temporary table made as
select
  n, p.id as user_id, at, hash,
  (lpad(to_hex((extract(epoch from at) * 1000)::bigint), 12, '0') || '7' || substr(hash, 1, 3)
    || '8' || substr(hash, 4, 15))::uuid as id,
  case
    when n > :finished + :running then 'queued'
    when n > :finished then 'processing'
    when n % 20 = 0 then 'failed'
    when n % 20 = 1 then 'canceled'
    else 'completed'
  end as status,
  md5('batch' || n / 200 || p.id)::uuid as batch_id
from generate_series(1, :finished + :running + :ready) as n
inner join people as p on p.number = case when n % 20 = 9 then 60 else 1 + n % :users end
cross join lateral (
  select
    md5(n::text) as hash, case
      when n <= :finished then now() - interval '1 year' * (1 - n / (:finished + 1.0))
      else now() - interval '1 hour' * (:finished + :running + :ready - n) / (:running + :ready)
    end as at
) as drawn;
analyze people, made;

insert into auth.users (id) select id from people;
insert into public.entitlements (user_id, paid_until, credits, last_fair_key)
select
  p.id, 'infinity', 1000000, 1000 * count(m.n) filter (where m.n > :finished + :running)
from people as p inner join made as m on m.user_id = p.id group by p.id;
insert into public.batches (id, user_id, request_hash, job_ids)
select batch_id, user_id, 'hash', array_agg(id) from made where n % 10 = 0 group by batch_id, user_id;

-- One in eight has a seed, one in forty is a favorite, one in a hundred was deleted at some time.
insert into public.generations (
  id, user_id, model_id, batch_id, prompt, input, provider_input, status, error_code, error_message,
  price_credits, image_count, idempotency_key, is_favorite, created_at, started_at, finished_at,
  updated_at, deleted_at
)
select
  id, user_id, 'darkroom/preview', case when n % 10 = 0 then batch_id end,
  'a lighthouse at dusk, ' || hash,
  case when hash < '2' then jsonb_build_object('seed', n) else '{"width": 512}' end,
  jsonb_build_object('prompt', hash, 'seed', n, 'width', 512), status::public.job_status,
  case status when 'failed' then 'provider_error' end, case status when 'failed' then 'No.' end,
  1, 1, hash, n % 40 = 2 and status = 'completed', at,
  case when n <= :finished + :running then at + interval '1 second' end,
  case when n <= :finished then at + interval '9 seconds' end, at + interval '9 seconds',
  case when n % 100 = 3 and n <= :finished then at + interval '1 hour' end
from made order by n;
insert into public.images (
  generation_id, position, user_id, storage_path, preview_path, content_type, width, height, bytes,
  blurhash, share_id, created_at
)
select
  id, 0, user_id, concat(user_id, '/', id, '/0.png'), concat(user_id, '/', id, '/0.preview.webp'),
  'image/png', 1024, 1024, 1500000, 'LEHV6nWB2yk8pyo0adR*.7kCMdnj',
  case when n % 10 = 4 then id end, at
from made where status = 'completed' order by n;
insert into public.image_likes (generation_id, position, user_id)
select m.id, 0, p.id from made as m
cross join lateral (select id from people where number <= 1 + m.n % 7) as p
where m.n % 10 = 4 and m.status = 'completed';
insert into public.generation_tags (user_id, tag, generation_id)
select user_id, case n % 100 when 5 then 'rare' else 'sea' end, id from made
where n % 5 = 0 and status = 'completed';
insert into private.attempts (
  generation_id, token, model_id, attempt, worker_id, started_at, ended_at, outcome, error_code,
  provider_job_id, provider_seconds, cost_usd
)
select
  id, nextval('private.lease_tokens'), 'darkroom/preview', 1, 1, at + interval '1 second',
  at + interval '9 seconds', status, case status when 'failed' then 'provider_error' end, hash, 7,
  0.003
from made where n <= :finished order by n;
insert into private.purchases (generation_id, provider_job_id)
select id, hash from made where n <= :finished order by n;
insert into public.credit_ledger (user_id, generation_id, kind, amount, balance_after, created_at)
select m.user_id, m.id, entry.kind::public.ledger_kind, entry.amount, 1000000, m.at
from made as m
cross join lateral (
  values ('charge', -1), (case when m.status in ('failed', 'canceled') then 'refund' end, 1)
) as entry (kind, amount)
where entry.kind is not null order by m.n;

insert into private.ready_jobs (job_id, user_id, model_id, fair_key, queued_at)
select
  id, user_id, 'darkroom/preview', 1000 * row_number() over (partition by user_id order by n), at
from made where status = 'queued' order by n;
insert into private.running_jobs (
  job_id, user_id, model_id, token, worker_id, attempt, lease_until, deadline_at
)
select
  id, user_id, 'darkroom/preview', nextval('private.lease_tokens'), 1, 1,
  now() - interval '1 minute', now() + interval '1 hour'
from made where status = 'processing';

-- A webhook that has taken what one generation in ten has to tell, but for some it never will.
insert into private.webhook_endpoints (id, url, events)
values (md5('hook')::uuid, 'https://api.example.com/hooks', '{generation.completed}');
insert into private.deliveries (
  generation_id, event_type, lane, state, run_at, created_at, finished_at
)
select
  id, 'generation.completed', md5('hook')::uuid::text,
  case when n % 1000 = 6 then 'dead' when n > :finished - 2000 then 'pending' else 'delivered' end,
  at, at, case when n % 1000 = 6 or n <= :finished - 2000 then at end
from made where n % 10 = 6 and status = 'completed';
insert into private.push_tokens (token, user_id)
select format('ExponentPushToken[%s-%s]', number, n), id
from people cross join generate_series(1, 10) as n;

insert into private.model_stats (model_id, mean_seconds, sample_count, refreshed_at)
values ('darkroom/preview', 8, 100, now());
insert into private.expired_files (bucket, path, user_id)
select 'inputs', concat(p.id, '/', n, '.png'), p.id
from people as p cross join generate_series(1, 10) as n;

-- The files of one in ten, and one that nothing speaks of among ten of these.
insert into storage.buckets (id, name) values ('generations', 'generations') on conflict do nothing;
insert into storage.objects (bucket_id, name, created_at, updated_at)
select
  'generations',
  concat(user_id, '/', case when n % 100 = 7 then md5(hash)::uuid else id end, '/0.png'), at, at
from made where n % 10 = 7 and status = 'completed';

-- Retention has something to do; nothing is refused for the length of the queue or for failures.
update private.settings set
  keep_generations = '300 days', breaker_failures = 32767,
  breaker_provider_failures = 32767;
update private.plans set busy_after = null;
drop table made, people;
