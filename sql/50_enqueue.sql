-- The one way in: gate, charge, and enqueue in one transaction, or nothing at all.
--
-- Each way in, this and those of 52 and 54, locks the entitlement first (gate, 30), and accept()
-- writes for all of them: the entitlement, and new rows. All other functions lock running or ready
-- row -> generation -> entitlement, so none of them can wait for another in a circle. The lock also
-- serialises one user's requests: limits, balance and idempotency key are read and written without
-- a race.

-- Wakes sleeping workers, as many as there is work for: those heard of last, which are least likely
-- dead. Where it is for one of these providers, only those that serve one, the first of them first.
--
-- NOTIFY serialises commits over the whole instance, so it is sent only when somebody sleeps. A
-- worker another transaction is waking is skipped. A wake-up that falls between is made good by the
-- worker, which claims again after it went to sleep.
create function private.wake_workers(
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

-- What the ways in answer to a repeat, as accept() does the first time. The first look at the
-- status tells where the job is in the queue, and when it is likely to be finished.
create function private.known_answer(
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

-- Writes a request that passed every check but the plan's limits and the price: one job for each
-- prompt, with what is sent for it; charge, generations, places in the queue; then wakes workers.
-- Answers as enqueue_generation does for the first of them.
--
-- Charged are as many images as the input says; a schema's default counts where the params are
-- silent. Where nobody can know before (no input says it, or one says "auto"), the most the model
-- makes: complete_jobs gives back what was not made.
--
-- fair_key is a virtual finish time: what the user queued before counts, but never less than the
-- queue's present. A price of 0 counts as 1, or included models would pass everybody.
--
-- What is named here is begun anew in each transaction, and so costs more than what is done. Hence
-- one statement, and ids made in it: as uuid_v7 makes them, a microsecond apart.
--
-- Raises: PT400 invalid_input, PT402 insufficient_credits, PT402 in_debt, PT409 price_changed,
-- PT429 too_many_active, PT429 rate_limited, PT503 busy.
create function private.accept(
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

-- With generic plans, here and in all it calls: every row is reached by its key, and a plan made
-- for one request would cost more than the request. By indexes only: a plan made while the queue
-- was empty would else read all of it once it is long.
--
-- A deleted generation is found by no read, so it is no answer to its key either; nor is it made
-- anew, for its key was charged. Once it is erased its key is new. What was made from a source
-- image is not reused: the file of that path may be another one now.
--
-- Locks: the entitlement row.
-- Raises: see the comment on public.enqueue_generation.
create function private.enqueue_generation(
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
