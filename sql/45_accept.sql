-- Accept: what is written when a request has passed every check.
--
-- insert_generation is shared by the ways in: enqueue (50), batch (52), retry and redrive (54). The
-- caller has locked the entitlement row; all that is written here but that row is new.

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

-- How many images this input makes, at most; a schema's default counts where the params are silent.
-- Where nobody can know before (no input says it, or one says "auto"), the most the model makes:
-- that is charged, and complete_job gives back what was not made.
create or replace function private.count_images(p_model public.models, p_provider_input jsonb)
returns smallint
language plpgsql
stable
set search_path = ''
as $$
declare
  v_said jsonb := p_provider_input -> p_model.image_count_input;
  v_images numeric := case jsonb_typeof(v_said)
    when 'number' then v_said::numeric
    else p_model.max_images
  end;
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

-- The credits one image costs this plan.
create or replace function private.image_price(p_model public.models, p_plan private.plans)
returns integer
language sql
immutable
set search_path = ''
as $$
  select case p_plan.name when 'paid' then p_model.paid_price_credits else p_model.price_credits end
$$;

revoke all on function private.image_price(public.models, private.plans)
from public, anon, authenticated, service_role;

-- A request that fits the model, as insert_generation takes it.
--
-- Raises: PT400 invalid_input.
create or replace function private.draft_generation(
  p_model public.models,
  p_name text,
  p_user_id uuid,
  p_prompt text,
  p_params jsonb
)
returns public.generations
language plpgsql
set search_path = ''
as $$
declare
  v_draft public.generations;
begin
  v_draft.alias_id := nullif(p_name, p_model.id);
  v_draft.prompt := p_prompt;
  v_draft.input := p_params;
  v_draft.provider_input := private.prepare_input(p_model, p_user_id, p_prompt, p_params);
  return v_draft;
end;
$$;

revoke all on function private.draft_generation(public.models, text, uuid, text, jsonb)
from public, anon, authenticated, service_role;

-- Writes an accepted request: charge, generation, ready row; then wakes a worker. The draft holds
-- what the user asked for and what is sent; its id, price and times are made here.
--
-- Raises: PT402 insufficient_credits.
create or replace function private.insert_generation(
  p_entitlement public.entitlements,
  p_plan private.plans,
  p_model public.models,
  p_draft public.generations,
  p_is_free boolean default false
)
returns public.generations
language plpgsql
set search_path = ''
as $$
declare
  v_id uuid := private.uuid_v7();
  v_images smallint := private.count_images(p_model, p_draft.provider_input);
  v_price integer := case
    when p_is_free then 0
    else v_images * private.image_price(p_model, p_plan)
  end;
  v_fair_key bigint := private.next_fair_key(
    p_entitlement, p_model.price_credits * v_images, p_plan.weight
  );
  v_generation public.generations;
begin
  perform private.charge_credits(p_entitlement, v_id, v_price, v_fair_key);
  insert into public.generations (
    id, user_id, model_id, alias_id, batch_id, retry_of, prompt, input, provider_input,
    price_credits, image_count, queue_distance, idempotency_key
  )
  values (
    v_id, p_entitlement.user_id, p_model.id, p_draft.alias_id, p_draft.batch_id, p_draft.retry_of,
    p_draft.prompt, p_draft.input, p_draft.provider_input,
    v_price, v_images, v_fair_key - (select c.last_value from private.virtual_clock as c),
    p_draft.idempotency_key
  )
  returning * into v_generation;
  insert into private.ready_jobs (job_id, user_id, model_id, fair_key)
  values (v_id, p_entitlement.user_id, p_model.id, v_fair_key);
  perform private.wake_worker();
  return v_generation;
end;
$$;

revoke all on function private.insert_generation(
  public.entitlements, private.plans, public.models, public.generations, boolean
) from public, anon, authenticated, service_role;
