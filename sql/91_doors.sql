-- The API: each function is a door to the definer of the same name in schema private, so that
-- nothing that users call in the exposed schema runs with more rights than theirs. Doors have no
-- code. What only operators call stands where its noun is.
--
-- What is called most is plpgsql, whose plans last for a session.

create function public.enqueue_generation(
  model text, prompt text, params jsonb default '{}', idempotency_key text default null,
  max_price_credits integer default null
) returns json
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  return private.enqueue_generation(
    model, prompt, params, idempotency_key, max_price_credits
  );
end;
$$;

comment on function public.enqueue_generation is
  'Asks for a picture: checks, charges and queues in one transaction. Answers {job_id, status, '
  'reused, credits_left, queue_position and eta_seconds (null here: get_job_status tells them), '
  'poll_after_ms, size (what the model takes for the width and height or aspect_ratio asked for; '
  'null: just that)}. The same idempotency_key and payload answer with the same job and charge '
  'nothing. With params.reuse = true and a seed, a finished generation of the same input is '
  'answered, free, if it is among your last 200. max_price_credits is the most that one generation '
  'may cost, as the user saw it; null: whatever it costs. Errors: PT400 invalid_input, PT401 '
  'not_authenticated, PT402 insufficient_credits | in_debt, PT403 requires_paid_plan | '
  'account_blocked, PT404 not_found (also where the job of the key is deleted), PT409 '
  'idempotency_conflict | price_changed, PT429 too_many_active | rate_limited, PT503 '
  'budget_spent | busy | model_paused | unavailable.';

create function public.enqueue_batch(
  model text, prompts text[], params jsonb default '{}', idempotency_key text default null,
  max_price_credits integer default null
) returns json
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  return private.enqueue_batch(model, prompts, params, idempotency_key, max_price_credits);
end;
$$;

comment on function public.enqueue_batch is
  'Asks for one generation of each prompt (as many as your plan''s max_batch), all or nothing. '
  'Answers as get_batch_status does. The same idempotency_key and request answer with the same '
  'batch and charge nothing; once all its jobs are deleted it is not found. An error of one prompt '
  'names it in details, prompts[0] being the first. Errors: those of enqueue_generation.';

create function public.get_batch_status(batch_id uuid) returns json
language sql stable set search_path = pg_catalog, pg_temp
return private.get_batch_status(batch_id);

comment on function public.get_batch_status is
  'One of your batches: {batch_id, job_ids in the order of the prompts, status (active | finished),'
  ' queued, processing, completed, failed, canceled (counts), progress (percent of the whole), '
  'credits_left, poll_after_ms (null when finished), created_at}. get_job_status tells of each. '
  'Errors: PT401 not_authenticated, PT404 not_found.';

create function public.retry_generation(
  job_id uuid, max_price_credits integer default null
) returns json
language sql set search_path = pg_catalog, pg_temp
return private.retry_generation(job_id, max_price_credits);

comment on function public.retry_generation is
  'Asks again for what failed or was canceled: a new job, charged as any, with a new seed unless '
  'you gave one. While a retry of it is under way or done, answers with that one. Answers as '
  'enqueue_generation does. Errors: those of enqueue_generation, PT409 not_finished | '
  'already_finished.';

create function public.ping() returns json
language sql stable set search_path = pg_catalog, pg_temp as $$
  select json_build_object('ok', true, 'server_time', now())
  from set_config('response.headers', '[{"Cache-Control": "no-store"}]', true)
$$;

comment on function public.ping is
  'Warms the path from the app to the database: touches no table. Answers {ok, server_time}, '
  'never cached.';

create function public.get_job_status(job_id uuid) returns json
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return private.get_job_status(job_id);
end;
$$;

comment on function public.get_job_status is
  'State of one of your jobs: {job_id, status, stage, progress (percent), attempt, '
  'cancel_requested, queue_position, eta_seconds (until it is likely to be finished, null if not '
  'known), poll_after_ms, model, alias, batch_id, retry_of, idempotency_key, prompt, params, '
  'price_credits, refunded_credits, error {code, message}, images [{position, path and '
  'preview_path in bucket generations, content_type, width, height, bytes, blurhash, '
  'is_public}], is_favorite, tags, created_at, started_at, finished_at}. attempt is the number of '
  'the one that runs, or while queued of those used up. Poll again after poll_after_ms, stop when '
  'it is null. Errors: PT401 not_authenticated, PT404 not_found.';

