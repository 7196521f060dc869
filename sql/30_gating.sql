-- Gating: may this user ask for this? Checks only; nothing here writes.
--
-- enqueue_generation (50) calls these in order: who asks (require_user_id), is the request well
-- formed (read_request), is the model there and allowed (require_model), does the
-- plan allow one more now (check_limits). Whether the input fits the model is checked in 32, and
-- the credits where they are taken (40).

-- The transaction may write: it is not a GET's, and the database is not read only, as a standby is
-- and one whose disk is nearly full. Asked before anything is, so that the refusal is ours. The
-- default counts too: PostgREST opens its transactions read-write whatever it says, and no worker
-- would come for what was taken in.
--
-- Raises: PT405 method_not_allowed, PT503 unavailable.
create function private.require_writable() returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  if current_setting('transaction_read_only') = 'off'
    and current_setting('default_transaction_read_only') = 'off' then
    return;
  elsif current_setting('request.method', true) in ('GET', 'HEAD') then
    raise sqlstate 'PT405' using
      message = 'method_not_allowed',
      detail = 'This function changes something.',
      hint = 'Call it by POST.';
  end if;
  perform private.refuse_for_now(
    503, 'unavailable', 'The database takes no changes at the moment.', 30
  );
end;
$$;

-- The user of the request's JWT, who may write where the function does.
--
-- Raises: PT401 not_authenticated, PT405 method_not_allowed, PT503 unavailable.
create function private.require_user_id(p_writes boolean default false) returns uuid
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.caller_id();
begin
  if v_user_id is null then
    raise sqlstate 'PT401' using
      message = 'not_authenticated',
      detail = 'The request carries no user.',
      hint = 'Sign in and send the access token as Authorization: Bearer.';
  elsif p_writes then
    perform private.require_writable();
  end if;
  return v_user_id;
end;
$$;

-- Raises PT401 not_authenticated: the token outlived the user.
create function private.refuse_unknown_user() returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  raise sqlstate 'PT401' using
    message = 'not_authenticated',
    detail = 'There is no such user any more.',
    hint = 'Sign in again.';
end;
$$;

-- The same, who must still be there: for functions that neither lock the entitlement nor look for a
-- row of the user's.
--
-- Raises: PT401 not_authenticated, PT405 method_not_allowed, PT503 unavailable.
create function private.require_known_user_id(p_writes boolean default false) returns uuid
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_user_id(p_writes);
begin
  if not exists (select from public.entitlements where user_id = v_user_id) then
    perform private.refuse_unknown_user();
  end if;
  return v_user_id;
end;
$$;

-- Raises PT404 not_found.
create function private.refuse_missing(p_detail text, p_hint text) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  raise sqlstate 'PT404' using message = 'not_found', detail = p_detail, hint = p_hint;
end;
$$;

-- Raises PT404 not_found, the same for a job that never was, is somebody else's, or is deleted; or
-- PT401 not_authenticated: the user is.
create function private.refuse_unknown_job() returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  perform private.require_known_user_id();
  perform private.refuse_missing(
    'job_id: no such job of yours',
    'Use the job_id that enqueue_generation answered.'
  );
end;
$$;

-- Raises PT400 invalid_input.
create function private.refuse_input(p_detail text, p_hint text default null) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  raise sqlstate 'PT400' using
    message = 'invalid_input',
    detail = p_detail,
    hint = coalesce(p_hint, 'Correct the argument and call again.');
end;
$$;

