-- Again: a failed or canceled generation as a new one.
--
-- retry_generation is the user's and is charged as any request; redrive_failed is the operator's,
-- after an outage, and is free. Either way the old generation stays what it was, so each is
-- charged once or refunded once, and retry_of says where the new one comes from. While that one is
-- under way or done, a further retry answers with it: a double tap buys once.

-- The generation that repeats this one and is under way or done; all null if there is none.
create or replace function private.find_retry(p_generation_id uuid)
returns public.generations
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select g.* from public.generations as g
  where g.retry_of = p_generation_id and g.status not in ('failed', 'canceled')
  order by g.deleted_at nulls first, g.id limit 1
$$;

revoke all on function private.find_retry(uuid)
from public, anon, authenticated, service_role;

-- The user's generation, if it failed or was canceled.
--
-- Raises: PT404 not_found, PT409 not_finished, PT409 already_finished.
create or replace function private.require_retryable(p_job_id uuid, p_user_id uuid)
returns public.generations
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_generation public.generations := private.require_generation(p_job_id, p_user_id);
begin
  if v_generation.finished_at is null then
    raise sqlstate 'PT409' using
      message = 'not_finished',
      detail = format('the job is %s', v_generation.status),
      hint = 'Wait for its end, or cancel it first.';
  elsif v_generation.status = 'completed' then
    raise sqlstate 'PT409' using
      message = 'already_finished',
      detail = 'the job is completed',
      hint = 'Enqueue a new one.';
  end if;
  return v_generation;
end;
$$;

revoke all on function private.require_retryable(uuid, uuid)
from public, anon, authenticated, service_role;

-- Body of public.retry_generation.
--
-- Locks: the entitlement row.
-- Raises: see the comment on public.retry_generation.
create or replace function private.retry_generation(p_job_id uuid)
returns json
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
declare
  v_user_id uuid := private.require_user_id();
  v_entitlement public.entitlements := private.lock_entitlement(v_user_id);
  v_plan private.plans := private.plan_of(v_entitlement);
  v_old public.generations := private.require_retryable(p_job_id, v_user_id);
  v_known public.generations := private.find_retry(p_job_id);
  v_model public.models;
  v_draft public.generations;
begin
  if v_known.id is not null and v_known.deleted_at is null then
    return private.enqueue_answer(v_known);
  end if;
  v_model := private.require_model(v_old.model_id, v_user_id, v_plan.name);
  v_draft := private.draft_generation(
    v_model, coalesce(v_old.alias_id, v_model.id), v_user_id, v_old.prompt, v_old.input
  );
  v_draft.retry_of := p_job_id;
  perform private.check_limits(v_entitlement, v_plan);
  v_known := private.insert_generations(
    v_entitlement, v_plan, v_model, v_draft, array[v_draft.prompt], array[v_draft.provider_input]
  );
  return private.enqueue_answer(v_known);
end;
$$;

revoke all on function private.retry_generation(uuid)
from public, anon, authenticated, service_role;
grant execute on function private.retry_generation(uuid) to authenticated;

create or replace function public.retry_generation(job_id uuid)
returns json
language sql
set search_path = pg_catalog, pg_temp
as $$
  select private.retry_generation(retry_generation.job_id)
$$;

comment on function public.retry_generation is
  'Asks again for what failed or was canceled: a new job, charged as any, with a new seed unless '
  'you gave one. While a retry of it is under way or done, answers with that one. Answers as '
  'enqueue_generation does. Errors: those of enqueue_generation, PT409 not_finished | '
  'already_finished.';

revoke all on function public.retry_generation(uuid)
from public, anon, authenticated, service_role;
grant execute on function public.retry_generation(uuid) to authenticated;

-- Queues one failed generation again, with just what was sent before, free. Answers whether it did:
-- not if its user, its model, or the need for it is gone.
--
-- Locks: the entitlement row.
create or replace function private.redrive_generation(p_old public.generations)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_entitlement public.entitlements;
  v_known public.generations;
  v_draft public.generations := p_old;
  v_model public.models;
begin
  select * into v_entitlement from public.entitlements where user_id = p_old.user_id for update;
  v_known := private.find_retry(p_old.id);
  select * into v_model from public.models where id = p_old.model_id;
  if v_entitlement.user_id is null or v_model.id is null or v_known.id is not null then
    return false;
  end if;
  v_draft.retry_of := p_old.id;
  v_draft.batch_id := null;
  v_draft.idempotency_key := null;
  perform private.insert_generations(
    v_entitlement, private.plan_of(v_entitlement), v_model, v_draft,
    array[v_draft.prompt], array[v_draft.provider_input], p_is_free => true
  );
  return true;
end;
$$;

revoke all on function private.redrive_generation(public.generations)
from public, anon, authenticated, service_role;

-- Body of public.redrive_failed. Users in order, so that two runs lock in the same order.
--
-- Locks: the users' entitlement rows.
-- Raises: PT400 invalid_input.
create or replace function private.redrive_failed(
  p_code text,
  p_since timestamptz,
  p_at_most integer
)
returns json
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_generation public.generations;
  v_count integer := 0;
begin
  if not exists (select from private.error_codes where code = p_code) then
    perform private.refuse_input('code: not a code of private.error_codes');
  elsif p_since is null or coalesce(p_at_most not between 1 and 10000, true) then
    perform private.refuse_input('since: missing, or at_most: not between 1 and 10000');
  end if;
  for v_generation in
    select g.* from public.generations as g
    where g.status = 'failed' and g.error_code = p_code and g.finished_at >= p_since
      and g.deleted_at is null and (private.find_retry(g.id)).id is null
    order by g.user_id, g.id limit p_at_most
  loop
    v_count := v_count + private.redrive_generation(v_generation)::integer;
  end loop;
  return json_build_object('redriven', v_count);
end;
$$;

revoke all on function private.redrive_failed(text, timestamptz, integer)
from public, anon, authenticated, service_role;
grant execute on function private.redrive_failed(text, timestamptz, integer) to service_role;

create or replace function public.redrive_failed(
  code text,
  since timestamptz,
  at_most integer default 1000
)
returns json
language sql
set search_path = pg_catalog, pg_temp
as $$
  select private.redrive_failed(redrive_failed.code, redrive_failed.since, redrive_failed.at_most)
$$;

comment on function public.redrive_failed is
  'Queues all generations again that failed with a code since a time, free for their users: new '
  'jobs with the same input, once each. Answers {redriven}; call again while it is at_most. It '
  'reads the whole history: an operator''s tool. Errors: PT400 invalid_input.';

revoke all on function public.redrive_failed(text, timestamptz, integer)
from public, anon, authenticated, service_role;
grant execute on function public.redrive_failed(text, timestamptz, integer) to service_role;
