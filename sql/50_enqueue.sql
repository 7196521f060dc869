-- The one way in: gate, charge, and enqueue in one transaction, or nothing at all.
--
-- Lock order: enqueue locks the entitlement row first, and everything else it writes is a new row.
-- All other functions lock running or ready row -> generation -> entitlement, so none of them can
-- wait for another in a circle. Only deleting a user goes the other way round; PostgreSQL then ends
-- one of the two, and workers repeat their calls. The lock also serialises one user's requests:
-- limits, balance and idempotency key are read and written without a race.

-- Jobs that would be claimed before this one, counted up to p_at_most; null unless it is queued.
create or replace function private.queue_position(
  p_job_id uuid,
  p_at_most integer default 1000
)
returns integer
language sql
stable
set search_path = ''
as $$
  select (
    select count(*)::integer
    from (
      select 1
      from private.ready_jobs as r
      where r.run_at is null and (r.fair_key, r.seq) < (job.fair_key, job.seq)
      limit p_at_most
    ) as ahead
  )
  from private.ready_jobs as job
  where job.job_id = p_job_id
$$;

revoke all on function private.queue_position(uuid, integer)
from public, anon, authenticated, service_role;

-- Wakes one sleeping worker, if there is one: the one heard of last, which is least likely dead.
--
-- NOTIFY serialises commits over the whole instance, so it is sent only when somebody sleeps. A
-- worker another transaction is waking is skipped. A wake-up that falls between is made good by the
-- worker, which claims again after it went to sleep.
create or replace function private.wake_worker()
returns void
language plpgsql
set search_path = ''
as $$
declare
  v_worker_id bigint;
begin
  update private.workers set asleep = false
  where id = (
    select w.id from private.workers as w
    where w.asleep and w.seen_at > now() - (select s.lease from private.settings as s)
    order by w.seen_at desc limit 1 for update skip locked
  )
  returning id into v_worker_id;
  if found then
    perform pg_notify('darkroom_worker_' || v_worker_id, '');
  end if;
end;
$$;

revoke all on function private.wake_worker() from public, anon, authenticated, service_role;

-- How many images this input makes; a schema's default counts where the params are silent.
create or replace function private.count_images(p_model public.models, p_provider_input jsonb)
returns smallint
language plpgsql
stable
set search_path = ''
as $$
declare
  v_images numeric := coalesce(
    (p_provider_input ->> p_model.image_count_input)::numeric, 1
  );
begin
  if v_images not between 1 and p_model.max_images then
    perform private.refuse_input(
      format('params.%s: not between 1 and %s', p_model.image_count_input, p_model.max_images)
    );
  end if;
  return v_images;
end;
$$;

revoke all on function private.count_images(public.models, jsonb)
from public, anon, authenticated, service_role;

-- Virtual finish time of a job of this cost: what the user queued before counts, but never less
-- than the queue's present. A price of 0 counts as 1, or included models would pass everybody.
create or replace function private.next_fair_key(
  p_entitlement public.entitlements,
  p_list_price integer,
  p_weight integer
)
returns bigint
language sql
volatile
set search_path = ''
as $$
  select
    greatest(
      c.last_value,
      case when p_entitlement.active_jobs > 0 then p_entitlement.last_fair_key end
    )
    + greatest(p_list_price, 1)::bigint * 1000 / p_weight
  from private.virtual_clock as c
$$;

revoke all on function private.next_fair_key(public.entitlements, integer, integer)
from public, anon, authenticated, service_role;

-- The generation this user's key named before; all null if the key is new.
--
-- Raises: PT409 idempotency_conflict if the payload differs.
create or replace function private.find_generation_by_key(
  p_user_id uuid,
  p_key text,
  p_model_id text,
  p_prompt text,
  p_params jsonb
)
returns public.generations
language plpgsql
stable
set search_path = ''
as $$
declare
  v_generation public.generations;
begin
  if p_key is null then
    return null;
  end if;
  select * into v_generation
  from public.generations where user_id = p_user_id and idempotency_key = p_key;
  if found and (v_generation.model_id, v_generation.prompt, v_generation.input)
    is distinct from (p_model_id, p_prompt, p_params) then
    raise sqlstate 'PT409' using
      message = 'idempotency_conflict',
      detail = 'idempotency_key was used with another payload',
      hint = 'Use a new key for a new request.';
  end if;
  return v_generation;
end;
$$;

revoke all on function private.find_generation_by_key(uuid, text, text, text, jsonb)
from public, anon, authenticated, service_role;

-- Writes the accepted request: charge, generation, ready row; then wakes a worker.
create or replace function private.insert_generation(
  p_entitlement public.entitlements,
  p_plan private.plans,
  p_model public.models,
  p_prompt text,
  p_params jsonb,
  p_provider_input jsonb,
  p_idempotency_key text
)
returns public.generations
language plpgsql
set search_path = ''
as $$
declare
  v_id uuid := private.uuid_v7();
  v_images smallint := private.count_images(p_model, p_provider_input);
  v_price integer := v_images * case p_plan.name
    when 'paid' then p_model.paid_price_credits
    else p_model.price_credits
  end;
  v_fair_key bigint := private.next_fair_key(
    p_entitlement, p_model.price_credits * v_images, p_plan.weight
  );
  v_generation public.generations;