create function public.list_active_jobs(job_ids uuid[] default '{}') returns json
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return private.list_active_jobs(job_ids);
end;
$$;

comment on function public.list_active_jobs is
  'Your queued and running jobs, and those of job_ids (at most 100) whatever their state, newest '
  'first, each as get_job_status shows it. An app asks for it on start and on returning to the '
  'foreground; one that waits for several jobs polls it alone, with their ids, and so is told how '
  'each ended. Errors: PT400 invalid_input, PT401 not_authenticated.';

create function public.get_entitlement() returns json
language sql stable set search_path = pg_catalog, pg_temp
return private.get_entitlement();

comment on function public.get_entitlement is
  'Your plan, balance, limits and what is used of them: {user_id, plan (guest | free | paid), '
  'paid_until, blocked_until (nothing is taken in before), credits, debt (what you owe: later '
  'credits pay it first), credits_ending [{credits, expires_at}], active_jobs, max_active, '
  'minute_jobs, max_per_minute, max_batch, is_busy (requests are refused as busy now)}. Errors: '
  'PT401 not_authenticated.';

create function public.list_models() returns json
language sql stable set search_path = pg_catalog, pg_temp
return private.list_models();

comment on function public.list_models is
  'The catalogue: [{id, title, price_credits and paid_price_credits (per image), requires_paid, '
  'paused_until (null unless it is, or its budget is spent; may be infinity), max_images, inputs '
  '{name: JSON schema of a param}, image_inputs [those that take a picture: a path in bucket '
  'inputs, or generations/<path of an image>]}].';

create function public.list_generations(
  before uuid default null, page_size integer default 20, only_favorites boolean default false,
  tag text default null, status text default null
) returns json
language sql stable set search_path = pg_catalog, pg_temp
return private.list_generations(before, page_size, only_favorites, tag, status);

comment on function public.list_generations is
  'Your generations, newest first, without deleted ones: {generations [each as get_job_status '
  'shows it], next_before}. The next page is what comes before next_before; null: there is none. A '
  'page may have fewer than page_size (1 to 100) and still a next one. Errors: PT400 '
  'invalid_input, PT401 not_authenticated.';

create function public.delete_generation(job_id uuid) returns json
language sql set search_path = pg_catalog, pg_temp
return private.delete_generation(job_id);

comment on function public.delete_generation is
  'Hides one of your finished generations, ends the sharing of its images, and leaves it to be '
  'erased later: {job_id, deleted_at}. A repeat answers the same. Errors: PT401 not_authenticated, '
  'PT404 not_found, PT409 not_finished.';

create function public.restore_generation(job_id uuid) returns json
language sql set search_path = pg_catalog, pg_temp
return private.restore_generation(job_id);

comment on function public.restore_generation is
  'Takes back delete_generation as long as nothing is erased, and answers as get_job_status does. '
  'Favorite, tags and likes are as they were; its images stay private until shared again. Errors: '
  'PT401 not_authenticated, PT404 not_found.';

create function public.cancel_generation(job_id uuid) returns json
language sql set search_path = pg_catalog, pg_temp
return private.cancel_generation(job_id);

comment on function public.cancel_generation is
  'Cancels one of your jobs. A queued one is canceled and refunded at once. A running one shows '
  'cancel_requested, and its worker stops it within a second or so: canceled, refunded by the '
  'operator''s rule, or completed if the picture was there first. Repeating it changes nothing. '
  'Answers as get_job_status does. Errors: PT401 not_authenticated, PT404 not_found, PT409 '
  'already_finished.';

create function public.cancel_batch(batch_id uuid) returns json
language sql set search_path = pg_catalog, pg_temp
return private.cancel_batch(batch_id);

comment on function public.cancel_batch is
  'Cancels every job of one of your batches that has not ended, each as cancel_generation does. '
  'Answers as get_batch_status does. Errors: PT401 not_authenticated, PT404 not_found.';
