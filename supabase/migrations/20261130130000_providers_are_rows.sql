-- Any provider is a row: what to send and what an answer means is said by SQL.
--
-- `sql/` is the truth: this brings a database at work to it, in one statement, so in one transaction,
-- whoever applies it. It takes its locks first, and gives up after some five seconds: nothing is
-- changed then. Workers of the release before finish what they hold, and get no more jobs until
-- they are replaced: see Upgrading in docs/RUNBOOK.md.

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
    private.model_stats,
    private.plans,
    private.purchases,
    private.retention_walks,
    private.retries,
    private.routines,
    private.skipped_rows,
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

alter table private.workers
  add column keys text[] not null default '{REPLICATE_API_TOKEN}';
alter table private.workers alter column keys drop default;

-- What goes, or comes anew.

alter table public.models drop constraint models_provider_is_known;

drop index if exists private.ready_jobs_model_idx;

drop view if exists
private.costs,
private.paused_models,
private.queue_by_model,
private.recent_attempts,
private.running_now,
private.waiting_now;

drop function if exists
private.claim_jobs(p_worker_id bigint, p_slots integer),
private.count_failure(p_name text, p_job private.running_jobs, p_code text, p_threshold integer),
private.finish_delivery(p_delivery_id uuid, p_token bigint, p_outcome text, p_status integer, p_error text, p_retry_after_seconds double precision, p_ticket text),
private.gate_of(p_model_id text, p_provider text, OUT is_open boolean, OUT is_shut boolean, OUT is_over boolean, OUT failed_users uuid[], OUT failed_at_provider uuid[]),
private.is_busy(p_plan private.plans),
private.note_failures(p_jobs private.running_jobs[], p_codes text[]),
private.pick_admitted_jobs(p_at_most integer),
private.put_off(p_due regclass, p_began timestamp with time zone),
private.refuse_limits(p_user_id uuid),
private.register_worker(p_host text, p_slots integer, p_version text),
private.requeue_job(p_job private.running_jobs, p_outcome text, p_attempts_used integer, p_delay interval, p_resumes boolean, p_metrics jsonb, p_code text, p_detail text),
private.wake_workers(p_at_most integer);

alter table private.ready_jobs drop column input_sha256;

alter table private.running_jobs drop column input_sha256;

-- What comes, from sql/.

create table private.sources (
  source_id uuid,
  generation_id uuid,
  primary key (source_id, generation_id)
);

comment on table private.sources is
  'Which generations were made from the pictures of another, to be found by that one.';

create table private.providers (
  name text primary key,
  base_url text,
  secret text,
  key_hosts text[] not null default '{}',
  hosts text[] not null default '{}',
  max_running integer,
  result_ttl interval,
  lost_create text not null,
  settle interval not null default '20 seconds',
  buys_again boolean not null default false,
  is_active boolean not null default true,
  recipe jsonb,
  constraint providers_name_has_no_slash check (name ~ '^[a-z0-9_.-]+$'),
  constraint providers_base_url_is_an_address check (
    base_url ~ '^https?://[^\s/?#@]+(/[^\s?#]*[^\s?#/])?$'
  ),
  constraint providers_secret_is_the_name_of_a_key check (
    secret ~ '^[A-Z][A-Z0-9_]*_(KEY|TOKEN)$'
  ),
  constraint providers_lost_create_is_known check (lost_create in ('key', 'find', 'unknown')),
  constraint providers_max_running_is_positive check (max_running > 0),
  constraint providers_settle_is_not_long check (settle between '0' and '10 minutes'),
  constraint providers_recipe_creates_at_an_address check (
    recipe is null or base_url <> '' and recipe -> 'create' ->> 'url' <> ''
  )
);

comment on table private.providers is 'Who makes the pictures, and how to talk to them.';

comment on column private.providers.base_url is '{{base}} in the recipe.';

comment on column private.providers.secret is
  'Name of the variable of the worker''s environment that holds the key, …_KEY or …_TOKEN; null: '
  'none is needed. A worker takes jobs of those providers only whose key it has.';

comment on column private.providers.key_hosts is
  'Hosts of the provider''s API beside that of base_url, to which answers may lead and the key may '
  'go: names, or *.name for all below one.';

comment on column private.providers.hosts is
  'Hosts of outputs beside those of the API. The key does not go there.';

comment on column private.providers.max_running is
  'Jobs at once over all workers; null: as many as there are slots.';

comment on column private.providers.result_ttl is
  'How long outputs can be fetched after the end; null: not known.';

comment on column private.providers.lost_create is
  'What can be known of a create whose answer was lost: key (we name the job and can ask for it), '
  'find (it can be looked up by its whole input), unknown.';

comment on column private.providers.settle is
  'How long a lost create is looked for, where it can be, before it counts as not bought.';

comment on column private.providers.buys_again is
  'Where a lost create is unknown: create once more and perhaps pay twice; false: fail and refund.';

comment on column private.providers.recipe is
  '{headers, create, poll, result, cancel, find: {method, url, headers, body, and where in the '
  'answer: id, handles, state, outputs …}}: see docs/providers.md. null: the worker draws the '
  'pictures itself.';

alter table public.models
  add column if not exists outputs_path jsonpath,
  add column if not exists input_template jsonb;

comment on column public.models.provider_ref is
  'What the provider calls the model: owner/name, owner/name:version, fal-ai/flux/dev.';

comment on column public.models.input_template is
  'What the provider is sent in place of the input, with {{input.name}} where a value of it goes: '
  'a graph for ComfyUI, say. What comes out null is left out.';

comment on column public.models.outputs_path is
  'Where the pictures are in the provider''s answer, in place of the outputs of its recipe, for a '
  'model that answers others too: a SQL/JSON path, in which $count is how many are asked for. '
  '$.output[last - $count + 1 to last] takes the last; null: the first of what the recipe finds.';

create table private.model_routes (
  model_id text references public.models (id) on delete cascade,
  place smallint,
  provider text not null references private.providers (name),
  provider_ref text not null,
  input_template jsonb,
  outputs_path jsonpath,
  cost_usd numeric(12, 6),
  cost_unit text,
  primary key (model_id, place),
  constraint model_routes_come_after_the_models_own check (place > 0),
  constraint model_routes_cost_has_a_unit check (
    (cost_usd is null) = (cost_unit is null) and cost_usd >= 0 and cost_unit in ('image', 'second')
  )
);

comment on table private.model_routes is
  'Other ways to a model, in order of place, for when the one in public.models does not serve. The '
  'user pays the model''s price whichever is taken.';

create index model_routes_provider_idx on private.model_routes (provider);

create view private.routes with (security_invoker = true) as
select
  id as model_id,
  0::smallint as place,
  id as breaker,
  provider,
  provider_ref,
  input_template,
  outputs_path,
  cost_usd,
  cost_unit
from public.models
union all
select
  model_id,
  place,
  model_id || '#' || place as breaker,
  provider,
  provider_ref,
  input_template,
  outputs_path,
  cost_usd,
  cost_unit
from private.model_routes;

comment on view private.routes is
  'All ways to each model. Place 0 is the one in public.models. breaker: the name of its own (28).';

create index models_provider_idx on public.models (provider);

alter table private.ready_jobs
  add column if not exists route smallint default 0 not null,
  add column if not exists handles jsonb,
  add column if not exists sent_input jsonb;

comment on column private.ready_jobs.attempt is 'Attempts used so far on its route.';

comment on column private.ready_jobs.handles is 'This and the next: see running_jobs.';

comment on column private.ready_jobs.route is
  'Place of the route it takes: if that is shut, the claim takes the next, unless it resumes.';

create index ready_jobs_model_idx on private.ready_jobs (model_id, route, fair_key, seq)
where run_at is null;

alter table private.running_jobs
  add column if not exists route smallint default 0 not null,
  add column if not exists sent_input jsonb,
  add column if not exists handles jsonb;

comment on column private.running_jobs.handles is
  'What else the provider answered with its id, by the names of its recipe: addresses to follow.';

comment on column private.running_jobs.sent_input is
  'What the provider was last asked to create, where that has addresses of sources: they are made '
  'anew each time. null with such a job: nothing was asked for.';

alter table private.workers
  add column if not exists keys text[] not null;

comment on column private.workers.keys is
  'Names of the keys that it has, as in providers.secret: it takes no jobs that need others.';

alter table private.attempts
  add column if not exists provider text;

comment on column private.attempts.provider is 'That of the route taken.';

comment on column private.attempts.attempt is
  'Attempt number on its route; a released or throttled claim shares it with the next, so '
  '(generation, token) is the key.';

alter table private.error_codes
  add column if not exists pauses_model boolean default false not null;

comment on column private.error_codes.pauses_model is
  'True: no job of the model can do better until an operator has mended it and calls resume_model. '
  'All of them wait.';

create table private.provider_words (
  place integer primary key,
  provider text references private.providers (name) on delete cascade,
  pattern text not null,
  code text not null references private.error_codes (code),
  constraint provider_words_pattern_is_a_regular_expression check ('' ~* pattern is not null)
);

comment on table private.provider_words is
  'What a provider''s own words about a failed job mean: the first pattern that fits, in the order '
  'of place. A row may be added while all runs.';

comment on column private.provider_words.provider is 'null: of any.';

comment on column private.provider_words.pattern is
  'Regular expression, whatever the case, as PostgreSQL reads it.';

create index provider_words_provider_idx on private.provider_words (provider);

create index provider_words_code_idx on private.provider_words (code);

alter table private.settings
  add column if not exists max_claims smallint default 100 not null;

comment on column private.settings.max_claims is
  'A job claimed this often is not retried any more, whether or not its attempts counted.';

comment on column private.settings.retry_base is
  'Retry n of a job waits retry_base * 2^(n-1), at most retry_cap, or down to half of that.';

create or replace function private.is_plain_path(p_path text) returns boolean
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select octet_length(p_path) <= 512
    and p_path ~ '^[^/]+(/[^/]+)+$'
    and p_path !~* '(/|\\|%(25)*(2f|5c))(\.|%(25)*2e){1,2}(/|\\|%(25)*(2f|5c)|$)'
$$;

create or replace function private.may_store_input(p_path text) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
  return private.is_plain_path(p_path) and (
    -- As a filter: the planner may else read the whole bucket.
    select count(*) filter (where o.bucket_id = 'inputs' and o.name <> p_path)
      < (select s.max_input_files from private.settings as s)
    from storage.objects as o
    -- From <id>/ up to <id>0, the next character: operators that the index of names serves.
    where o.name ~>=~ concat(auth.uid(), '/') and o.name ~<~ concat(auth.uid(), '0')
  );
end;
$$;

alter table private.breakers
  add column if not exists counted uuid[] default '{}'::uuid[] not null;

comment on table private.breakers is
  'Routes and providers that failed or were paused: whether their jobs wait.';

comment on column private.breakers.counted is
  'What the failures said and of what, as hashes: equal ones count once.';

create view private.route_breakers with (security_invoker = true) as
select
  w.model_id,
  w.place,
  b as breaker
from private.routes as w
inner join private.breakers as b on b.name = any(array[w.provider, w.breaker, w.model_id])
-- What failures began is the own route's alone.
where b.name in (w.provider, w.breaker) or b.times_opened = 0;

comment on view private.route_breakers is
  'The breakers that shut each route: its own, its provider''s, and an operator''s of the model.';

create view private.served_providers with (security_invoker = true) as
select p.name
from private.providers as p
where p.is_active and (
  p.secret is null or exists (
    select from private.workers as w cross join private.settings as s
    where w.seen_at > now() - s.lease and p.secret = any(w.keys)
  )
);

comment on view private.served_providers is
  'Providers that are switched on, and need no key or one that a living worker has.';

create view private.paused_models with (security_invoker = true) as
select
  m.id,
  case when not exists (
    select from private.model_routes as w
    inner join private.served_providers as s on w.provider = s.name
    where w.model_id = m.id and not exists (
      select from private.route_breakers as o
      where o.model_id = w.model_id and o.place = w.place and (o.breaker).paused_until is not null
    )
  ) then b.paused_until end as paused_until,
  b.resumed_at,
  b.times_opened
from private.breakers as b
inner join public.models as m on b.name in (m.id, m.provider)
where b.paused_until is not null or b.resumed_at is not null;

comment on view private.paused_models is
  'Models that are paused, themselves or with their provider, by all routes, or were.';

create or replace function private.paused_until(p_model public.models, p_user_id uuid) returns timestamptz
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_until timestamptz;
  v_is_suspected boolean;
begin
  select
    max(b.paused_until) filter (
      where b.paused_until > now() and (b.failed_users = '{}' or p_user_id = any (b.failed_users))
    ),
    bool_or(p_user_id = any (b.failed_users || b.doubted_users))
  into v_until, v_is_suspected
  from private.breakers as b where b.name in (p_model.id, p_model.provider);
  if v_until is not null then
    select case when count(*) = count(other.until) then least(v_until, min(other.until)) end
    into v_until
    from private.model_routes as w
    inner join private.served_providers as s on s.name = w.provider
    cross join lateral (
      select max((b.breaker).paused_until) as until
      from private.route_breakers as b
      where (b.model_id, b.place) = (w.model_id, w.place) and (b.breaker).paused_until > now() and (
        (b.breaker).failed_users = '{}' or p_user_id = any ((b.breaker).failed_users)
      )
    ) as other
    where w.model_id = p_model.id;
  end if;
  if v_is_suspected then
    v_until := greatest(v_until, (
      select recent.finished_at + s.breaker_window
      from private.settings as s
      cross join lateral (
        select g.finished_at from (
          select * from public.generations where user_id = p_user_id order by id desc limit 100
        ) as g
        inner join private.error_codes as e on e.code = g.error_code and e.trips_breaker
        where g.model_id = p_model.id and g.finished_at > now() - s.breaker_window
        order by g.finished_at desc offset s.breaker_failures - 1 limit 1
      ) as recent
    ));
  end if;
  return v_until;
