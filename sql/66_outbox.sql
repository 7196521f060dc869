-- The outbox's way in: what is told when a job ends, to whom, and in what words.
--
-- What ends jobs (75, 76) calls record_events in the same transaction. The words are made when they
-- are sent (79), for only then are the images and the refund in place.

-- Writes one delivery for each target that wants to know how these generations ended.
--
-- Should a generation end a second time, the new event takes the old one's place, sent or not.
create function private.record_events(p_job_ids uuid[], p_status text) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_event_type text := 'generation.' || p_status;
begin
  insert into private.deliveries as d (generation_id, event_type, lane, push_token, user_id)
  select g.id, v_event_type, w.id::text, null, null
  from private.webhook_endpoints as w cross join unnest(p_job_ids) as g (id)
  where w.disabled_at is null and v_event_type = any (w.events)
  union all
  select g.id, v_event_type, 'expo', t.token, g.user_id
  from public.generations as g
  cross join lateral (
    select p.token from private.push_tokens as p where p.user_id = g.user_id offset 0
  ) as t
  where
    g.id = any (p_job_ids)
    and exists (select from private.push_texts as x where x.event_type = v_event_type)
  on conflict (generation_id, lane, push_token) do update set
    id = excluded.id, event_type = excluded.event_type, state = 'pending', attempts = 0,
    run_at = now(), token = null, last_status = null, last_error = null, ticket = null,
    user_id = excluded.user_id, created_at = now(), finished_at = null;
end;
$$;

-- What a webhook endpoint is sent: the job as get_job_status shows it, and whose it is.
create function private.webhook_body(p_delivery private.deliveries) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object(
    'type', p_delivery.event_type,
    'timestamp', p_delivery.created_at,
    'data',
    to_jsonb(private.job_json(g))
    - '{stage,progress,queue_position,eta_seconds,poll_after_ms}'::text[]
    || jsonb_build_object('user_id', g.user_id)
  )
  from public.generations as g
  where g.id = p_delivery.generation_id
$$;

-- What Expo is sent: nothing of the prompt, for it is shown on locked screens. Null if nobody
-- should get it any more: the token is gone or somebody else's, it is late, or another push of the
-- same batch to the same device is to come, which is enough. The last of a batch has neither an
-- unfinished sibling nor a later push, so it is always sent.
--
-- A push whose answer was lost is sent again. collapseId and tag have the device show it once.
create function private.push_body(p_delivery private.deliveries) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_array(jsonb_build_object(
    'to', t.token, 'title', x.title, 'body', x.body,
    'collapseId', coalesce(g.batch_id, g.id), 'tag', coalesce(g.batch_id, g.id),
    'data', jsonb_build_object('job_id', g.id, 'status', g.status, 'batch_id', g.batch_id)
  ))
  from public.generations as g
  cross join private.settings as s
  inner join private.push_tokens as t on t.token = p_delivery.push_token and t.user_id = g.user_id
  inner join private.push_texts as x on x.event_type = p_delivery.event_type
  where
    g.id = p_delivery.generation_id
    and p_delivery.created_at > now() - s.push_expires
    and not exists (
      select from public.generations as o
      left join private.deliveries as d
        on d.generation_id = o.id and d.lane = 'expo' and d.push_token = p_delivery.push_token
      where o.batch_id = g.batch_id and (
        o.finished_at is null or (d.state = 'pending' and d.id > p_delivery.id)
      )
    )
$$;
