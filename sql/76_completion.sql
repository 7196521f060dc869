-- How an attempt ends well: complete_jobs.
--
-- What was stored is written down and settled on: for images that were charged but not made are
-- given back. Many jobs end in one call, which does the same for all of them in as few statements
-- as can be, since each costs its start, and reaches every row by its key.

-- Gives back what was charged for images that were not made. All arrays are in the order of the
-- jobs.
--
-- Locks: the entitlement rows of those users, in order of id.
-- Raises: 22023 if of one there is no image or more than were charged.
create function private.refund_missing_images(
  p_jobs private.running_jobs[], p_stored integer[], p_charged integer[], p_prices integer[]
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_at bigint;
begin
  for v_at in
    select j.ordinality from unnest(p_jobs) with ordinality as j order by j.user_id
  loop
    if p_stored[v_at] not between 1 and p_charged[v_at] then
      raise exception '% images stored, % charged', p_stored[v_at], p_charged[v_at] using
        errcode = 'invalid_parameter_value', detail = format('job %s', (p_jobs[v_at]).job_id);
    elsif p_stored[v_at] < p_charged[v_at] then
      -- Without a rest: the price is a whole number for each image.
      perform private.refund_generation(
        (p_jobs[v_at]).user_id, (p_jobs[v_at]).job_id,
        p_prices[v_at] / p_charged[v_at] * (p_charged[v_at] - p_stored[v_at])
      );
    end if;
  end loop;
end;
$$;

-- Ends jobs whose leases hold and whose images are in Storage. One statement, for each costs its
-- start; and nothing of a user is written, for her row's dead versions add up. Answers arrays in
-- one order, empty or null if no lease holds.
--
-- Locks: running rows, generations, each in order of id.
create function private.finish_completed(
  p_job_ids uuid[], p_tokens bigint[], p_images jsonb[], p_metrics jsonb[],
  out jobs private.running_jobs[], out metrics jsonb[], out stored integer[], out charged integer[],
  out prices integer[]
)
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  with ended as (
    delete from private.running_jobs as r
    where r.job_id = any (p_job_ids) and r.token = any (p_tokens)
    returning r as job, r.job_id, r.user_id, array_position(p_tokens, r.token) as place
  ),
  finished as (
    update public.generations as g set
      status = 'completed', finished_at = now(), updated_at = now()
    where g.id = any (array(select e.job_id from ended as e))
    returning g.id, g.image_count::integer, g.price_credits
  ),
  written as (
    insert into public.images (
      generation_id, position, user_id, storage_path, preview_path, content_type,
      width, height, bytes, blurhash
    )
    select
      e.job_id, i.position, e.user_id, i.storage_path, i.preview_path, i.content_type,
      i.width, i.height, i.bytes, i.blurhash
    from ended as e
    cross join lateral jsonb_populate_recordset(null::public.images, p_images[e.place]) as i
  )
  select
    array_agg(e.job), array_agg(coalesce(p_metrics[e.place], '{}')),
    array_agg(coalesce(jsonb_array_length(p_images[e.place]), 0)),
    array_agg(f.image_count), array_agg(f.price_credits)
  into jobs, metrics, stored, charged, prices
  from ended as e inner join finished as f on f.id = e.job_id;
end;
$$;

create function private.complete_jobs(
  p_job_ids uuid[], p_tokens bigint[], p_images jsonb[], p_metrics jsonb[]
) returns table (token bigint, verdict text)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
declare
  v_done record := private.finish_completed(p_job_ids, p_tokens, p_images, p_metrics);
  v_job_ids uuid[] := array(select j.job_id from unnest(v_done.jobs) as j);
begin
  if v_done.stored <> v_done.charged then
    perform private.refund_missing_images(
      v_done.jobs, v_done.stored, v_done.charged, v_done.prices
    );
  end if;
  if cardinality(v_job_ids) < cardinality(p_tokens) then
    return query select e.token, 'repeated'
    from private.ended_before(p_job_ids, p_tokens, '{completed}') as e (token);
  end if;
  perform private.record_attempts(v_done.jobs, 'completed', v_done.metrics);
  if exists (
    select from private.breakers as b where b.failures > 0 or b.times_opened > 0
  ) then
    perform private.note_successes(v_done.jobs);
  end if;
  return query select j.token, 'completed' from unnest(v_done.jobs) as j;
end;
$$;

comment on function private.complete_jobs is
  'Ends jobs well: stores what was made and settles on it, for images that were charged but not '
  'made are given back. p_images, of each job: [{position, storage_path, preview_path, '
  'content_type, width, height, bytes, blurhash}]; p_metrics: {provider_seconds, images (as many '
  'as the provider made), is_billed (false: the provider asks nothing for it)}. Answers each job '
  'whose lease held: completed, or repeated (the call was made before). Errors, which change '
  'nothing for any of the jobs: 22023 bad images, and what breaks a constraint.';