begin
  perform private.charge_credits(p_entitlement, v_id, v_price, v_fair_key);
  insert into public.generations (
    id, user_id, model_id, prompt, input,
    provider_input,
    price_credits, image_count, idempotency_key
  )
  values (
    v_id, p_entitlement.user_id, p_model.id, p_prompt, p_params,
    p_provider_input,
    v_price, v_images, p_idempotency_key
  )
  returning * into v_generation;
  insert into private.ready_jobs (job_id, user_id, model_id, fair_key)
  values (v_id, p_entitlement.user_id, p_model.id, v_fair_key);
  perform private.wake_worker();
  return v_generation;
end;
$$;

revoke all on function private.insert_generation(
  public.entitlements, private.plans, public.models, text, jsonb, jsonb, text
) from public, anon, authenticated, service_role;

-- How long a client should wait before it reads the state again: a tenth of the job's age so far,
-- between one and ten seconds; null when there is nothing to wait for.
create or replace function private.poll_after_ms(p_generation public.generations)
returns integer
language sql
stable
set search_path = ''
as $$
  select case
    when p_generation.finished_at is null then least(10000, greatest(
      1000, extract(epoch from now() - p_generation.created_at) * 100
    ))::integer
  end
$$;

revoke all on function private.poll_after_ms(public.generations)
from public, anon, authenticated, service_role;

-- What enqueue_generation answers, the first time and for every repeat of the key.
create or replace function private.enqueue_answer(p_generation public.generations)
returns json
language sql
stable
set search_path = ''
as $$
  select json_build_object(
    'job_id', p_generation.id,
    'status', p_generation.status,
    'credits_left', (
      select e.credits from public.entitlements as e where e.user_id = p_generation.user_id
    ),
    'queue_position', private.queue_position(p_generation.id),
    'poll_after_ms', private.poll_after_ms(p_generation)
  )
$$;

revoke all on function private.enqueue_answer(public.generations)
from public, anon, authenticated, service_role;

-- Body of public.enqueue_generation.
--
-- Locks: the entitlement row.
-- Raises: see the comment on public.enqueue_generation.
create or replace function private.enqueue_generation(
  p_model text,
  p_prompt text,
  p_params jsonb,
  p_idempotency_key text
)
returns json
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_user_id uuid := private.require_user_id();
  v_params jsonb := private.read_params(p_params);
  v_prompt text := coalesce(p_prompt, '');
  v_provider_input jsonb;
  v_entitlement public.entitlements;
  v_plan private.plans;
  v_model public.models;
  v_generation public.generations;
begin
  perform private.check_request(p_prompt, p_idempotency_key);
  v_entitlement := private.lock_entitlement(v_user_id);
  v_generation := private.find_generation_by_key(
    v_user_id, p_idempotency_key, p_model, v_prompt, v_params
  );
  if v_generation.id is null then
    select * into strict v_plan from private.plans where name = private.plan_of(v_entitlement);
    v_model := private.require_model(p_model, v_plan.name);
    v_provider_input := private.prepare_input(v_model, v_user_id, v_prompt, v_params);
    perform private.check_limits(v_entitlement, v_plan);
    v_generation := private.insert_generation(
      v_entitlement, v_plan, v_model, v_prompt, v_params, v_provider_input, p_idempotency_key
    );
  end if;
  return private.enqueue_answer(v_generation);
end;
$$;

revoke all on function private.enqueue_generation(text, text, jsonb, text)
from public, anon, authenticated, service_role;
grant execute on function private.enqueue_generation(text, text, jsonb, text) to authenticated;

create or replace function public.enqueue_generation(
  model text,
  prompt text,
  params jsonb default '{}',
  idempotency_key text default null
)
returns json
language sql
set search_path = ''
as $$
  select private.enqueue_generation(
    enqueue_generation.model,
    enqueue_generation.prompt,
    enqueue_generation.params,
    enqueue_generation.idempotency_key
  )
$$;

comment on function public.enqueue_generation is
  'Asks for a picture: checks, charges and queues in one transaction. Answers {job_id, status, '
  'credits_left, queue_position (jobs ahead, null unless queued), poll_after_ms}. The same '
  'idempotency_key and payload answer with the same job and charge nothing. Errors: PT400 '
  'invalid_input, PT401 not_authenticated, PT402 insufficient_credits, PT403 requires_paid_plan, '
  'PT404 not_found, PT409 idempotency_conflict, PT429 too_many_active | rate_limited.';

revoke all on function public.enqueue_generation(text, text, jsonb, text)
from public, anon, authenticated, service_role;
grant execute on function public.enqueue_generation(text, text, jsonb, text) to authenticated;