end;
$$;

create or replace function private.count_failure(
  p_name text, p_job private.running_jobs, p_code text, p_words uuid, p_threshold integer
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_breaker private.breakers := (select b from private.breakers as b where b.name = p_name);
  v_settings private.settings := (select s from private.settings as s);
  v_is_closed boolean := private.breaker_state(v_breaker) = 'closed';
  v_opens boolean;
begin
  -- Neither who is doubted counts, nor what fails while an operator's pause lasts.
  if (v_is_closed and private.is_doubted(v_breaker, p_job.user_id))
    or (not v_is_closed and v_breaker.times_opened = 0) then
    return;
  end if;
  if v_is_closed and v_breaker.failing_since > now() - v_settings.breaker_window is not true then
    v_breaker.failures := 0;
    v_breaker.failing_since := now();
    v_breaker.failed_users := '{}';
  end if;
  if v_breaker.failures = 0 then
    v_breaker.counted := '{}';
  end if;
  if v_is_closed and p_words = any (v_breaker.counted) then
    return;
  end if;
  -- Where everybody waits, nobody in particular does.
  if cardinality(v_breaker.failed_users) between (not v_is_closed)::integer and 99
    and not p_job.user_id = any (v_breaker.failed_users) then
    v_breaker.failed_users := v_breaker.failed_users || p_job.user_id;
  end if;
  if v_is_closed then
    v_breaker.failures := v_breaker.failures + 1;
    v_breaker.counted := v_breaker.counted || p_words;
    v_opens := v_breaker.failures >= p_threshold
      and cardinality(v_breaker.failed_users) >= v_settings.breaker_users;
  else
    v_opens := v_breaker.probe_job_id = p_job.job_id and v_breaker.paused_until <= now();
  end if;
  if v_opens then
    v_breaker.pause_reason := case
      when v_is_closed then format('%s failures in a row, the last: %s', v_breaker.failures, p_code)
      else format('the probe failed: %s', p_code)
    end;
    v_breaker.failures := 0;
    v_breaker.times_opened := least(v_breaker.times_opened + 1, 1000);
    v_breaker.paused_until := now() + private.pause_length(v_breaker.times_opened);
  end if;
  update private.breakers set
    failures = v_breaker.failures, failing_since = v_breaker.failing_since,
    counted = v_breaker.counted, failed_users = v_breaker.failed_users,
    times_opened = v_breaker.times_opened, paused_until = v_breaker.paused_until, pause_reason = v_breaker.pause_reason
  where name = p_name;
end;
$$;

create or replace function private.note_failures(p_jobs private.running_jobs[]) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_settings private.settings := (select s from private.settings as s);
  v_job private.running_jobs;
  v_at bigint;
  v_provider text;
  v_route text;
  v_code text;
  v_words uuid;
  v_withdrawn text;
begin
  for v_at, v_provider, v_route, v_code, v_words, v_withdrawn in
    select
      j.ordinality,
      w.provider,
      w.breaker,
      e.code,
      md5(row(j.user_id, j.model_id, g.prompt, g.input, e.code, a.error_detail)::text)::uuid,
      case when e.pauses_model then concat_ws(': ', e.code, a.error_detail) end
    from unnest(p_jobs) with ordinality as j
    inner join private.attempts as a on a.generation_id = j.job_id and a.token = j.token
    inner join private.error_codes as e
      on e.code = a.error_code and (e.trips_breaker or e.pauses_model)
    inner join private.routes as w on w.model_id = j.model_id and w.place = j.route
    inner join public.generations as g on g.id = j.job_id
    order by w.provider, w.breaker, j.ordinality
  loop
    v_job := p_jobs[v_at];
    insert into private.breakers (name) values (v_provider), (v_route)
    on conflict do nothing;
    perform from private.breakers where name = v_provider for update;
    perform from private.breakers where name = v_route for update;
    if v_withdrawn is not null then
      perform private.set_pause(v_route, 'infinity', left(v_withdrawn, 500));
      -- Not an operator's, which would be one of the model's other routes, too.
      update private.breakers set times_opened = 1 where name = v_route;
      continue;
    end if;
    if exists (
      select from private.breakers as b
      where (b.name = v_provider and b.probe_job_id = v_job.job_id)
        or (b.name = v_route and private.breaker_state(b) = 'closed')
    ) then
      perform private.count_failure(
        v_provider, v_job, v_code, v_words, v_settings.breaker_provider_failures
      );
    end if;
    perform private.count_failure(v_route, v_job, v_code, v_words, v_settings.breaker_failures);
  end loop;
end;
$$;

create or replace function private.note_successes(p_jobs private.running_jobs[]) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_job record;
  v_is_resumed boolean;
begin
  for v_job in
    select j.job_id, j.user_id, j.claimed_at, names.name, w.provider
    from unnest(p_jobs) as j
    inner join private.routes as w on w.model_id = j.model_id and w.place = j.route
    cross join lateral (values (1, w.provider), (2, w.breaker)) as names (place, name)
    order by w.provider, names.place, w.breaker
  loop
    update private.breakers as b set
      doubted_users = case
        when b.failed_users <> '{}' and (b.times_opened = 0 or b.paused_until > now())
          then (array_remove(
            b.failed_users
            || case when b.doubted_at > now() - s.breaker_pause_cap then b.doubted_users end,
            v_job.user_id
          ))[:200]
        else b.doubted_users
      end,
      doubted_at = case
        when b.failed_users <> '{}' and (b.times_opened = 0 or b.paused_until > now()) then now()
        else b.doubted_at
      end,
      failures = 0, failing_since = null, failed_users = '{}', times_opened = 0,
      paused_until = null, pause_reason = null, probe_job_id = null,
      resumed_at = case when b.times_opened > 0 then now() else b.resumed_at end
    from private.settings as s
    where b.name = v_job.name and case b.times_opened
      when 0 then b.failures > 0
      else v_job.claimed_at > b.failing_since or v_job.job_id = b.probe_job_id
    end
    returning b.resumed_at = now() into v_is_resumed;
    if v_is_resumed then
      perform setval('private.scan_due', 0);  -- what waited may be far below the virtual clock
      perform private.wake_workers(1, array[v_job.provider]);
    end if;
  end loop;
end;
$$;

create or replace function private.pause_provider(
  p_provider text, p_seconds integer, p_reason text, p_user_id uuid default null
) returns boolean
language sql security definer set search_path = pg_catalog, pg_temp as $$
  insert into private.breakers as b (
    name, paused_until, pause_reason, times_opened, failing_since, failed_users
  )
  select
    p_provider, now() + greatest(s.breaker_pause, least(p_seconds, 3600) * interval '1 second'),
    left(p_reason, 500), 1, now(), array_remove(array[p_user_id], null)
  from private.settings as s
  where exists (select from private.routes as w where w.provider = p_provider)
  on conflict (name) do update set
    paused_until = greatest(b.paused_until, excluded.paused_until),
    pause_reason = excluded.pause_reason,
    times_opened = greatest(b.times_opened, 1),
    failing_since = case when b.times_opened = 0 then now() else b.failing_since end,
    failed_users = case
      when b.times_opened = 0 then excluded.failed_users
      when p_user_id is null or b.failed_users = '{}' then '{}'
      when p_user_id = any (b.failed_users) then b.failed_users
      else b.failed_users || p_user_id
    end,
    probe_job_id = null
  where (b.times_opened > 0 or b.paused_until > now() is not true)
    and (b.times_opened > 0 or not private.is_doubted(b, p_user_id));
  select exists (
    select from private.breakers as b where b.name = p_provider and b.paused_until > now()
  )
$$;

comment on function private.pause_provider is
  'Keeps the jobs of a provider from being claimed for a while, from settings.breaker_pause to an '
  'hour: the account was refused, and no job is to blame. Nothing fails and nobody is charged for '
  'it. With a user, where it is not sure that others would be refused, too: theirs wait, others'' '
  'are tried one by one. Answers whether it is paused now; not where others were served lately '
  'though this user failed: then the job is to blame.';

create or replace function private.set_pause(p_name text, p_until timestamptz, p_reason text) returns json
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_breaker private.breakers;
begin
  if not exists (
    select from private.routes as w where p_name in (w.model_id, w.breaker, w.provider)
  ) then
    perform private.refuse_missing(
      'model: no such model or provider',
      'Use the id of a model or the name of a provider in public.models.'
    );
  end if;
  insert into private.breakers as b (name, paused_until, pause_reason)
  values (p_name, p_until, p_reason)
  on conflict (name) do update set
    failures = 0, failing_since = null, failed_users = '{}', times_opened = 0, probe_job_id = null,
    paused_until = excluded.paused_until, pause_reason = excluded.pause_reason,
    resumed_at = case
      when p_until is null and b.paused_until is not null then now()
      else b.resumed_at
    end
  returning * into v_breaker;
  return private.breaker_json(v_breaker);
end;
$$;

comment on function public.pause_model is
  'Pauses a model, or all that a provider makes, or one route of a model (owner/name#1), until a '
  'time or resume_model: jobs take another route; where there is none, new requests are refused '
  'with model_paused, queued jobs wait and keep their place. Running ones go on. Answers '
  '{name, state (open | closed | half-open | probing), paused_until, reason, failures, '
  'times_opened}. Errors: PT400 invalid_input, PT404 not_found.';

create or replace function public.resume_model(model text) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_answer json;
begin
  perform private.require_writable();
  v_answer := private.set_pause(model, null, null);
  perform setval('private.scan_due', 0);
  perform private.wake_workers(1, array(
    select w.provider from private.routes as w
    where resume_model.model in (w.model_id, w.breaker, w.provider) order by w.place
  ));
  return v_answer;
end;
$$;

comment on function public.resume_model is
  'Ends a pause of a model, a route or a provider, whoever began it: its jobs are claimed at once, '
  'in their old order. Repeating it changes nothing. Answers as pause_model does. Errors: PT404 '
  'not_found.';

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
  if v_plan.max_active <= (
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

create or replace function private.read_size(p_word text, out shape float8, out area float8)
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_word text := lower(p_word);
  v_sides float8[] := regexp_match(v_word, '(?:^|\D)(\d{1,5}) ?[:x*×_/] ?(\d{1,5})$')::float8[];
  v_number text[] := regexp_match(v_word, '(?:^|_)(\d{1,5}(?:\.\d+)?) ?(k|mp|px?)?$');
begin
  if v_sides[1] > 0 and v_sides[2] > 0 then
    shape := case
      when v_word like '%portrait%' then least(v_sides[1] / v_sides[2], v_sides[2] / v_sides[1])
      else v_sides[1] / v_sides[2]
    end;
    area := case when least(v_sides[1], v_sides[2]) >= 64 then v_sides[1] * v_sides[2] end;
  elsif v_number[1]::float8 > 0 then
    area := case
      when v_number[2] = 'k' then (v_number[1]::float8 * 1024) ^ 2
      when v_number[2] = 'mp' or v_number[1]::float8 < 64 then v_number[1]::float8 * 1000000
      else v_number[1]::float8 ^ 2
    end;
  else
    shape := case substring(v_word from 'square|landscape|portrait')
      when 'square' then 1 when 'landscape' then 1.5 when 'portrait' then 0.67
    end;
    area := case when v_word = 'square' then 512 ^ 2 when shape = 1 then 1024 ^ 2 end;
  end if;
end;
$$;

create or replace function private.size_inputs() returns text[]
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  return array[
    'aspect_ratio', 'size', 'image_size', 'resolution', 'image_dimensions', 'image_resolution',
    'target_resolution', 'megapixels', 'output_megapixels'
  ];
end;
$$;

create or replace function private.size_sent(p_sent jsonb) returns jsonb
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  return (
    select coalesce(jsonb_object_agg(s.name, p_sent -> s.name), '{}')
    from unnest('{width,height}'::text[] || private.size_inputs()) as s (name)
    where p_sent ? s.name
  );
end;
$$;

create or replace function private.map_size(p_model public.models, p_params jsonb) returns jsonb
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_properties jsonb := p_model.input_schema -> 'properties';
  v_names text[] := array['width', 'height'];
  v_takes_pixels boolean := p_model.client_inputs @> v_names;
  v_sides float8[] := case
    when p_params -> 'width' between '1' and '16384' and p_params -> 'height' between '1' and '16384'
      then array[(p_params ->> 'width')::float8, (p_params ->> 'height')::float8]
  end;
  v_ratio float8[] := regexp_match(
    p_params ->> 'aspect_ratio', '^0*([1-9]\d{0,3}):0*([1-9]\d{0,3})$'
  )::float8[];
  v_rest jsonb := p_params;
  v_shape float8;
  v_area float8 := 1048576;
  v_rules jsonb;
  v_choices integer[];
  v_step float8[];
  v_least float8[];
  v_most float8[];
  v_factor float8;
  v_side float8;
  v_size jsonb := jsonb '{}';
begin
  if p_params ? 'aspect_ratio' and 'aspect_ratio' = any (p_model.client_inputs)
    and private.input_problem(p_params -> 'aspect_ratio', v_properties -> 'aspect_ratio') is null
  then
    return case when v_takes_pixels then p_params else p_params - v_names end;
  elsif v_ratio is not null then
    v_shape := v_ratio[1] / v_ratio[2];
    v_rest := p_params - 'aspect_ratio'::text;
  end if;
  if v_sides is not null then
    v_shape := coalesce(v_shape, v_sides[1] / v_sides[2]);
    v_area := v_sides[1] * v_sides[2];
    v_rest := v_rest - v_names;
  end if;
  if v_shape is null then
    return p_params;
  elsif v_takes_pixels
    and (v_sides is not null or not 'aspect_ratio' = any (p_model.client_inputs)) then
    for v_at in 1 .. 2 loop
      v_rules := v_properties -> v_names[v_at];
      v_choices := case when v_rules ? 'enum' then array(
        select e.side::integer from jsonb_array_elements_text(v_rules -> 'enum') as e (side)
        where e.side ~ '^\d{1,5}$' order by 1
      ) end;
      -- Of what we choose, multiples of 64, as diffusion models like them.
      v_step[v_at] := coalesce((v_rules ->> 'multipleOf')::float8, 1);
      if v_sides is null and 64 / v_step[v_at] = floor(64 / v_step[v_at]) then
        v_step[v_at] := 64;
      end if;
      v_least[v_at] := coalesce(v_choices[1], (v_rules ->> 'minimum')::float8, 64);
      v_least[v_at] := ceil(v_least[v_at] / v_step[v_at]) * v_step[v_at];
      v_most[v_at] := coalesce(
        v_choices[cardinality(v_choices)], (v_rules ->> 'maximum')::float8, 2048
      );
      v_most[v_at] := floor(v_most[v_at] / v_step[v_at]) * v_step[v_at];
    end loop;
    if v_sides is null then
      v_area := coalesce(
        (v_properties #>> '{width,default}')::float8
        * (v_properties #>> '{height,default}')::float8, v_area
      );
      v_sides := array[sqrt(v_area * v_shape), sqrt(v_area / v_shape)];
    end if;
    v_factor := greatest(
      least(1, v_most[1] / v_sides[1], v_most[2] / v_sides[2]),
      v_least[1] / v_sides[1], v_least[2] / v_sides[2]
    );
    for v_at in 1 .. 2 loop
      v_side := v_sides[v_at] * v_factor;
      v_size := v_size || jsonb_build_object(v_names[v_at], case
        when v_properties -> v_names[v_at] ? 'enum' then (
          select e.side
          from jsonb_array_elements(v_properties -> v_names[v_at] -> 'enum') as e (side)
          where e.side #>> '{}' ~ '^\d{1,5}$'
          order by abs((e.side #>> '{}')::float8 - v_side) limit 1
        )
        else to_jsonb(least(
          v_most[v_at], greatest(v_least[v_at], round(v_side / v_step[v_at]) * v_step[v_at])
        ))
      end);
    end loop;
    -- Some look at pixels only when asked for a custom shape.
    if v_properties ?| '{aspect_ratio,size}' then
      select coalesce(jsonb_object_agg(c.name, 'custom'), '{}') || v_size into v_size
      from unnest('{aspect_ratio,size}'::text[]) as c (name)
      where c.name = any (p_model.client_inputs)
        and v_properties #> array[c.name, 'enum'] @> '["custom"]';
    end if;
  else
    with words as (
      select
        i.name, i.place, e.word, w.shape, w.area,
        bool_or(w.shape > 0) over (partition by i.name) as is_of_shapes
      from unnest(private.size_inputs()) with ordinality as i (name, place)
      cross join jsonb_array_elements(
        coalesce(v_properties #> array[i.name, 'enum'], '[]')
      ) as e (word)
      cross join private.read_size(e.word #>> '{}') as w
      where i.name = any (p_model.client_inputs)
    )
    select coalesce(jsonb_object_agg(best.name, best.word), '{}') into v_size from (
      (
        select w.name, w.word from words as w where w.shape > 0
        order by
          w.place, abs(ln(w.shape / v_shape)), abs(ln(coalesce(w.area, v_area) / v_area)) limit 1
      )
      union all
      (
        select distinct on (w.name) w.name, w.word from words as w
        where w.area > 0 and w.is_of_shapes is not true and v_sides is not null
        order by w.name, abs(ln(w.area / v_area))
      )
    ) as best;
  end if;
  return v_size || v_rest;
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
      when not (starts_with(p.part[2], p_user_id || '/') and private.is_plain_path(p.part[2]))
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

create or replace function private.provider_inputs(
  p_model public.models, p_user_id uuid, p_params jsonb, p_prompts text[],
  p_field text default 'prompt'
) returns jsonb[]
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_params jsonb := jsonb_strip_nulls(p_params);
  v_rules jsonb := p_model.input_schema -> 'properties';
  v_prompt_rules jsonb;
  v_name text;
  v_problem text;
  v_inputs jsonb[];
begin
  if v_params - p_model.client_inputs <> '{}'
    or v_params ?& '{width,height}' and v_rules ?| '{aspect_ratio,size}'
    or p_params @> '{"reuse": null}' then
    if jsonb_typeof(p_params -> 'reuse') <> 'boolean' then
      perform private.refuse_input('params.reuse: not of type boolean');
    elsif v_params @> '{"reuse": true}' and not v_params ? 'seed' then
      perform private.refuse_input(
        'params.reuse: needs params.seed', 'Without a seed every picture is another one.'
      );
    end if;
    v_params := private.map_size(p_model, v_params - 'reuse');
    v_name := (
      select min(f.name) from jsonb_object_keys(v_params - p_model.client_inputs) as f (name)
    );
    if v_name is not null then
      perform private.refuse_input(
        format('params.%s: not an input of %s', left(v_name, 60), p_model.id),
        'Allowed: ' || array_to_string(p_model.client_inputs, ', ')
      );
    end if;
  end if;
  foreach v_name in array p_model.client_inputs loop
    -- A plain number, what is asked most, costs no call.
    if (case when v_params ? v_name then (
      jsonb_typeof(v_params -> v_name) = 'number' and (v_params -> v_name)::numeric % 1 = 0
      and (v_rules -> v_name) - '{default,maximum,minimum}'::text[] = '{"type": "integer"}'
      and v_params -> v_name >= v_rules -> v_name -> 'minimum'
      and v_params -> v_name <= v_rules -> v_name -> 'maximum'
    ) is not true else v_name = any (p_model.required_inputs) end) then
      v_problem := case when v_params ? v_name
        then private.input_problem(v_params -> v_name, v_rules -> v_name) else 'missing'
      end;
      if v_problem is not null and v_params ? v_name
        and v_name in ('aspect_ratio', 'width', 'height') then
        v_params := private.map_size(p_model, v_params);
        v_problem := case when v_params ? v_name
          then private.input_problem(v_params -> v_name, v_rules -> v_name)
        end;
      end if;
      if v_problem is not null then
        perform private.refuse_input(format('params.%s: %s', v_name, v_problem));
      end if;
    end if;
  end loop;
  if v_params ?| p_model.image_inputs then
    perform private.check_source_images(p_model, p_user_id, v_params);
  end if;
  v_params := p_model.default_input || v_params || p_model.operator_input;
  for v_at in 1 .. cardinality(p_prompts) loop
    if (
      p_prompts[v_at] ~ '[0-9A-Za-z]'
      and (v_rules -> p_model.prompt_input) - 'default'::text = '{"type": "string"}'
    ) is not true then
      v_prompt_rules := v_rules -> p_model.prompt_input;
      if not private.is_blank(p_prompts[v_at]) then
        v_problem := case when v_prompt_rules ?| '{anyOf,enum,maxLength,minLength}'
          then private.input_problem(to_jsonb(p_prompts[v_at]), v_prompt_rules)
        end;
      -- One that is given a picture, an upscaler say, may do without.
      elsif p_model.prompt_input is null or v_params ?| p_model.image_inputs
        and (p_model.input_schema -> 'required' ? p_model.prompt_input) is not true then
        p_prompts[v_at] := null;
      else
        v_problem := 'missing or blank';
      end if;
      if v_problem is not null then
        perform private.refuse_input(format(p_field || ': %2$s', v_at - 1, v_problem));
      end if;
    end if;
    v_inputs[v_at] := v_params || case
      when p_model.prompt_input is not null and p_prompts[v_at] is not null
        then jsonb_build_object(p_model.prompt_input, p_prompts[v_at])
      else '{}'
    end || case
      when p_model.highest_seed is not null and not v_params ? 'seed'
        then jsonb_build_object('seed', p_model.lowest_seed + floor(
          random() * (p_model.highest_seed - p_model.lowest_seed + 1)
        )::bigint)
      else '{}'
    end;
  end loop;
  return v_inputs;
end;
$$;

create or replace function private.forecast_jobs(
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

create or replace function private.wake_workers(
  p_at_most integer default 1, p_providers text[] default null
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_worker_id bigint;
begin
  for v_worker_id in
    update private.workers set asleep = false
    where id = any (array(
      select w.id from private.workers as w
      cross join lateral (
        select min(array_position(p_providers, p.name)) as place
        from private.providers as p
        where p.name = any (p_providers) and p.is_active
          and (p.secret is null or p.secret = any (w.keys))
      ) as served
      where w.asleep and w.seen_at > now() - (select s.lease from private.settings as s)
        and (p_providers is null or served.place is not null)
      order by served.place, w.seen_at desc limit p_at_most for update of w skip locked
    ))
    returning id
  loop
    perform pg_notify('darkroom_worker_' || v_worker_id, '');
  end loop;
end;
$$;

create or replace function private.known_answer(
  p_known public.generations, p_credits integer, p_is_reused boolean default false
) returns json
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return json_build_object(
    'job_id', p_known.id,
    'status', p_known.status,
    'reused', p_is_reused,
    'credits_left', p_credits,
    'queue_position', null,
    'eta_seconds', null,
    'poll_after_ms', case
      when p_known.finished_at is null then private.poll_after_ms(p_known.created_at)
    end,
    'size', case
      when p_known.input ?| '{aspect_ratio,width,height}'
        and not p_known.provider_input @> p_known.input
        then private.size_sent(p_known.provider_input)
    end
  );
end;
$$;

create or replace function private.accept(
  p_gate private.gate, p_name text, p_params jsonb, p_prompts text[], p_inputs jsonb[],
  p_idempotency_key text default null, p_batch_id uuid default null, p_retry_of uuid default null,
  p_is_free boolean default false
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
  if v_is_anybody_asleep then
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

create or replace function private.register_worker(
  p_host text, p_slots integer, p_version text, p_keys text[] default '{REPLICATE_API_TOKEN}'
)
returns table (worker_id bigint, channel text, heartbeat_seconds real, lease_seconds real)
language sql security definer set search_path = pg_catalog, pg_temp as $$
  with registered as (
    insert into private.workers (host, slots, version, keys)
    values (left(p_host, 200), p_slots, left(p_version, 50), p_keys)
    returning id
  )
  select
    r.id,
    'darkroom_worker_' || r.id,
    extract(epoch from s.heartbeat)::real,
    extract(epoch from s.lease)::real
  from registered as r
  cross join private.settings as s
$$;

comment on function private.register_worker is
  'Enters a worker process. p_keys are names of variables, never what they hold. Answers its id, '
  'the channel to LISTEN on, and the intervals in seconds.';

create or replace function private.put_off(
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

create or replace function private.gate_of(
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
  failed_at_provider uuid array
);

comment on type private.way is
  'A route that jobs which wait may take, and what keeps them back: see private.gate_of().';

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
    select jsonb_object_agg(p.name, case when p.name = any (v_held) then p.max_running - (
      select coalesce(sum(j.jobs), 0)
      from (
        select r.model_id, r.route, count(*) as jobs
        from private.running_jobs as r group by r.model_id, r.route
      ) as j
      where p.name = (
        select w.provider from private.routes as w
        where w.model_id = j.model_id and w.place = j.route
      )
    ) else 0 end)
    from private.providers as p
    where p.name = any (p_providers) and p.max_running is not null
  );
end;
$$;

create or replace function private.pick_admitted_jobs(p_at_most integer, p_keys text[]) returns uuid[]
language plpgsql set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
declare
  v_began timestamptz := clock_timestamp();
  v_from bigint := 0;
  v_served text[];
  v_ways private.way[];
  v_rooms jsonb;
  v_candidates uuid[];
  v_places smallint[];
  v_breaker private.breakers;
  v_own uuid[];
  v_ids uuid[];
begin
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
        coalesce(way.place = own.place, true) as is_own, may.is_mine, gate.*,
        bool_or(gate.is_open and (may.is_mine or way.provider = any (v_served))) over (
          in_turn rows between unbounded preceding and 1 preceding
        ) as is_behind
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
      window in_turn as (
        partition by w.model_id, w.route order by way.place < own.place, way.place
      )
    )
    select (
      w.model_id, w.route, w.place, w.turn, w.provider, w.is_own, w.is_mine, w.is_open, w.is_shut,
      w.is_over, w.failed_users, w.failed_at_provider
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
              and not r.user_id = any (w.failed_users)
            order by r.model_id, r.route, r.fair_key, r.seq
            limit case when w.is_open then p_at_most + 1 else 1 end
          )
          union all
          (
            select
              r.job_id, r.fair_key, r.seq, r.user_id = any (w.failed_users),
              r.user_id = any (w.failed_at_provider)
            from private.ready_jobs as r
            where r.run_at is null and r.fair_key >= v_from and w.is_over
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
  v_left integer := p_slots;
  v_from bigint := 0;
  v_began timestamptz;
  v_clock bigint;
  v_ids uuid[];
  v_claimed integer;
begin
  select
    pg_sequence_last_value('private.scan_due') = 0
    or exists (select from private.breakers as b where b.paused_until is not null),
    exists (select from private.ready_jobs as r where r.run_at <= now())
  into v_are_chosen, v_are_due;
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
      v_ids := private.pick_admitted_jobs(v_left, p_keys);
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
    end if;
    exit when v_ids = '{}';
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
        job_id, user_id, model_id, token, worker_id, attempt,
        lease_until, deadline_at, provider_job_id, create_started_at, handles, sent_input, route
      )
      select
        n.job_id, n.user_id, n.model_id, n.token, p_worker_id, n.attempt + 1, now() + s.lease,
        now() + coalesce(n.deadline, s.lease), n.provider_job_id,
        coalesce(n.create_started_at, now()), n.handles, n.sent_input, n.place
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
    if v_claimed = cardinality(v_ids) then
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
  'creating again. Seconds are durations; what follows them is the provider''s row.';

create or replace function private.fill(p_template jsonb, p_values jsonb) returns jsonb
language plpgsql immutable strict set search_path = pg_catalog, pg_temp as $$
declare
  v_filled text := '';
  v_rest text := p_template::text;
  v_place text;
  v_path text[];
begin
  loop
    v_place := substring(v_rest from '"\{\{[\w.]+\}\}"|\{\{[\w.]+\}\}');
    exit when v_place is null;
    v_path := string_to_array(btrim(v_place, '"{}'), '.');
    v_filled := v_filled || left(v_rest, position(v_place in v_rest) - 1) || case
      when v_place like '"%' then coalesce((p_values #> v_path)::text, 'null')
      else regexp_replace(to_jsonb(coalesce(p_values #>> v_path, ''))::text, '^"|"$', '', 'g')
    end;
    v_rest := substr(v_rest, position(v_place in v_rest) + length(v_place));
  end loop;
  return (v_filled || v_rest)::jsonb;
end;
$$;

create or replace function private.fill_url(p_template text, p_values jsonb) returns text
language plpgsql immutable strict set search_path = pg_catalog, pg_temp as $$
declare
  v_filled text := '';
  v_rest text := p_template;
  v_place text;
  v_value text;
begin
  loop
    v_place := substring(v_rest from '\{\{[\w.]+\}\}');
    exit when v_place is null;
    v_filled := v_filled || left(v_rest, position(v_place in v_rest) - 1);
    v_rest := substr(v_rest, position(v_place in v_rest) + length(v_place));
    v_value := left(coalesce(p_values #>> string_to_array(btrim(v_place, '{}'), '.'), ''), 8000);
    v_filled := v_filled || case
      when v_filled = '' or v_value !~ '[^A-Za-z0-9._~/-]' then v_value
      else (
        select string_agg(case
          when c.char ~ '[A-Za-z0-9._~/-]' then c.char
          else upper(regexp_replace(encode(convert_to(c.char, 'utf8'), 'hex'), '(..)', '%\1', 'g'))
        end, '' order by c.at)
        from regexp_split_to_table(v_value, '') with ordinality as c (char, at)
      )
    end;
  end loop;
  return v_filled || v_rest;
end;
$$;

create or replace function private.requested(p_recipe jsonb, p_step jsonb, p_values jsonb) returns jsonb
language plpgsql immutable strict set search_path = pg_catalog, pg_temp as $$
begin
  return jsonb_build_object(
    'method', coalesce(p_step ->> 'method', 'GET'),
    'url', private.fill_url(p_step ->> 'url', p_values),
    'headers', private.fill(
      coalesce(p_recipe -> 'headers', '{}') || coalesce(p_step -> 'headers', '{}'), p_values
    ),
    'body', private.fill(p_step -> 'body', p_values),
    'seconds', p_step -> 'seconds_at_most'
  );
end;
$$;

create or replace function private.build_request(
  p_provider text, p_step text, p_values jsonb
) returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_provider private.providers := (select p from private.providers as p where p.name = p_provider);
  v_values jsonb := p_values || coalesce(v_provider.recipe -> 'places', '{}')
    || jsonb_build_object('base', v_provider.base_url, 'secret', '{{secret}}');
  v_step jsonb := v_provider.recipe -> p_step;
begin
  if jsonb_typeof(v_step) = 'array' then
    return (
      select jsonb_agg(private.requested(v_provider.recipe, s.step, v_values) order by s.n)
      from jsonb_array_elements(v_step) with ordinality as s (step, n)
    );
  end if;
  return private.requested(v_provider.recipe, v_step, v_values);
end;
$$;

comment on function private.build_request is
  'What to send to a provider for a step of its recipe: {method, url, headers, body, seconds}; '
  'null if the recipe has no such step. Places are filled from p_values, but for {{secret}}, which '
  'the worker puts into headers. A step that takes several requests gives an array of them.';

create or replace function private.at(p_body jsonb, p_paths jsonb, p_vars jsonb default '{}') returns jsonb[]
language plpgsql immutable strict set search_path = pg_catalog, pg_temp as $$
begin
  if jsonb_typeof(p_paths) = 'string' then
    return array(
      select f.value
      from jsonb_path_query(p_body, (p_paths #>> '{}')::jsonpath, p_vars, true) as f (value)
      where f.value <> 'null'
    );
  end if;
  return array(
    select f.value
    from jsonb_array_elements_text(p_paths) with ordinality as p (path, n)
    cross join lateral jsonb_path_query(p_body, p.path::jsonpath, p_vars, true)
      with ordinality as f (value, at)
    where f.value <> 'null' order by p.n, f.at
  );
end;
$$;

create or replace function private.words_at(p_body jsonb, p_paths jsonb) returns text
language plpgsql immutable strict set search_path = pg_catalog, pg_temp as $$
begin
  return (
    select left(string_agg(w.value #>> '{}', '; '), 20000)
    from unnest(private.at(p_body, p_paths)) as w (value)
  );
end;
$$;

create or replace function private.what_words_mean(p_provider text, p_words text) returns text
language plpgsql stable strict set search_path = pg_catalog, pg_temp as $$
begin
  return (
    select w.code from private.provider_words as w
    where (w.provider is null or w.provider = p_provider) and p_words ~* w.pattern
    order by w.place limit 1
  );
end;
$$;

create or replace function private.percent_in(p_logs text, p_images integer) returns integer
language plpgsql immutable strict set search_path = pg_catalog, pg_temp as $$
declare
  v_bar text[];
  v_done numeric;
  v_total numeric;
  v_bars integer := 0;
begin
  if position('%|' in p_logs) = 0 then
    return null;
  end if;
  for v_bar in
    select m.bar from regexp_matches(
      right(p_logs, 20000),
      '(?:^|[\r\n]) *\d{1,3}%\|[^|\r\n]*\| *(\d{1,9})/(0*[1-9]\d{0,8}) \[', 'g'
    ) as m (bar)
  loop
    if v_bar[1]::numeric < v_done or v_bar[2]::numeric = v_total is not true then
      v_bars := v_bars + 1;
    end if;
    v_done := v_bar[1]::numeric;
    v_total := v_bar[2]::numeric;
  end loop;
  return least(100, 100 * (v_bars - 1 + v_done / v_total) / greatest(v_bars, p_images))::integer;
end;
$$;

create or replace function private.read_answer(
  p_provider text, p_step text, p_status integer, p_headers jsonb, p_body jsonb,
  p_vars jsonb default '{}'
) returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_recipe jsonb := (select p.recipe from private.providers as p where p.name = p_provider);
  v_step jsonb := v_recipe -> coalesce(v_recipe -> p_step ->> 'as', p_step);
  v_outputs jsonb[];
  v_percent jsonb;
  v_is text;
  v_words text;
  v_code text;
begin
  if p_status between 200 and 299 is not true then
    v_words := private.words_at(p_body, v_recipe -> 'error_words');
    v_code := case
      when p_status = 0 or p_status = 429 then 'provider_busy'
      when p_status in (401, 402, 403) then 'provider_refused'
      when p_status between 300 and 599 then coalesce((
        select coalesce(
          e.value ->> 'code', private.what_words_mean(p_provider, v_words), 'provider_error'
        )
        from jsonb_array_elements(v_recipe -> 'errors') with ordinality as e (value, n)
        where (e.value ->> 'step' = p_step) is not false
          and private.at(p_body, e.value -> 'path', jsonb_build_object('status', p_status)) <> '{}'
        order by e.n limit 1
      ), case
        when p_step in ('poll', 'find') then null  -- what may be bought is not given up for that
        when p_status in (400, 409, 413, 415, 422)
          then coalesce(private.what_words_mean(p_provider, v_words), 'invalid_input')
        when p_status = 404 and p_step = 'create' then 'model_withdrawn'
        when p_status < 500 and p_status not in (404, 408, 425) then 'internal'
      end)
    end;
    return jsonb_strip_nulls(jsonb_build_object(
      'is', case
        when v_code = 'provider_busy' and p_step <> 'create' then 'again'
        when v_code is not null then 'failed'
        when p_status = 404 and p_step in ('poll', 'result') then 'missing'
        when p_step = 'create' then 'unsure'
        else 'again'
      end,
      'code', v_code,
      'reason', concat(p_step, ': ', coalesce('HTTP ' || nullif(p_status, 0), 'no answer')),
      'detail', left(coalesce(nullif(v_words, ''), p_body #>> '{}'), 2000),
      'retry_after', coalesce(
        private.asked_seconds(p_headers ->> 'retry-after'),
        private.asked_seconds((private.at(p_body, v_recipe -> 'retry_after'))[1] #>> '{}')
      )
    ));
  elsif p_step = 'find' then
    return jsonb_build_object(
      'is', 'found',
      'ids', array(
        select i.id
        from unnest(private.at(p_body, v_step -> 'items', p_vars))
          with ordinality as item (value, n)
        cross join lateral (
          select (private.at(item.value, v_step -> 'item_id'))[1] #>> '{}' as id
        ) as i
        where (private.at(item.value, v_step -> 'item_input'))[1] = p_vars -> 'input'
          and i.id ~ '^[\w.:-]{1,200}$'
        order by item.n desc
      ),
      'is_alive', coalesce(p_vars -> 'id' = any (private.at(p_body, v_step -> 'alive')), false),
      'next', (private.at(p_body, v_step -> 'next'))[1] #>> '{}'
    );
  end if;
  v_is := case
    when p_step = 'result' then 'done'
    when p_step = 'create' and v_step ? 'outputs' then 'done'
    when p_step = 'create' then 'accepted'
    when p_step = 'upload' then 'failed'  -- without the address that was asked for
    when jsonb_path_exists(p_body, (v_step ->> 'failed_if')::jsonpath, '{}', true) then 'failed'
    when jsonb_path_exists(p_body, (v_step ->> 'gone_if')::jsonpath, '{}', true) then 'gone'
    when jsonb_path_exists(p_body, (v_step ->> 'missing_if')::jsonpath, '{}', true) then 'missing'
    else coalesce(
      v_step -> 'states' ->> (
        jsonb_path_query_first(p_body, (v_step ->> 'state')::jsonpath, '{}', true) #>> '{}'
      ), 'running'
    )
  end;
  if v_is = 'done' and v_step ? 'outputs' then
    v_outputs := private.at(
      p_body, coalesce(nullif(p_vars -> 'outputs_path', 'null'), v_step -> 'outputs'), p_vars
    );
    if p_step = 'create' and v_outputs = '{}' then
      v_is := 'accepted';
    end if;
  elsif v_is in ('failed', 'stopped', 'moderated') then
    v_words := private.words_at(p_body, v_step -> 'words');
    v_code := case v_is
      when 'failed' then coalesce(private.what_words_mean(p_provider, v_words), 'provider_error')
      when 'stopped' then 'provider_error'
      else v_is
    end;
  end if;
  v_percent := jsonb_path_query_first(p_body, (v_step ->> 'percent')::jsonpath, '{}', true);
  return jsonb_strip_nulls(jsonb_build_object(
    'is', case when v_code is null then v_is else 'failed' end,
    'code', v_code,
    'reason', case when v_code is not null then p_step || ': ' || v_is end,
    'detail', left(v_words, 2000),
    'is_billed', case when v_is = 'failed' then false end,
    'id', jsonb_path_query_first(p_body, (v_step ->> 'id')::jsonpath, '{}', true) #>> '{}',
    'handles', case when v_is = 'accepted' then (
      select jsonb_object_agg(h.key, (private.at(p_body, h.value))[1])
      from jsonb_each(v_step -> 'handles') as h
    ) end,
    'outputs', case when v_is = 'done' and (p_step = 'result' or not v_recipe ? 'result') then
      coalesce((
        select jsonb_agg(case when v_step ? 'output_url'
          then to_jsonb(private.fill_url(v_step ->> 'output_url', o.value || p_vars))
          else o.value
        end order by o.n)
        from unnest(v_outputs) with ordinality as o (value, n)
        where jsonb_typeof(o.value) = case when v_step ? 'output_url' then 'object' else 'string' end
      ), '[]')
    end,
    'percent', case when jsonb_typeof(v_percent) = 'number'
      then greatest(0, least(100, v_percent::numeric))::integer
    end,
    'logs', jsonb_path_query_first(p_body, (v_step ->> 'logs')::jsonpath, '{}', true) #>> '{}',
    'seconds', jsonb_path_query_first(p_body, (v_step ->> 'seconds')::jsonpath, '{}', true),
    'images', jsonb_path_query_first(p_body, (v_step ->> 'images')::jsonpath, '{}', true),
    'cost_usd', jsonb_path_query_first(p_body, (v_step ->> 'cost_usd')::jsonpath, '{}', true)
  ));
end;
$$;

comment on function private.read_answer is
  'What an answer means, as far as it can be known from itself. p_status 0: nothing was sent; '
  'null: no answer came; p_vars is what build_request was given. Answers {is, …}: accepted (it '
  'will be made: id, handles); running (percent, logs); done (outputs, unless the step result '
  'fetches them); failed (code of error_codes, reason without and detail with the provider''s '
  'words, is_billed where known); gone (nothing is left of it); missing (it may be gone); again '
  '(no answer to speak of: once more, after retry_after if it says); unsure (of a create: it '
  'may have been bought); found (ids of what was created from the input, oldest first; '
  'is_alive; next page). With seconds, images and cost_usd where the provider says them.';

create or replace function private.adopt(
  p_job private.running_jobs, p_id text, p_handles jsonb default null
) returns boolean
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  insert into private.purchases (generation_id, provider_job_id) values (p_job.job_id, p_id)
  on conflict do nothing;
  if not found and p_id is distinct from p_job.provider_job_id then
    return false;
  end if;
  update private.running_jobs set provider_job_id = p_id, handles = p_handles
  where job_id = p_job.job_id;
  return true;
end;
$$;

create or replace function private.is_anothers(p_echo jsonb, p_input jsonb) returns boolean
language plpgsql immutable strict set search_path = pg_catalog, pg_temp as $$
begin
  return exists (
    select e.value
    from jsonb_path_query(
      p_echo, 'strict $.** ? (@.type() == "string" && @ like_regex "://")'
    ) as e (value)
    except
    select i.value from jsonb_path_query(p_input, 'strict $.**') as i (value)
  );
end;
$$;

create or replace function private.next_try(p_failures integer, p_asked_seconds double precision) returns real
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  return greatest(
    least(10, 0.25 * 2 ^ least(p_failures, 16)), least(60, coalesce(p_asked_seconds, 0))
  );
end;
$$;

create or replace function private.next_step(p_job private.running_jobs, p_answer jsonb) returns jsonb
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_generation public.generations;
  v_model public.models;
  v_route private.routes;
  v_provider private.providers;
  v_values jsonb;
  v_step text := p_answer ->> 'step';
  v_memo jsonb := coalesce(p_answer -> 'memo', '{}');
  v_tries integer := coalesce((p_answer #>> '{memo,tries}')::integer, 0);
  v_missed integer := coalesce((p_answer #>> '{memo,missed}')::integer, 0);
  v_is_blind boolean;  -- that a lost create is not found does not prove that nothing was bought
  v_known jsonb := '{}'::jsonb;
  v_is text;  -- as read_answer says; also ready, bought, absent
  v_send text;
  v_request jsonb;
  v_wait real := 0;
  v_id text;
begin
  select * into strict v_generation from public.generations where id = p_job.job_id;
  select * into v_model from public.models where id = p_job.model_id;
  select * into v_route from private.routes where model_id = p_job.model_id and place = p_job.route;
  select * into v_provider from private.providers where name = v_route.provider;
  if v_provider.recipe is null then
    return jsonb_build_object(
      'do', 'fail', 'code', 'internal', 'reason', 'there is no such provider any more'
    );
  end if;
  v_values := jsonb_build_object(
    'input', case
      when v_step = 'sources' then p_answer -> 'input'
      else coalesce(p_job.sent_input, v_generation.provider_input)
    end,
    'outputs_path', v_route.outputs_path,
    'count', v_generation.image_count,
    'ref', v_route.provider_ref,
    'app', substring(v_route.provider_ref from '^[^/]+/[^/]+'),
    'model', split_part(v_route.provider_ref, ':', 1),
    'version', split_part(v_route.provider_ref, ':', 2),
    'key', case when v_provider.lost_create = 'key' then md5(p_job.job_id || '/' || (
      select count(*) from private.purchases as b
      where b.generation_id = p_job.job_id
        and b.provider_job_id is distinct from p_job.provider_job_id
    ))::uuid end,
    'id', p_job.provider_job_id,
    'handles', p_job.handles,
    'deadline', greatest(5, extract(epoch from v_model.deadline)::integer),
    'since', to_char(
      (p_job.create_started_at - interval '1 minute') at time zone 'utc',
      'YYYY-MM-DD"T"HH24:MI:SS"+00:00"'
    ),
    'base', v_provider.base_url
  ) || coalesce(v_provider.recipe -> 'places', '{}');
  if v_route.input_template is not null then
    v_values := v_values || jsonb_build_object(
      'input', jsonb_strip_nulls(private.fill(v_route.input_template, v_values))
    );
  end if;
  if v_provider.lost_create = 'key' and p_job.provider_job_id is null then
    v_values := v_values || jsonb_build_object('id', v_values -> 'key');
  end if;
  v_is_blind := v_provider.recipe #> '{find,shows_all}' = 'true' is not true;

  -- What is known.
  if v_step is null and p_job.provider_job_id is not null then
    v_is := 'bought';
  elsif v_step is null and p_job.create_started_at < p_job.claimed_at and (
    p_job.sent_input is not null
    or not v_is_blind and not v_generation.provider_input ?| v_model.image_inputs
  ) then
    v_is := 'unsure';
  elsif v_step is null or v_step = 'sources' then
    v_is := 'ready';
  else
    v_known := private.read_answer(
      v_provider.name, v_step, (p_answer ->> 'status')::integer, p_answer -> 'headers',
      p_answer -> 'body', v_values
    );
    v_is := v_known ->> 'is';
    if v_step = 'poll' and v_known ->> 'id' <> v_values ->> 'id' then
      v_is := 'again';  -- the answer to another's question
      v_known := '{}';
    end if;
    v_known := v_known || jsonb_build_object(
      'reason', concat_ws(' ', v_known ->> 'reason', p_answer ->> 'error'),
      'metrics', jsonb_strip_nulls(jsonb_build_object(
        'is_asked', case when v_step = 'create' and v_is = 'failed' then false end,
        'is_billed', v_known -> 'is_billed',
        'provider_seconds', v_known -> 'seconds',
        'images', coalesce(v_known -> 'images', to_jsonb(jsonb_array_length(v_known -> 'outputs'))),
        'cost_usd', coalesce(
          v_known -> 'cost_usd', v_known #> '{handles,cost_usd}', p_job.handles -> 'cost_usd'
        )
      ))
    );
  end if;
  if v_step = 'cancel' then
    return jsonb_build_object('do', 'cancel', 'metrics', v_known -> 'metrics');
  end if;

  -- Whose refusal it is: the account's or, where that is open, this job's or its model's.
  if v_step = 'account' then
    return (v_memo -> 'refused') || jsonb_build_object(
      'is_sure', v_known ->> 'code' = 'provider_refused' is true,
      'do', case
        when v_memo @> '{"refused": {"is_forbidden": true}}'
          and v_known ->> 'code' = 'provider_refused' is not true then 'fail'
        else 'pause'
      end
    );
  elsif v_known ->> 'code' = 'provider_refused' then
    v_memo := jsonb_build_object('refused', v_known || jsonb_build_object(
      'is_forbidden', p_answer -> 'status' = '403', 'may_have_bought', v_step <> 'create',
      'is_sure', false, 'do', 'pause'
    ));
    if not v_provider.recipe ? 'account' then
      return v_memo -> 'refused';
    end if;
    v_send := 'account';
  end if;

  -- What is proven to be this job's, by its answer or by our key, becomes so.
  if v_is = 'accepted' and v_known ->> 'id' ~ '^[\w.:-]{1,200}$'
    and (v_provider.lost_create <> 'key' or v_known -> 'id' = v_values -> 'key')
    and length(v_known ->> 'handles') > 10000 is not true
    and private.is_anothers(
      (private.at(p_answer -> 'body', v_provider.recipe #> '{create,echo}'))[1], v_values -> 'input'
    ) is not true then
    v_id := v_known ->> 'id';
  elsif p_job.provider_job_id is null and v_step = 'poll' and v_is in ('running', 'done', 'failed')
    or p_job.provider_job_id is null and v_known @> '{"is_alive": true}' then
    v_id := v_values ->> 'id';
  end if;
  foreach v_id in array array_remove(
    v_id || array(select jsonb_array_elements_text(v_known -> 'ids')), null
  ) loop
    p_job.handles := coalesce(v_known -> 'handles', private.fill(
      v_provider.recipe #> '{find,handles}', v_values || jsonb_build_object('id', v_id)
    ));
    exit when private.adopt(p_job, v_id, p_job.handles);
    v_id := null;
  end loop;
  if v_id is not null then
    v_values := v_values || jsonb_build_object('id', v_id, 'handles', p_job.handles);
    p_job.provider_job_id := v_id;
  end if;
  if v_is = 'accepted' and v_id is null then
    v_is := 'unsure';
    v_known := v_known || '{"reason": "create: an answer without an id of its own"}';
  elsif v_is = 'found' then
    v_is := case
      when v_id is not null or v_known @> '{"is_alive": true}' then 'running'
      else 'missing'
    end;
  end if;

  -- What was not answered, and what is not found.
  if v_is = 'unsure' and v_provider.lost_create <> 'unknown' then
    v_send := case v_provider.lost_create when 'key' then 'poll' else 'find' end;
    v_memo := jsonb_strip_nulls(jsonb_build_object(
      'until', clock_timestamp() + v_provider.settle, 'lost', v_known -> 'reason'
    ));
  elsif v_is = 'missing' and v_known ->> 'next' <> '' then
    v_send := 'find';
    v_memo := v_memo || jsonb_build_object(
      'page', coalesce(substring(v_known ->> 'next' from '\?[^#]*'), ''),
      'pages', coalesce((v_memo ->> 'pages')::integer, 1) + 1
    );
    if v_memo @@ '$.pages > 50' then
      return v_known || '{"do": "fail", "code": "timeout", "reason": "find: too many pages"}';
    end if;
  elsif v_is = 'missing' and v_step <> 'find' and v_provider.recipe #> '{find,alive}' <> 'null' then
    v_send := 'find';
  elsif v_is = 'missing' and (
    p_job.provider_job_id is null and clock_timestamp() < (v_memo ->> 'until')::timestamptz
    or p_job.provider_job_id is not null and v_missed < 4
  ) then
    v_send := case v_provider.lost_create when 'key' then 'poll' else v_step end;
    v_wait := private.next_try(v_missed, null);
    v_memo := v_memo - '{page,pages}'::text[] || jsonb_build_object('missed', v_missed + 1);
  elsif v_is = 'unsure' or v_is = 'missing' and p_job.provider_job_id is null then
    if v_is_blind and not v_provider.buys_again then
      return v_known || jsonb_build_object(
        'do', 'fail', 'code', 'outcome_unknown', 'reason', coalesce(
          v_memo ->> 'lost', nullif(v_known ->> 'reason', ''), 'create: began in an attempt before'
        )
      );
    elsif v_step = 'create' or v_memo ? 'lost' then
      return v_known || jsonb_build_object(
        'do', 'fail', 'code', 'provider_timeout',
        'reason', coalesce(v_memo ->> 'lost', v_known ->> 'reason')
      );
    end if;
    v_is := 'ready';
  end if;

  -- What comes next.
  if v_is = 'done' and v_known ? 'outputs' then
    update private.running_jobs set stage = 'storing' where job_id = p_job.job_id;
    return v_known - 'logs' || case
      when p_job.cancel_requested then '{"do": "cancel"}'::jsonb
      when v_known -> 'outputs' = '[]'
        then '{"do": "fail", "code": "provider_error", "reason": "no output"}'
      else '{"do": "store"}'
    end;
  elsif v_is = 'failed' and v_send is null then
    return v_known - 'logs' || '{"do": "fail"}';
  elsif v_is = 'gone' or v_is = 'missing' and v_send is null then
    return v_known || jsonb_build_object(
      'do', 'fail', 'code', 'result_lost', 'reason', v_step || ': its result was removed'
    );
  elsif v_is = 'done' then
    v_send := 'result';
  elsif v_is = 'again' then
    v_send := v_step;
    v_wait := private.next_try(v_tries, (v_known ->> 'retry_after')::double precision);
    v_memo := v_memo || jsonb_build_object('tries', v_tries + 1);
  elsif v_is in ('bought', 'accepted', 'running') then
    v_send := 'poll';
    v_wait := case v_is
      when 'accepted' then 0.5
      when 'running' then least(3, 0.5 * 1.2 ^ least(v_tries, 20))
      else 0
    end;
    v_memo := jsonb_build_object('tries', v_tries + 1);
  end if;
  if v_send = 'upload' or v_is = 'ready' and v_step is distinct from 'sources'
    and v_generation.provider_input ?| v_model.image_inputs then
    return jsonb_build_object(
      'do', 'sources', 'wait', v_wait, 'memo', v_memo,
      'upload',
      (v_provider.recipe -> 'upload') || private.build_request(v_provider.name, 'upload', v_values)
    );
  elsif v_is = 'ready' then
    v_send := 'create';
    if v_step = 'sources' or v_is_blind then
      update private.running_jobs
      set sent_input = coalesce(p_answer -> 'input', v_generation.provider_input)
      where job_id = p_job.job_id;
    end if;
  end if;
  v_request := private.build_request(v_provider.name, v_send, v_values);
  return jsonb_build_object(
    'do', 'send', 'step', v_send, 'wait', v_wait, 'memo', v_memo,
    'request', case
      when v_send = 'find' and v_memo ? 'page' then v_request || jsonb_build_object(
        'url', split_part(v_request ->> 'url', '?', 1) || (v_memo ->> 'page')
      )
      else v_request
    end,
    'is_found', case when v_step = 'find' and v_id is not null then true end,
    'cancel', case
      when v_send = 'poll' and v_step is distinct from 'poll'
        then jsonb_path_query_array(
          private.build_request(v_provider.name, 'cancel', v_values), '$[*]'
        )
    end,
    'percent', coalesce(
      v_known -> 'percent',
      to_jsonb(private.percent_in(v_known ->> 'logs', v_generation.image_count))
    ),
    'metrics', case when v_step = 'create' then v_known -> 'metrics' end
  );
end;
$$;

create or replace function private.next_steps(p_job_ids uuid[], p_tokens bigint[], p_answers jsonb[])
returns table (token bigint, step jsonb)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
declare
  v_job private.running_jobs;
  v_held bigint[] := array[]::bigint[];
begin
  for v_job in
    select r.* from private.running_jobs as r
    where r.job_id = any (p_job_ids) and r.token = any (p_tokens) order by r.job_id for update
  loop
    token := v_job.token;
    v_held := v_held || token;
    step := private.next_step(v_job, p_answers[array_position(p_tokens, v_job.token)]);
    return next;
  end loop;
  -- The user was deleted while the create was under way: nobody else stops what it bought.
  return query
  select said.token, jsonb_build_object('do', 'drop', 'cancel', jsonb_path_query_array(
    private.build_request(said.answer ->> 'provider', 'cancel', known.to_cancel), '$[*]'
  ))
  from unnest(p_job_ids, p_tokens, p_answers) as said (job_id, token, answer)
  cross join lateral (
    select private.read_answer(
      said.answer ->> 'provider', 'create', (said.answer ->> 'status')::integer,
      said.answer -> 'headers', said.answer -> 'body'
    ) as to_cancel
  ) as known
  where said.answer ->> 'step' = 'create' and said.token <> all (v_held)
    and known.to_cancel ->> 'is' = 'accepted'
    and not exists (select from public.generations as g where g.id = said.job_id);
end;
$$;

comment on function private.next_steps is
  'What to do next for each of these jobs, after what the provider answered: {step, memo as it '
  'was told, provider, status (0: nothing was sent, null: no answer came), headers, body, '
  'error}; null after the claim; {step: sources, input}: the input with addresses in place of '
  'paths. Answers each job whose lease holds {do, …}: send (request, after wait seconds; '
  'cancel: what stops the job from now on); sources (make their addresses, with upload where '
  'Storage''s own cannot be fetched); store (outputs); fail (code, reason, detail, '
  'retry_after); pause (the account is refused); cancel (its user wants that); drop (its user '
  'is gone: send cancel). metrics are as complete_jobs takes them.';

create or replace function private.list_providers() returns table (
  name text, base_url text, secret text, key_hosts text[], hosts text[], account jsonb
)
language sql security definer set search_path = pg_catalog, pg_temp as $$
  select
    p.name, p.base_url, p.secret, p.key_hosts, p.hosts,
    private.build_request(p.name, 'account', '{}')
  from private.providers as p
  where p.recipe is not null and p.is_active and exists (
    select from private.routes as w inner join public.models as m on m.id = w.model_id
    where w.provider = p.name and m.is_active
  )
  order by p.name
$$;

comment on function private.list_providers is
  'The providers of active models, and what to ask to see whether the account is open.';

create or replace function private.record_attempts(
  p_jobs private.running_jobs[], p_outcome text, p_metrics jsonb[], p_code text, p_detail text
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  insert into private.attempts (
    generation_id, token, model_id, provider, attempt, worker_id, started_at, outcome,
    error_code, error_detail, provider_job_id, provider_seconds, provider_images, cost_usd
  )
  select
    j.job_id, j.token, j.model_id, w.provider, j.attempt, j.worker_id, j.claimed_at, p_outcome,
    p_code, left(p_detail, 2000), j.provider_job_id,
    t.seconds, t.images,
    case
      when p_metrics[j.ordinality] @@ '$.is_asked == false || $.is_billed == false' then 0
      when jsonb_typeof(p_metrics[j.ordinality] -> 'cost_usd') = 'number' then greatest(0, least(
        100000, (p_metrics[j.ordinality] ->> 'cost_usd')::numeric
      ))
      when w.cost_unit = 'image' then w.cost_usd * t.images
      when w.cost_unit = 'second' then w.cost_usd * t.seconds
    end
  from unnest(p_jobs) with ordinality as j
  -- Within bounds: what a provider says of itself keeps no job from ending.
  cross join lateral (select
    case when jsonb_typeof(p_metrics[j.ordinality] -> 'provider_seconds') = 'number' then
      round(greatest(0, least(1000000, (p_metrics[j.ordinality] ->> 'provider_seconds')::numeric)), 6)
    end as seconds,
    case when jsonb_typeof(p_metrics[j.ordinality] -> 'images') = 'number' then
      greatest(0, least(1000000, (p_metrics[j.ordinality] ->> 'images')::numeric))
    end as images
  ) as t
  left join private.routes as w on w.model_id = j.model_id and w.place = j.route
  where j.token is not null;
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
    provider_job_id, create_started_at, handles, sent_input, route
  )
  select
    p_job.job_id, p_job.user_id, p_job.model_id, c.last_value, p_attempts_used,
    case when p_delay > interval '0' then now() + p_delay end,
    case when p_resumes then p_job.provider_job_id end,
    case when p_resumes then p_job.create_started_at end,
    case when p_resumes then p_job.handles end,
    case when p_resumes then p_job.sent_input end, coalesce(p_route, p_job.route)
  from private.virtual_clock as c;
  update public.generations set status = 'queued', updated_at = now() where id = p_job.job_id;
  perform private.record_attempts(array[p_job], p_outcome, array[p_metrics], p_code, p_detail);
  if p_delay <= interval '0' then
    perform private.wake_workers(1, array(
      select w.provider from private.routes as w
      where w.model_id = p_job.model_id
      order by w.place <> coalesce(p_route, p_job.route), w.place
    ));
  end if;
end;
$$;

create or replace function private.asked_seconds(p_words text) returns double precision
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return coalesce(
    substring(p_words, '^\s*(\d{1,15}(?:\.\d{1,15})?)\s*(?:,|$)')::double precision,
    -- HTTP's dates are in GMT, also in the form that does not say so.
    nullif(greatest(0, extract(epoch from (
      substring(p_words, '^\s*((?:Mon|Tue|Wed|Thu|Fri|Sat|Sun).{10,40})$')::timestamp
      at time zone 'UTC' - now()
    ))), 0)
  );
exception when data_exception then
  return null;
end;
$$;

create or replace function private.retry_delay(
  p_failures_before integer, p_retry_after_seconds double precision
) returns interval
language sql set search_path = pg_catalog, pg_temp as $$
  select private.asked_delay(
    (1 - random() / 2) * least(s.retry_cap, s.retry_base * power(2, least(p_failures_before, 20))),
    p_retry_after_seconds, 3600
  )
  from private.settings as s
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
  v_resumes := v_error.resumes;
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
      v_resumes and not p_metrics @> '{"is_asked": false}',
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
  perform private.note_failures(v_jobs);
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
    perform private.requeue_job(v_job, 'released', v_job.attempt - 1, interval '0', p_resumes);
  end if;
end;
$$;

comment on function private.release_job is
  'Gives a job back unfinished (graceful stop, refused account): next in line, the attempt does '
  'not count, the checkpoint is kept; or canceled, if the user asked for that; or failed, if it '
  'has been claimed max_claims times, or is older than give_up_after and has been claimed more '
  'than max_attempts times. p_resumes false: nothing was bought at the provider. Errors: DR001 '
  'lease_lost.';

create or replace function private.begin_creates(
  p_job_ids uuid[], p_tokens bigint[], p_inputs bytea[] default null
) returns table (token bigint, create_started_at timestamptz)
language sql security definer set search_path = pg_catalog, pg_temp as $$
  select r.token, r.create_started_at from private.running_jobs as r
  where r.job_id = any (p_job_ids) and r.token = any (p_tokens)
$$;

create or replace function private.recall_create(p_job_id uuid, p_token bigint)
returns table (create_started_at timestamptz, input_sha256 bytea)
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  return query
  select r.create_started_at, null::bytea from private.running_jobs as r
  where r.job_id = p_job_id and r.token = p_token;
  if not found then
    perform private.refuse_lost_lease(p_job_id);
  end if;
end;
$$;

create or replace function private.checkpoint_jobs(
  p_job_ids uuid[], p_tokens bigint[], p_provider_job_ids text[]
) returns table (token bigint, verdict text)
language sql security definer set search_path = pg_catalog, pg_temp as $$
  with saved as (
    update private.running_jobs as r
    set provider_job_id = p_provider_job_ids[array_position(p_tokens, r.token)]
    where r.job_id = any (p_job_ids) and r.token = any (p_tokens)
    returning r.token, r.job_id, r.provider_job_id
  ),
  bought as (
    insert into private.purchases (generation_id, provider_job_id)
    select s.job_id, s.provider_job_id from saved as s order by s.provider_job_id
    on conflict (generation_id, provider_job_id) do nothing  -- said before; another's is an error
  )
  select s.token, 'ok' from saved as s
$$;

create or replace function private.adopt_provider_job(
  p_job_id uuid, p_token bigint, p_candidates text[]
) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_job private.running_jobs;
  v_id text;
begin
  select * into v_job from private.running_jobs where job_id = p_job_id and token = p_token
  for update;
  if not found then
    perform private.refuse_lost_lease(p_job_id);
  elsif v_job.provider_job_id is not null then
    return v_job.provider_job_id;  -- the answer to the first call was lost
  end if;
  foreach v_id in array p_candidates loop
    if private.adopt(v_job, v_id) then
      return v_id;
    end if;
  end loop;
  return null;
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
      ))
    ),
    looked_at = now()
  where name in (select d.name from due as d)
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
  perform private.refresh_queue_state();
  return v_recovered;
end;
$$;

create or replace function private.is_source(p_id uuid) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select exists (
    select from private.sources as s
    where s.source_id = p_id
      and exists (select from private.live_jobs as j where j.job_id = s.generation_id)
  )
$$;

create or replace function private.list_expired_files(p_at_most integer default 100)
returns table (bucket text, path text)
language sql security definer set search_path = pg_catalog, pg_temp as $$
  with due as (
    select f.ctid, case
      when f.bucket = 'inputs' then (
        select private.file_changed_at(f.bucket, f.path) > f.marked_at
          or exists (select from private.live_jobs as j where j.user_id = e.user_id)
        from public.entitlements as e where e.user_id = f.user_id
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

create or replace function private.erase_images_of_generation() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  delete from public.images where generation_id = old.id;
  delete from private.retries where retry_of = old.id;
  delete from private.sources where source_id = old.id;
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
  select 'generations', f.path, i.user_id, i.generation_id
  from public.images as i
  cross join lateral (values (i.storage_path), (i.preview_path)) as f (path)
  where i.generation_id = any (v_ids) and f.path is not null
  order by f.path
  on conflict (bucket, path) do nothing;
  get diagnostics v_files = row_count;
  return v_files + private.erase_generations(v_ids);
end;
$$;

create or replace function private.expire_deleted(
  p_place text, p_at_most integer, out place text, out done integer
)
language sql set search_path = pg_catalog, pg_temp as $$
  select null, private.skip_failing('select private.expire_generations($1)', array(
    select g.id from public.generations as g
    where g.deleted_at <= now() - (select s.keep_deleted from private.settings as s)
      and g.finished_at is not null
      and not exists (select from private.expired_files as f where f.generation_id = g.id)
      and not private.is_source(g.id)
    order by g.deleted_at limit p_at_most + (select count(*) from private.skipped_rows)
  ))
$$;

comment on view private.paused_now is
  'Which models, routes (owner/name#place) and providers are paused, until when, and why? '
  'times_opened 0: by an operator. '
  'failed_users: only so many users wait, others are tried; 0: everybody waits.';

create view private.queue_by_model with (security_invoker = true) as
select
  n.model_id, m.provider,
  coalesce(case when not p.is_paused then q.waiting - q.delayed end, 0) as ready,
  coalesce(case when not p.is_paused then q.delayed end, 0) as delayed,
  coalesce(case when p.is_paused then q.waiting end, 0) as paused,
  coalesce(r.running, 0) as running,
  case when not p.is_paused and q.waiting > q.delayed then extract(epoch from now() - q.ready_since)
  end as oldest_ready_seconds
from (
  select
    j.model_id, count(*) as waiting, count(*) filter (where j.run_at > now()) as delayed,
    min(coalesce(j.run_at, j.queued_at)) as ready_since
  from private.ready_jobs as j group by j.model_id
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
  'put off), paused, running; oldest_ready_seconds: since the first of the ready may be claimed.';

create view private.running_now with (security_invoker = true) as
select
  r.job_id, r.user_id, r.model_id, way.provider, r.worker_id, w.host,
  now() - r.claimed_at as running, r.stage, r.progress, r.attempt, r.provider_job_id,
  r.cancel_requested, r.lease_until - now() as lease_left, r.deadline_at - now() as deadline_left,
  greatest(now() - least(r.lease_until, r.deadline_at), '0') as stuck_for
from private.running_jobs as r
left join private.workers as w on r.worker_id = w.id
left join private.routes as way on r.model_id = way.model_id and r.route = way.place
order by r.claimed_at;

comment on view private.running_now is
  'What runs now, where, for how long, and how far is it? stuck_for: its lease or its deadline has '
  'passed so long ago, and nobody has taken it back.';

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
    unserved jsonb, vacuum jsonb, outbox jsonb, books jsonb, skipped jsonb
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
    -- files that Storage would not delete for a day.
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
  'jobs}, vacuum {oldest_transactions, sees_all_sessions}, outbox {pending, '
  'oldest_pending_seconds, dead}, books {recent_problems, checked_at, problems, examples}, skipped '
  '{rows, since, steps}}. A monitor is shown no reasons and no examples. Thresholds are rows of '
  'private.alert_rules.';

comment on function public.enqueue_generation is
  'Asks for a picture: checks, charges and queues in one transaction. Answers {job_id, status, '
  'reused, credits_left, queue_position and eta_seconds (null here: get_job_status tells them), '
  'poll_after_ms, size (what the model takes for the width and height or aspect_ratio asked for; '
  'null: just that)}. The same idempotency_key and payload answer with the same job and charge '
  'nothing. With params.reuse = true and a seed, a finished generation of the same input is '
  'answered, free, if it is among your last 200. Errors: PT400 invalid_input, PT401 '
  'not_authenticated, PT402 insufficient_credits, PT403 requires_paid_plan, PT404 not_found (also '
  'where the job of the key is deleted), PT409 idempotency_conflict, PT429 too_many_active | '
  'rate_limited, PT503 busy | model_paused | unavailable.';

comment on function public.list_models is
  'The catalogue: [{id, title, price_credits and paid_price_credits (per image), requires_paid, '
  'paused_until (null unless it is; may be infinity), max_images, inputs {name: JSON schema of a '
  'param}, image_inputs [those that take a picture: a path in bucket inputs, or generations/<path '
  'of an image>]}].';

do $$
begin
  execute (
    select string_agg(format('alter table private.%I enable row level security', c.relname), ';')
    from pg_class as c where c.relnamespace = 'private'::regnamespace and c.relkind in ('r', 'p')
  );
end;
$$;

-- What holds from now on.

insert into private.providers (name, lost_create) values ('preview', 'key') on conflict do nothing;

insert into private.providers (
  name, base_url, secret, key_hosts, hosts, max_running, result_ttl, lost_create, recipe
) values
('replicate', 'https://api.replicate.com/v1', 'REPLICATE_API_TOKEN', '{}',
  '{replicate.delivery,*.replicate.delivery}', null, '1 hour', 'find', '{
  "headers": {"Authorization": "Bearer {{secret}}"},
  "create": {
    "method": "POST", "url": "{{base}}/predictions",
    "headers": {"Cancel-After": "{{deadline}}s"},
    "body": {"version": "{{ref}}", "input": "{{input}}"},
    "id": "$.id", "echo": "$.input"
  },
  "poll": {
    "url": "{{base}}/predictions/{{id}}",
    "id": "$.id", "state": "$.status",
    "states": {
      "starting": "running", "processing": "running", "succeeded": "done",
      "failed": "failed", "aborted": "failed", "canceled": "stopped"
    },
    "gone_if": "$ ? (@.status == \"succeeded\" && (@.data_removed == true || @.output == null))",
    "outputs": "strict $.output.** ? (@.type() == \"string\" && @ like_regex \"://|^blob:\")",
    "logs": "$.logs", "words": "$.error", "seconds": "$.metrics.predict_time",
    "images": "$.metrics.keyvalue() ? (@.key like_regex \"^image_(output_)?count$\").value"
  },
  "cancel": {"method": "POST", "url": "{{base}}/predictions/{{id}}/cancel", "as": "poll",
    "seconds_at_most": 5},
  "find": {
    "url": "{{base}}/predictions?created_after={{since}}", "next": "$.next",
    "items": [
      "$.results[*] ? ($version != \"\" && @.version == $version)",
      "$.results[*] ? ($version == \"\" && @.model == $model && !(@.version like_regex \"^[0-9a-f]{64}$\"))"
    ],
    "item_id": "$.id", "item_input": "$.input", "shows_all": true
  },
  "upload": {
    "method": "POST", "url": "{{base}}/files", "field": "content", "address": ["urls", "get"]
  },
  "account": {"url": "{{base}}/account"},
  "error_words": "$.detail", "retry_after": "$.retry_after"
}'),
('fal', 'https://queue.fal.run', 'FAL_KEY', '{queue.falrun.com,api.fal.ai}',
  '{fal.media,*.fal.media}', 2, null, 'find', '{
  "headers": {"Authorization": "Key {{secret}}"},
  "places": {"api": "https://api.fal.ai/v1"},
  "create": {
    "method": "POST", "url": "{{base}}/{{ref}}", "body": "{{input}}",
    "id": "$.request_id",
    "handles": {"status": "$.status_url", "result": "$.response_url", "cancel": "$.cancel_url"}
  },
  "poll": {
    "url": "{{handles.status}}?logs=1", "id": "$.request_id", "state": "$.status",
    "states": {"IN_QUEUE": "running", "IN_PROGRESS": "running", "COMPLETED": "done"},
    "logs": "$.logs[last].message", "seconds": "$.metrics.inference_time"
  },
  "result": {"url": "{{handles.result}}", "outputs": ["$.images[*].url", "$.image.url"]},
  "cancel": {
    "method": "PUT", "url": "{{handles.cancel}}", "state": "$.status", "states": {"OK": "failed"}
  },
  "find": {
    "url": "{{api}}/models/requests/by-endpoint?endpoint_id={{ref}}&start={{since}}&expand=payloads&limit=100",
    "items": "$.items[*]", "item_id": "$.request_id", "item_input": "$.json_input",
    "handles": {
      "status": "{{base}}/{{app}}/requests/{{id}}/status",
      "result": "{{base}}/{{app}}/requests/{{id}}",
      "cancel": "{{base}}/{{app}}/requests/{{id}}/cancel"
    }
  },
  "account": {"url": "{{api}}/account/billing?expand=credits"},
  "error_words": ["$.detail ? (@.type() == \"string\")", "$.detail[*].msg", "$.error_type"],
  "errors": [
    {"path": "$.detail[*].type ? (@ == \"content_policy_violation\")", "code": "moderated"},
    {
      "path": "$.detail[*].type ? (@ like_regex \"^(internal_server_error|generation_timeout|downstream_service_.*|no_media_generated)$\")",
      "code": "provider_error"
    },
    {"path": "$.error_type", "code": "provider_error", "step": "result"},
    {"path": "$.detail ? (@.type() == \"string\" && $status >= 500)", "step": "result"}
  ]
}'),
('bfl', 'https://api.bfl.ai/v1', 'BFL_API_KEY', '{*.bfl.ai}',
  '{bfldeliveryprod.blob.core.windows.net}', 24, '10 minutes', 'unknown', '{
  "headers": {"x-key": "{{secret}}"},
  "create": {
    "method": "POST", "url": "{{base}}/{{ref}}", "body": "{{input}}",
    "id": "$.id", "handles": {"status": "$.polling_url", "cost_usd": "$.cost / 100"}
  },
  "poll": {
    "url": "{{handles.status}}", "id": "$.id", "state": "$.status",
    "states": {
      "Pending": "running", "Ready": "done", "Error": "failed", "Task not found": "gone",
      "Request Moderated": "moderated", "Content Moderated": "moderated"
    },
    "outputs": "$.result.sample", "percent": "$.progress * 100", "seconds": "$.result.duration",
    "words": "$.details"
  },
  "account": {"url": "{{base}}/credits"},
  "error_words": ["$.detail ? (@.type() == \"string\")", "$.detail[*].msg"]
}'),
('openai', 'https://api.openai.com/v1', 'OPENAI_API_KEY', '{}', '{}', null, null, 'unknown', '{
  "headers": {"Authorization": "Bearer {{secret}}"},
  "create": {
    "method": "POST", "url": "{{base}}/images/generations", "body": "{{input}}",
    "seconds_at_most": 240, "outputs": ["$.data[*].b64_json", "$.data[*].url"]
  },
  "account": {"url": "{{base}}/models"},
  "error_words": "$.error.message",
  "errors": [{"path": "$.error.code ? (@ == \"moderation_blocked\")", "code": "moderated"}]
}'),
('comfyui', 'http://127.0.0.1:8188', null, '{}', '{}', 1, null, 'key', '{
  "create": {
    "method": "POST", "url": "{{base}}/prompt",
    "body": {"prompt": "{{input}}", "prompt_id": "{{key}}"}, "id": "$.prompt_id"
  },
  "poll": {
    "url": "{{base}}/history/{{id}}", "state": "$.*.status.status_str",
    "states": {"success": "done", "error": "failed"}, "missing_if": "$ ? (!exists(@.*))",
    "outputs": "$.*.outputs.*.images[*] ? (@.type == \"output\")",
    "output_url": "{{base}}/view?filename={{filename}}&subfolder={{subfolder}}&type=output",
    "words": "$.*.status.messages[*].exception_message"
  },
  "cancel": [
    {"method": "POST", "url": "{{base}}/queue", "body": {"delete": ["{{id}}"]}},
    {"method": "POST", "url": "{{base}}/interrupt", "body": {"prompt_id": "{{id}}"}}
  ],
  "find": {
    "url": "{{base}}/queue", "shows_all": true,
    "alive": ["$.queue_running[*][1]", "$.queue_pending[*][1]"]
  },
  "upload": {
    "method": "POST", "url": "{{base}}/upload/image", "field": "image", "address": ["name"],
    "always": true
  },
  "error_words": ["$.error.message", "$.node_errors.*.errors[*].details"]
}')
on conflict do nothing;

alter table public.models add constraint models_provider_fkey FOREIGN KEY (provider) REFERENCES private.providers(name);

alter table private.settings add constraint settings_max_claims_leave_room_for_all_attempts CHECK ((max_claims >= max_attempts));

insert into private.error_codes (
  code, message, is_retryable, uses_attempt, resumes, trips_breaker
) values
('moderated', 'The safety filter refused this picture. Try another prompt.',
  false, true, false, false),
('invalid_input', 'The model did not accept this request.', false, true, false, false),
('provider_busy', 'The image service is busy. Try again later.', true, false, false, false),
('provider_timeout', 'The image service did not answer in time.', true, true, true, true),
('provider_error', 'The image service failed to make this picture.', true, true, false, true),
('result_lost', 'The finished picture could not be fetched in time.', true, true, false, true),
('timeout', 'The picture took too long.', false, true, false, true),
('provider_refused', 'The image service refused to make this picture.',
  true, true, true, true),
('outcome_unknown', 'The image service did not say whether it made this picture.',
  false, true, false, true),
('output_refused', 'The model made something that is no picture we can show.',
  false, true, false, false),
('worker_full', 'We have no room for your picture. Try again later.', true, false, true, false),
('storage_unavailable', 'Your picture could not be kept. Try again later.',
  true, false, true, false),
('internal', 'Something went wrong on our side.', true, true, true, false)
on conflict do nothing;

insert into private.error_codes (
  code, message, is_retryable, uses_attempt, pauses_model
) values
('model_withdrawn', 'The image service does not offer this model any more.', true, false, true)
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
('vacuum_held_back', 1000000, 'transactions', 0, 'warning',
  'Dead rows pile up in the queue. End what private.vacuum_holders names.'),
('skipped_rows', 0, 'rows', 0, 'warning',
  'Mend what private.skipped_rows names: it is tried again. storage: see the worker''s log.'),
('books', 0, 'problems', 0, 'critical',
  'See private.broken_books. Once it is mended, select private.check_books() to check anew.')
on conflict do nothing;

notify pgrst, 'reload schema';

notify pgrst, 'reload config';

insert into private.provider_words (place, pattern, code) values
(10, '\y(out of memory|OOM|CUDA error|segfault|core dumped|traceback)\y', 'provider_error'),
(11, '\yfail(ed|ure) to (load|download|start|initiali[sz]e)\y', 'provider_error'),
(12, '\y(Runtime|Key|Attribute|Import|Module\w*|Assertion)Error\y', 'provider_error'),
(30, '\ynsfw\y', 'moderated'),
(31, '\y(flagged|detected|considered|marked|classified) as (\w+ ){0,3}'
  '(sensitive|unsafe|inappropriate|explicit|harmful)\y', 'moderated'),
(32, '\y(sensitive|explicit|adult|inappropriate|harmful|unsafe|prohibited|disallowed|sexual'
  '|violent)[ _]content\y', 'moderated'),
(33, '\y(violat\w*|against|breach\w*)\y.{0,60}\y(polic(y|ies)|guidelines?|terms|responsible ai)\y',
  'moderated'),
(34, '\y(content|safety|usage)[ _-]?(policy|policies|filter\w*|system|checker)\y', 'moderated'),
(35, '\y(moderat(ed|ion)\w*|responsible ai practices|E005)\y', 'moderated'),
(50, '\y(high demand|at capacity|over(loaded|loading)|too many requests|rate.?limit\w*|E003)\y',
  'provider_busy'),
(51, '\y((temporarily|currently) unavailable|queue is full|interrupted; please retry)\y',
  'provider_busy'),
(70, '\y(cannot identify image file|image file is truncated|(unsupported|invalid|corrupt\w*) image)'
  '\y', 'invalid_input'),
(71, '\ycould not (decode|read|open) (the )?image\y', 'invalid_input'),
(72, '\y(prompt|image|input|text|mask|file)s?\y.{0,40}'
  '\y(too (long|short|large|small|big)|exceeds?|must be|required|maximum|minimum)\y',
  'invalid_input'),
(73, '\y(must be (at (least|most)|between|one of|a multiple|divisible)|not a valid)\y',
  'invalid_input'),
(74, '\y(validation error|unprocessable)\y', 'invalid_input')
on conflict do nothing;

do $c$ begin if to_regprocedure('private.adopt_provider_job(pg_catalog.uuid,bigint,pg_catalog.text[])') is not null then comment on function private.adopt_provider_job(pg_catalog.uuid,bigint,pg_catalog.text[]) is null; end if; end $c$;

do $c$ begin if to_regprocedure('private.begin_creates(pg_catalog.uuid[],bigint[],pg_catalog.bytea[])') is not null then comment on function private.begin_creates(pg_catalog.uuid[],bigint[],pg_catalog.bytea[]) is null; end if; end $c$;

do $c$ begin if to_regprocedure('private.checkpoint_jobs(pg_catalog.uuid[],bigint[],pg_catalog.text[])') is not null then comment on function private.checkpoint_jobs(pg_catalog.uuid[],bigint[],pg_catalog.text[]) is null; end if; end $c$;

do $c$ begin if to_regprocedure('private.claim_jobs(bigint,integer)') is not null then comment on function private.claim_jobs(bigint,integer) is null; end if; end $c$;

do $c$ begin if to_regprocedure('private.finish_delivery(pg_catalog.uuid,bigint,pg_catalog.text,integer,pg_catalog.text,double precision,pg_catalog.text)') is not null then comment on function private.finish_delivery(pg_catalog.uuid,bigint,pg_catalog.text,integer,pg_catalog.text,double precision,pg_catalog.text) is null; end if; end $c$;

do $c$ begin if to_regprocedure('private.recall_create(pg_catalog.uuid,bigint)') is not null then comment on function private.recall_create(pg_catalog.uuid,bigint) is null; end if; end $c$;

do $c$ begin if to_regprocedure('private.register_worker(pg_catalog.text,integer,pg_catalog.text)') is not null then comment on function private.register_worker(pg_catalog.text,integer,pg_catalog.text) is null; end if; end $c$;

revoke all on function private.adopt(private.running_jobs,text,jsonb) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.asked_seconds(text) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.at(jsonb,jsonb,jsonb) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.build_request(text,text,jsonb) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.claim_jobs(bigint,integer,text[]) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

grant execute on function private.claim_jobs(bigint,integer,text[]) to darkroom_worker;

revoke all on function private.count_failure(text,private.running_jobs,text,uuid,integer) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.fill(jsonb,jsonb) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.fill_url(text,jsonb) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.gate_of(text,smallint,text) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.hold_room(text[]) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.is_anothers(jsonb,jsonb) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.is_busy(private.plans,text) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.is_plain_path(text) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.is_source(uuid) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.list_providers() from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

grant execute on function private.list_providers() to darkroom_worker;

revoke all on function private.next_step(private.running_jobs,jsonb) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.next_steps(uuid[],bigint[],jsonb[]) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

grant execute on function private.next_steps(uuid[],bigint[],jsonb[]) to darkroom_worker;

revoke all on function private.next_try(integer,double precision) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.note_failures(private.running_jobs[]) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.percent_in(text,integer) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.pick_admitted_jobs(integer,text[]) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.put_off(regclass,timestamp with time zone,boolean) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.read_answer(text,text,integer,jsonb,jsonb,jsonb) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.read_size(text) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.refuse_limits(uuid,text) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.register_worker(text,integer,text,text[]) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

grant execute on function private.register_worker(text,integer,text,text[]) to darkroom_worker;

revoke all on function private.requested(jsonb,jsonb,jsonb) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.requeue_job(private.running_jobs,text,integer,interval,boolean,jsonb,text,text,smallint) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.size_inputs() from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.size_sent(jsonb) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.wake_workers(integer,text[]) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.what_words_mean(text,text) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on function private.words_at(jsonb,jsonb) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

-- The optional parts, where they are.

if v_has_96 then
create or replace function private.finish_delivery(
  p_delivery_id uuid, p_token bigint, p_outcome text, p_status integer, p_error text,
  p_retry_after text default null, p_ticket text default null
) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_settings private.settings := (select s from private.settings as s);
  v_delivery private.deliveries;
  v_delay interval;
  v_state text;
begin
  select * into v_delivery from private.deliveries as d
  where d.id = p_delivery_id and d.token = p_token and d.state = 'pending' for update;
  if not found then
    return 'lost';
  end if;
  v_delay := private.asked_delay(
    v_settings.delivery_retries[v_delivery.attempts + 1] * (0.8 + 0.4 * random()),
    private.asked_seconds(p_retry_after), 86400
  );
  v_state := case
    when p_outcome = 'delivered' then 'delivered'
    when p_outcome = 'gone'
      or v_delivery.attempts >= cardinality(v_settings.delivery_retries)
      or v_delivery.lane = 'expo'
      and now() + v_delay >= v_delivery.created_at + v_settings.push_expires then 'dead'
    else 'pending'
  end;
  update private.deliveries set
    state = v_state, attempts = attempts + 1, token = null,
    last_status = p_status, last_error = left(p_error, 200),
    ticket = case when v_state = 'delivered' then p_ticket end,
    run_at = case v_state
      when 'pending' then now() + v_delay
      when 'delivered' then now() + interval '15 minutes'
      else run_at
    end,
    finished_at = case when v_state <> 'pending' then now() end
  where id = p_delivery_id;
  if p_outcome = 'gone' then
    delete from private.push_tokens where token = v_delivery.push_token;
    update private.webhook_endpoints set disabled_at = now()
    where id::text = v_delivery.lane and disabled_at is null;
  end if;
  return v_state;
end;
$$;

comment on function private.finish_delivery is
  'Says what became of a try: delivered (a push with the ticket to ask for its receipt by), failed '
  '(tried again while settings.delivery_retries says so), or gone (the endpoint is disabled, the '
  'push token forgotten). Answers delivered, pending, dead, or lost: the lease is not held any '
  'more, nothing was changed.';

revoke all on function private.finish_delivery(uuid,bigint,text,integer,text,text,text) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

grant execute on function private.finish_delivery(uuid,bigint,text,integer,text,text,text) to darkroom_worker;
end if;

if v_has_97 then
create view private.waiting_now with (security_invoker = true) as
select
  r.job_id, r.user_id, (private.plan_of(e)).name as plan, r.model_id,
  case
    when exists (
      select from private.paused_models as p where p.id = r.model_id and p.paused_until > now()
    ) then 'paused'
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

create view private.recent_attempts with (security_invoker = true) as
select
  a.generation_id, g.user_id, g.model_id, a.provider, a.attempt, a.worker_id, a.outcome,
  a.error_code, a.error_detail, a.provider_job_id, a.provider_seconds, a.cost_usd, g.created_at,
  a.started_at, a.ended_at, extract(epoch from a.started_at - g.created_at) as wait_seconds,
  extract(epoch from a.ended_at - a.started_at) as run_seconds
from private.attempts as a
inner join public.generations as g on a.generation_id = g.id
where a.ended_at > now() - interval '1 day'
order by a.ended_at desc;

comment on view private.recent_attempts is
  'What was tried within a day, how did it end, and what did the provider say? wait_seconds: from '
  'being asked for to this claim.';

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
    null, l.kind, l.amount
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

create or replace function public.queue_report() returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = on set jit = off set max_parallel_workers_per_gather = 0 as $$
declare
  v_began timestamptz := clock_timestamp();
  -- The queue is counted by passing through all of it, and that is as good as can be.
  v_queue jsonb := (select coalesce(jsonb_agg(q), '[]') from private.queue_by_model as q);
  v_health json := private.health_of(v_queue);
begin
  perform set_config('enable_seqscan', 'off', true);  -- until the function ends
  return json_build_object(
    'at', now(),
    'health', v_health,
    'alerts', (
      select json_agg(json_build_object(
        'alert', s.alert, 'severity', s.severity, 'is_raised', s.is_raised, 'value', s.value,
        'threshold', s.threshold
      ) order by s.alert)
      from private.alert_states(v_health::jsonb) as s
    ),
    -- Seconds from claim to end of completed attempts, and as remembered for eta_seconds.
    'models', (
      select coalesce(json_agg(m), '[]')
      from (
        select
          n.model_id, c.provider, coalesce(q.ready, 0) as ready, coalesce(q.delayed, 0) as delayed,
          coalesce(q.paused, 0) as paused, coalesce(q.running, 0) as running,
          q.oldest_ready_seconds, coalesce(o.completed, 0) as completed,
          coalesce(o.failed, 0) as failed, coalesce(o.retried, 0) as retried,
          o.seconds[1] as p50_seconds, o.seconds[2] as p95_seconds, s.mean_seconds,
          coalesce(o.cost_usd, 0) as cost_usd
        from jsonb_populate_recordset(null::private.queue_by_model, v_queue) as q
        full outer join (
          select
            a.model_id, count(*) filter (where a.outcome = 'completed') as completed,
            count(*) filter (where a.outcome = 'failed') as failed,
            count(*) filter (where a.outcome = 'retried') as retried, sum(a.cost_usd) as cost_usd,
            percentile_cont('{0.5,0.95}'::double precision[])
              within group (order by extract(epoch from a.ended_at - a.started_at))
              filter (where a.outcome = 'completed') as seconds
          from private.attempts as a
          where a.ended_at > now() - interval '1 hour' group by a.model_id
        ) as o on o.model_id = q.model_id
        cross join lateral (select coalesce(q.model_id, o.model_id) as model_id) as n
        left join public.models as c on c.id = n.model_id
        left join private.model_stats as s on s.model_id = n.model_id
        order by coalesce(q.ready, 0) + coalesce(q.running, 0) desc, n.model_id
      ) as m
    ),
    'workers', (
      select coalesce(json_agg(w), '[]')
      from private.worker_activity as w where w.seen_seconds < 86400
    ),
    'errors', (
      select coalesce(json_agg(e), '[]')
      from (
        select
          a.model_id, a.error_code, count(*) as errors,
          array_remove(array_agg(distinct a.provider), null) as providers,
          count(*) filter (where a.outcome = 'failed') as failed,
          count(*) filter (where a.outcome = 'retried') as retried, max(a.ended_at) as last_at
        from private.attempts as a
        where a.ended_at > now() - interval '1 hour'
          and a.error_code is not null and a.outcome <> 'released'
        group by a.model_id, a.error_code
        order by count(*) desc, max(a.ended_at) desc
      ) as e
    ),
    'running', (
      select coalesce(json_agg(j), '[]')
      from (
        select
          r.model_id, r.provider, r.attempt, r.worker_id, r.stage, r.progress,
          round(extract(epoch from r.running), 1) as running_seconds,
          round(extract(epoch from r.lease_left), 1) as lease_seconds,
          round(extract(epoch from r.deadline_left), 1) as deadline_seconds
        from private.running_now as r order by r.running desc, r.job_id limit 12
      ) as j
    ),
    'recent', (
      select coalesce(json_agg(t), '[]')
      from (
        select
          a.model_id, a.provider, a.attempt, a.worker_id, a.outcome, a.error_code, a.ended_at,
          -- No join, which might be made by reading all generations.
          (
            select round(extract(epoch from a.started_at - g.created_at), 1)
            from public.generations as g where g.id = a.generation_id
          ) as waited_seconds,
          round(extract(epoch from a.ended_at - a.started_at), 1) as ran_seconds
        from private.attempts as a where a.ended_at > now() - interval '1 hour'
        order by a.ended_at desc, a.token desc limit 12
      ) as t
    ),
    'vacuum_holders', (
      select coalesce(json_agg(v), '[]')
      from (
        select
          h.kind, h.pid, left(h.name, 100) as name, h.state, h.age_transactions as transactions,
          round(extract(epoch from h.since)) as seconds
        from private.vacuum_holders as h
        order by h.since desc nulls last, h.age_transactions desc limit 5
      ) as v
    ),
    'took_ms', round(extract(epoch from clock_timestamp() - v_began) * 1000, 1)
  );
end;
$$;
end if;
end;
$upgrade$;
