-- Gating: may this user ask for this? Nothing here writes but the lock of the user's entitlement.
--
-- gate() brings all that a request is held against in one statement; where that is not plainly
-- well, require_model() and refuse_limits() look closer and say what is wrong. Whether the input
-- fits the model is checked in 32. Every refusal of the API goes through refuse().

-- Raises one of the API's errors: a stable token, what is wrong, what to do. The one place that
-- says which HTTP status a token has.
--
-- One that passes with time carries Retry-After. PostgREST reads status and headers from the detail
-- of SQLSTATE PGRST (docs.postgrest.org, "Raise errors with HTTP status codes"). Browsers show no
-- such header to the page and supabase-js none at all, and a body has texts only: so the hint is
-- always this sentence, to be read as data.
create function private.refuse(
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

create function private.refuse_input(p_detail text, p_hint text default null) returns void
language sql set search_path = pg_catalog, pg_temp
return private.refuse('invalid_input', p_detail, p_hint);

create function private.refuse_missing(p_detail text, p_hint text) returns void
language sql set search_path = pg_catalog, pg_temp
return private.refuse('not_found', p_detail, p_hint);

-- The token outlived the user.
create function private.refuse_unknown_user() returns void
language sql set search_path = pg_catalog, pg_temp
return private.refuse(
  'not_authenticated', 'There is no such user any more.', 'Sign in again.'
);

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
    perform private.refuse(
      'method_not_allowed', 'This function changes something.', 'Call it by POST.'
    );
  end if;
  perform private.refuse(
    'unavailable', 'The database takes no changes at the moment.', p_retry_after => 30
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
    perform private.refuse(
      'not_authenticated', 'The request carries no user.',
      'Sign in and send the access token as Authorization: Bearer.'
    );
  elsif p_writes then
    perform private.require_writable();
  end if;
  return v_user_id;
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

-- Raises PT404 not_found, the same for a job that never was, is somebody else's, or is deleted; or
-- PT401 not_authenticated: the user is.
create function private.refuse_unknown_job() returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  perform private.require_known_user_id();
  perform private.refuse_missing(
    'job_id: no such job of yours', 'Use the job_id that enqueue_generation answered.'
  );
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

-- The params as an object, if they, the prompts and the key are of a size and form we take. Some
-- gateways hand a jsonb argument as a JSON string that holds the text: it is unwrapped here, once.
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
    begin
      v_params := (v_params #>> '{}')::jsonb;
    exception
      when invalid_text_representation or untranslatable_character or numeric_value_out_of_range
        or statement_too_complex then
        v_params := 'null';
    end;
  end if;
  -- Measured before anything is written out: in memory no JSON has more than eight times the bytes
  -- of its text, and what has less than 500 holds too few numbers to come to much. 1e131071 is
  -- eight bytes on the way in, sixteen here, and 131 kB once it is written, 0e-16383 likewise. No
  -- schema has a use for one.
  if pg_column_size(v_params) between 500 and 8 * v_max_bytes and exists (
    select from jsonb_path_query(v_params, 'strict $.** ? (@.type() == "number")') as n (value)
    where abs(n.value::numeric) >= 1e400 or scale(n.value::numeric) > 400
  ) then
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

create view private.queue_floor with (security_invoker = true) as
select c.last_value - 100000 as fair_key from private.virtual_clock as c;  -- 100 credits, weight 1

comment on view private.queue_floor is
  'The fair_key a scan of the queue may start at: what is queued below is rare, and found by a '
  'full scan at least once a second.';

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

-- The plan of a user now: paid, guest or free.
create function private.plan_of(p_entitlement public.entitlements) returns private.plans
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return (select p from private.plans as p where p.name = case
    when p_entitlement.paid_until > now() then 'paid'
    when p_entitlement.is_guest then 'guest'
    else 'free'
  end);
end;
$$;

create type private.gate as (
  user_id uuid,
  credits integer,
  last_fair_key bigint,
  plan text,
  weight integer,
  max_active integer,
  max_batch integer,
  may_be_over_limits boolean,
  is_model_unclear boolean,
  model public.models,
  credits_end_at timestamptz
);

comment on type private.gate is
  'What a request is held against: the user''s balance and plan, the model, and whether there is '
  'anything to look at more closely. See private.gate().';

-- All that a request of this user for this model is held against, with the entitlement locked. From
-- here on the user's requests take turns, and what a later statement counts is sure until the end.
--
-- oldest_ready_at is renewed twice a minute, or not at all while nothing runs. Nothing that is
-- ready now can have been so before the oldest that was ready then, nor, if there was none, before
-- then. So it never hides that the queue is busy; where it may be, the queue itself is looked at.
--
-- The lock is taken apart, for who waits for it may be paid when it comes, and so has another plan.
--
-- Raises: PT401 not_authenticated.
create function private.gate(p_user_id uuid, p_model text) returns private.gate
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

-- The model of this name, or the one that an alias of this name stands for, if this user may use
-- it.
--
-- Weighted rendezvous hashing: each arm of an alias draws a number that depends on nothing but user
-- and arm, and the smallest wins. So a user stays with an arm, and a change of weights moves as few
-- as possible. An arm that is paused or has no budget left is passed over while another is not.
--
-- Raises: PT404 not_found, PT403 requires_paid_plan, PT503 model_paused, PT503 budget_spent.
create function private.require_model(p_gate private.gate, p_name text) returns public.models
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_model public.models := p_gate.model;
  v_token text := 'model_paused';
  v_until timestamptz;
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
  v_until := private.paused_until(v_model, p_gate.user_id);
  if v_until is null and exists (
    select from private.budgets as b
    where b.on_breach <> 'alert' and coalesce(b.user_id, p_gate.user_id) = p_gate.user_id
      and (b.spent_until > now() or v_model.cost_usd is null)
  ) then
    v_token := 'budget_spent';
    v_until := private.budget_spent_until(v_model, p_gate.user_id);
  end if;
  if v_until is not null then
    perform private.refuse(
      v_token, format(case v_token
        when 'model_paused' then '%s is paused' else 'what %s may cost is spent, or not known'
      end, v_model.id),
      p_retry_after => ceil(extract(
        epoch from least(v_until, now() + interval '1 hour') - now()
      ))::integer
    );
  end if;
  return v_model;
end;
$$;

-- Whether a job has waited this long though its user has nothing running. Who has, waits for his
-- own: one user's long queue is old, but no reason to refuse others, who go before it. Looked for
-- among the next jobs in fair order: whoever has waited for a first job is there. What waits for a
-- provider that takes so many at once is in the way of those alone who ask for the same provider.
create function private.is_busy(
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

-- Raises PT402 in_debt, PT403 account_blocked, PT429 too_many_active, PT429 rate_limited or PT503
-- busy, unless one more job fits after all: the queue is not as old as it seemed.
create function private.refuse_limits(p_user_id uuid, p_provider text) returns void
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