-- Raises a refusal that passes with time, carrying Retry-After. PostgREST reads status and headers
-- from the detail of SQLSTATE PGRST (docs.postgrest.org, "Raise errors with HTTP status codes").
-- Browsers show no such header to the page and supabase-js none at all, and a body has texts only:
-- so the hint is always this sentence, to be read as data.
create function private.refuse_for_now(
  p_status integer, p_token text, p_detail text, p_retry_after_seconds integer
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  raise sqlstate 'PGRST' using
    message = json_build_object(
      'code', 'PT' || p_status,
      'message', p_token,
      'details', p_detail,
      'hint', format('Try again in %s seconds.', p_retry_after_seconds)
    )::text,
    detail = json_build_object(
      'status', p_status,
      'headers', json_build_object('Retry-After', p_retry_after_seconds::text)
    )::text;
end;
$$;

-- JSON given as text. A function of its own: its block for exceptions costs a subtransaction.
--
-- Raises: PT400 invalid_input.
create function private.unwrap_params(p_text text) returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return p_text::jsonb;
exception
  when invalid_text_representation or untranslatable_character or numeric_value_out_of_range
    or statement_too_complex then
    perform private.refuse_input('params: not a JSON object');
    return null;  -- never reached
end;
$$;

-- Whether JSON holds a number of more than 400 digits: 1e131071 is eight bytes on the way in,
-- sixteen here, and 131 kB once it is written, 0e-16383 likewise. No schema has a use for one.
create function private.has_endless_number(p_value jsonb) returns boolean
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select exists (
    select from jsonb_path_query(p_value, 'strict $.** ? (@.type() == "number")') as n (value)
    where abs(n.value::numeric) >= 1e400 or scale(n.value::numeric) > 400
  )
$$;

-- The params as an object, if they, the prompts and the key are of a size and form we take. Some
-- gateways hand a jsonb argument as a JSON string holding the text, so it is unwrapped once, here.
-- p_field is what a refusal calls a prompt, with its place for %1$s.
--
-- Raises: PT400 invalid_input.
create function private.read_request(
  p_prompts text[], p_params jsonb, p_idempotency_key text, p_field text default 'prompt'
) returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_params jsonb := coalesce(p_params, '{}');
  v_max_bytes integer;
  v_max_chars integer;
begin
  select s.max_params_bytes, s.max_prompt_chars into v_max_bytes, v_max_chars
  from private.settings as s;
  if jsonb_typeof(v_params) = 'string' and pg_column_size(v_params) <= 2 * v_max_bytes then
    v_params := private.unwrap_params(v_params #>> '{}');
  end if;
  -- Measured before anything is written out: in memory no JSON has more than eight times the bytes
  -- of its text, and what has less than 500 holds too few numbers to come to much.
  if pg_column_size(v_params) between 500 and 8 * v_max_bytes
    and private.has_endless_number(v_params) then
    perform private.refuse_input('params: a number of more than 400 digits');
  elsif pg_column_size(v_params) > 8 * v_max_bytes
    or octet_length(v_params::text) > v_max_bytes then
    perform private.refuse_input(format('params: longer than %s bytes', v_max_bytes));
  elsif jsonb_typeof(v_params) <> 'object' then
    perform private.refuse_input(
      'params: not a JSON object', 'Send an object such as {"seed": 7}, or leave it out.'
    );
  elsif octet_length(p_idempotency_key) not between 1 and 200 then
    perform private.refuse_input(
      'idempotency_key: not 1 to 200 bytes', 'Use a UUID made on the device.'
    );
  end if;
  for v_at in 1 .. cardinality(p_prompts) loop
    -- Bytes first: counting the characters of a hundred megabytes is work for nothing.
    if octet_length(p_prompts[v_at]) > 4 * v_max_chars
      or length(p_prompts[v_at]) > v_max_chars then
      perform private.refuse_input(
        format(p_field || ': longer than %2$s characters', v_at - 1, v_max_chars)
      );
    end if;
  end loop;
  return v_params;
end;
$$;

-- The user's generation. Somebody else's is not found, like one that never was.
--
-- Raises: PT404 not_found.
create function private.require_generation(p_job_id uuid, p_user_id uuid) returns public.generations
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_generation public.generations;
begin
  select * into v_generation from public.generations
  where id = p_job_id and user_id = p_user_id and deleted_at is null;
  if not found then
    perform private.refuse_unknown_job();
  end if;
  return v_generation;
end;
$$;

-- Until when the model is paused for this user, itself or with its provider; null unless it is. A
-- pause that failures began is one for those who failed.
--
-- Who keeps failing where others do not, as the breakers (71) noticed, is let wait like a model:
-- for the window in which so many failures would pause one.
create function private.paused_until(p_model public.models, p_user_id uuid) returns timestamptz
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

create view private.paused_models with (security_invoker = true) as
select
  m.id,
  b.paused_until,
  b.resumed_at
from private.breakers as b
inner join public.models as m on b.name in (m.id, m.provider)
where b.paused_until is not null or b.resumed_at is not null;

comment on view private.paused_models is
  'Models that are or were paused, themselves or with their provider.';

revoke all on private.paused_models from public, anon, authenticated, service_role;

-- The model that an alias stands for with this user; null if there is no such alias.
--
-- Weighted rendezvous hashing: each arm draws a number that depends on nothing but user and arm,
-- and the smallest wins. So a user stays with an arm, and a change of weights moves as few as
-- possible. A paused arm is passed over while another is not.
create function private.resolve_alias(p_alias_id text, p_user_id uuid, p_plan text) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select a.model_id
  from public.model_aliases as a
  inner join public.models as m on m.id = a.model_id
  cross join lateral (
    select ('x' || left(md5(concat_ws(' ', p_user_id, a.id, a.model_id)), 12))::bit(48)::bigint as n
  ) as drawn
  where a.id = p_alias_id and a.weight > 0 and m.is_active
    and (p_plan = 'paid' or not m.requires_paid)
  order by
    private.paused_until(m, p_user_id) is not null,
    -ln((drawn.n + 1) / 281474976710657.0) / a.weight
  limit 1
$$;

-- Raises PT503 model_paused.
create function private.refuse_paused(p_model_id text, p_until timestamptz) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  perform private.refuse_for_now(
    503,
    'model_paused',
    format('%s is paused', p_model_id),
    ceil(extract(epoch from least(p_until, now() + interval '1 hour') - now()))::integer
  );
end;
$$;

-- The model of this name, or the one that an alias of this name stands for, if this user may use
-- it.
--
-- Raises: PT404 not_found, PT403 requires_paid_plan, PT503 model_paused.
create function private.require_model(
  p_name text, p_user_id uuid, p_plan text
) returns public.models
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_model public.models;
  v_paused_until timestamptz;
begin
  select * into v_model from public.models where id = p_name and is_active;
  if not found then
    select * into v_model from public.models
    where id = private.resolve_alias(p_name, p_user_id, p_plan);
  end if;
  if v_model.id is null then
    perform private.refuse_missing('model: no such model', 'list_models() names them.');
  end if;
  if v_model.requires_paid and p_plan <> 'paid' then
    raise sqlstate 'PT403' using
      message = 'requires_paid_plan',
      detail = format('%s is for paid users', v_model.id),
      hint = 'Choose another model or a paid plan.';
  end if;
  if exists (
    select from private.breakers as b
    where b.paused_until > now() or p_user_id = any (b.failed_users || b.doubted_users)
  ) then
    v_paused_until := private.paused_until(v_model, p_user_id);
    if v_paused_until is not null then
      perform private.refuse_paused(v_model.id, v_paused_until);
    end if;
  end if;
  return v_model;
end;
$$;

-- The plan of a user now: paid or free.
create function private.plan_of(p_entitlement public.entitlements) returns private.plans
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_plan private.plans;
  v_is_paid boolean := p_entitlement.is_paid and p_entitlement.paid_until > now();
begin
  select * into v_plan from private.plans as p
  where p.name = case when v_is_paid then 'paid' else 'free' end;
  return v_plan;
end;
$$;

create view private.queue_floor with (security_invoker = true) as
select c.last_value - 100000 as fair_key from private.virtual_clock as c;  -- 100 credits, weight 1

comment on view private.queue_floor is
  'The fair_key a scan of the queue may start at: what is queued below is rare, and found by a '
  'full scan at least once a second.';

revoke all on private.queue_floor from public, anon, authenticated, service_role;

create view private.live_jobs with (security_invoker = true) as
select
  r.job_id,
  r.user_id
from private.ready_jobs as r
union all
select
  r.job_id,
  r.user_id
from private.running_jobs as r;

comment on view private.live_jobs is
  'Jobs that are queued or running. A user''s are counted when asked for: a count kept in a row of '
  'the user is written at every end of a job, and while a long transaction holds back vacuum, each '
  'write walks all the versions before it.';

revoke all on private.live_jobs from public, anon, authenticated, service_role;

-- Whether a job has waited this long though its user has nothing running. Who has, waits for his
-- own: one user's long queue is old, but no reason to refuse others, who go before it. Looked for
-- among the next jobs in fair order: whoever has waited for a first job is there.
create function private.has_waited(p_interval interval) returns boolean
language sql set search_path = pg_catalog, pg_temp as $$
  select exists (
    select from (
      select r.user_id, r.model_id, r.queued_at from private.ready_jobs as r
      where r.run_at is null and r.fair_key >= (select f.fair_key from private.queue_floor as f)
      order by r.fair_key, r.seq limit 1000
    ) as next
    where next.queued_at < now() - p_interval
      and next.user_id not in (select r.user_id from private.running_jobs as r)
      -- Nor does it wait for us while its model is paused.
      and not exists (
        select from private.paused_models as p
        where p.id = next.model_id
          and (p.paused_until is not null or p.resumed_at > now() - p_interval)
      )
  )
$$;

-- Whether the queue is too far behind for a request of this plan.
--
-- queue_state is refreshed twice a minute, or not at all while nothing runs. Nothing that is ready
-- now can have been so before the oldest that was ready then, nor, if there was none, before then.
-- So it never hides that the queue is busy; where it says so, the queue itself is looked at.
create function private.is_busy(p_plan private.plans) returns boolean
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  if (select least(q.oldest_ready_at, q.refreshed_at) from private.queue_state as q)
    < now() - p_plan.busy_after then
    return private.has_waited(p_plan.busy_after);
  end if;
  return false;
end;
$$;

-- One more job fits the plan's limits. The caller has locked the entitlement row, and what is
-- counted here is counted after that: concurrent requests cannot pass them together.
--
-- Raises: PT429 too_many_active, PT429 rate_limited, PT503 busy.
create function private.check_limits(
  p_entitlement public.entitlements, p_plan private.plans
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  if p_plan.max_active <= (
    select count(*) from (
      select from private.live_jobs as j
      where j.user_id = p_entitlement.user_id limit p_plan.max_active
    ) as live
  ) then
    perform private.refuse_for_now(
      429,
      'too_many_active',
      format('%s jobs are queued or running, the plan''s limit', p_plan.max_active),
      5
    );
  end if;
  if p_entitlement.minute_jobs >= p_plan.max_per_minute
    and p_entitlement.minute_started_at > now() - interval '1 minute' then
    perform private.refuse_for_now(
      429,
      'rate_limited',
      format('%s jobs in this minute, the plan''s limit', p_plan.max_per_minute),
      ceil(extract(
        epoch from p_entitlement.minute_started_at + interval '1 minute' - now()
      ))::integer
    );
  end if;
  if p_entitlement.day_started_at > now() - interval '1 day' and (
    p_entitlement.day_jobs >= p_plan.max_per_minute::bigint * p_plan.full_minutes_per_day
    or p_entitlement.day_burned >= p_plan.max_burned_per_day
  ) then
    perform private.refuse_for_now(
      429,
      'rate_limited',
      format(
        '%s jobs in this day, %s of them canceled when they ran: the plan''s limits are %s and %s',
        p_entitlement.day_jobs, p_entitlement.day_burned,
        p_plan.max_per_minute::bigint * p_plan.full_minutes_per_day, p_plan.max_burned_per_day
      ),
      ceil(extract(epoch from p_entitlement.day_started_at + interval '1 day' - now()))::integer
    );
  end if;
  if private.is_busy(p_plan) then
    perform private.refuse_for_now(503, 'busy', 'Jobs wait too long to take in more.', 60);
  end if;
end;
$$;
