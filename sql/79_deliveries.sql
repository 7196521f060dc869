-- The outbox's way out: workers ask which lanes have something due, claim from one, send, and say
-- what became of it.
--
-- A claim moves run_at behind the lease and hands out a token. A worker that dies has changed
-- nothing else, so once the lease has run out another sends the delivery again, under the same id:
-- at least once, and twice only if a worker died between sending and saying so.

create function private.due_lanes() returns setof text
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  -- From lane to lane through the index, however many deliveries wait in each.
  with recursive lanes as (
    (
      select d.lane from private.deliveries as d
      where d.state = 'pending' order by d.lane limit 1
    )
    union all
    select (
      select d.lane from private.deliveries as d
      where d.state = 'pending' and d.lane > l.lane order by d.lane limit 1
    )
    from lanes as l
    where l.lane is not null
  )
  select l.lane
  from lanes as l
  where l.lane is not null and (
    select d.run_at from private.deliveries as d
    where d.state = 'pending' and d.lane = l.lane order by d.run_at limit 1
  ) <= now()
$$;

comment on function private.due_lanes is
  'Lanes of the outbox that have something to send now.';

-- The pushes to send next. Users take turns, and who has one under way waits for its end: whatever
-- tokens somebody invents, they hold up his own pushes only.
create function private.choose_pushes(p_at_most integer) returns uuid[]
language sql stable set search_path = pg_catalog, pg_temp as $$
  select array(
    select t.id
    from (
      select d.id, d.run_at, row_number() over (partition by d.user_id order by d.run_at) as turn
      from private.deliveries as d
      where d.state = 'pending' and d.lane = 'expo' and d.run_at <= now() and not exists (
        select from private.deliveries as u
        where u.state = 'pending' and u.lane = 'expo' and u.run_at > now()
          and u.token is not null and u.user_id = d.user_id
      )
    ) as t
    order by t.turn, t.run_at limit p_at_most
  )
$$;

create function private.claim_deliveries(p_lane text, p_at_most integer)
returns table (delivery_id uuid, token bigint, url text, secrets text[], body text)
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_endpoint private.webhook_endpoints;
  v_delivery private.deliveries;
  v_pushes uuid[];
begin
  if p_lane <> 'expo' then
    select * into v_endpoint from private.webhook_endpoints as w
    where w.id = p_lane::uuid and w.disabled_at is null;
    if not found then
      update private.deliveries as d
      set state = 'dead', finished_at = now(), last_error = 'the endpoint is gone or disabled'
      where d.id = any (array(
        select d.id from private.deliveries as d where d.state = 'pending' and d.lane = p_lane
        order by d.run_at limit 1000 for update skip locked
      ));
      return;
    end if;
    url := v_endpoint.url;
    secrets := array_remove(array[v_endpoint.secret, case
      when v_endpoint.previous_secret_until > now() then v_endpoint.previous_secret
    end], null);
  end if;
  if p_lane = 'expo' then
    v_pushes := private.choose_pushes(p_at_most);
  end if;
  for v_delivery in
    update private.deliveries as d set
      token = nextval('private.lease_tokens'),
      run_at = now() + (select s.lease from private.settings as s)
    where d.id = any (array(
      select d.id from private.deliveries as d
      where d.state = 'pending' and d.lane = p_lane and d.run_at <= now()
        and (v_pushes is null or d.id = any (v_pushes))
      order by d.run_at limit p_at_most for update skip locked
    ))
    returning d.*
  loop
    delivery_id := v_delivery.id;
    token := v_delivery.token;
    begin
      body := case p_lane
        when 'expo' then private.push_body(v_delivery)
        else private.webhook_body(v_delivery)
      end;
    exception when others then
      perform private.note_skipped('claim_deliveries', v_delivery.id::text, sqlstate, sqlerrm);
      update private.deliveries as d
      set state = 'dead', finished_at = now(), last_error = left(sqlerrm, 200)
      where d.id = v_delivery.id;
      continue;
    end;
    if body is null then
      delete from private.deliveries as d where d.id = v_delivery.id;
    end if;
    return next;
  end loop;
end;
$$;

comment on function private.claim_deliveries is
  'Leases up to p_at_most due deliveries of a lane and answers what to send: url and secrets are '
  'null for expo; body is null for a push that nobody should get any more, which is then gone.';

-- A failed try waits as settings.delivery_retries says, up to a fifth more or less, or longer if
-- the target asks for it. A push that would be late is not tried again.
create function private.finish_delivery(
  p_delivery_id uuid, p_token bigint, p_outcome text, p_status integer, p_error text,
  p_retry_after_seconds double precision default null, p_ticket text default null
) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_settings private.settings;
  v_delivery private.deliveries;
  v_delay interval;
  v_state text;
begin
  select * into strict v_settings from private.settings;
  select * into v_delivery from private.deliveries as d
  where d.id = p_delivery_id and d.token = p_token and d.state = 'pending' for update;
  if not found then
    return 'lost';
  end if;
  v_delay := private.asked_delay(
    v_settings.delivery_retries[v_delivery.attempts + 1] * (0.8 + 0.4 * random()),
    p_retry_after_seconds, 86400
  );
  v_state := case
    when p_outcome = 'delivered' then 'delivered'
    when
      p_outcome = 'gone'
      or v_delivery.attempts >= cardinality(v_settings.delivery_retries)
      or (
        v_delivery.lane = 'expo'
        and now() + v_delay >= v_delivery.created_at + v_settings.push_expires
      ) then 'dead'
    else 'pending'
  end;
  update private.deliveries set
    state = v_state, attempts = attempts + 1, token = null,
    last_status = p_status, last_error = left(p_error, 200),
    ticket = case when v_state = 'delivered' then p_ticket end,
    run_at = case
      when v_state = 'pending' then now() + v_delay
      when v_state = 'delivered' then now() + interval '15 minutes'
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

-- Expo keeps a receipt for a day; what has none by then is not asked for any more.
create function private.claim_receipts(p_at_most integer)
returns table (delivery_id uuid, ticket text)
language sql security definer set search_path = pg_catalog, pg_temp as $$
  with claimed as (
    update private.deliveries as d set
      run_at = now() + interval '15 minutes',
      ticket = case when d.finished_at > now() - interval '1 day' then d.ticket end
    where d.id = any (array(
      select o.id from private.deliveries as o
      where o.ticket is not null and o.run_at <= now()
      order by o.run_at limit p_at_most for update skip locked
    ))
    returning d.id, d.ticket
  )
  select c.id, c.ticket from claimed as c where c.ticket is not null
$$;

comment on function private.claim_receipts is
  'Tickets of pushes that Expo took a quarter of an hour ago or more, and whose receipt was not '
  'read yet; a quarter of an hour later they are answered again.';

create function private.finish_receipts(p_delivery_ids uuid[], p_errors text[]) returns void
language sql security definer set search_path = pg_catalog, pg_temp as $$
  with told as (
    update private.deliveries as d
    set ticket = null, last_error = left(r.error, 200)
    from unnest(p_delivery_ids, p_errors) as r (id, error)
    where d.id = r.id and d.ticket is not null
    returning d.push_token, d.finished_at, r.error
  )
  delete from private.push_tokens as t using told
  where told.error = 'DeviceNotRegistered' and t.token = told.push_token
    and t.registered_at < told.finished_at
$$;

comment on function private.finish_receipts is
  'What the receipts of these pushes say: null, or an error. With DeviceNotRegistered the token is '
  'forgotten, unless it was registered anew since.';

-- Forgets deliveries that ended longer than settings.keep_deliveries ago.
create function private.trim_deliveries(p_at_most integer default 100000) returns integer
language sql set search_path = pg_catalog, pg_temp as $$
  select private.skip_failing(
    'delete from private.deliveries where id = any ($1) returning 0',
    array(
      select d.id from private.deliveries as d
      where d.finished_at < now() - (select s.keep_deliveries from private.settings as s)
      order by d.finished_at limit p_at_most
    )
  )
$$;

-- One delivery as operators see it. A push token is as good as a password, so it is not shown.
create function private.delivery_json(p_delivery private.deliveries) returns json
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select json_build_object(
    'delivery_id', p_delivery.id,
    'lane', p_delivery.lane,
    'event', p_delivery.event_type,
    'job_id', p_delivery.generation_id,
    'state', p_delivery.state,
    'attempts', p_delivery.attempts,
    'run_at', case when p_delivery.state = 'pending' then p_delivery.run_at end,
    'last_status', p_delivery.last_status,
    'last_error', p_delivery.last_error,
    'created_at', p_delivery.created_at,
    'finished_at', p_delivery.finished_at
  )
$$;

-- Planned for the state: dead ones have an index of their own.
--
-- Raises: PT400 invalid_input.
create function private.list_deliveries(p_state text, p_at_most integer) returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_custom_plan as $$
begin
  if p_state not in ('pending', 'delivered', 'dead') then
    perform private.refuse_input('state: not one of pending, delivered, dead');
  elsif p_at_most is null or p_at_most not between 1 and 1000 then
    perform private.refuse_input('at_most: not between 1 and 1000');
  end if;
  return (
    select coalesce(json_agg(private.delivery_json(last) order by last.id desc), '[]')
    from (
      select * from private.deliveries
      where p_state is null or state = p_state
      order by id desc limit p_at_most
    ) as last
  );
end;
$$;

-- Raises: PT404 not_found.
create function private.redeliver(p_delivery_id uuid) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_delivery private.deliveries;
begin
  perform private.require_writable();
  update private.deliveries set
    state = 'pending', attempts = 0, run_at = now(), token = null, finished_at = null,
    ticket = null
  where id = p_delivery_id
  returning * into v_delivery;
  if not found then
    perform private.refuse_missing(
      'delivery_id: no such delivery',
      'list_deliveries() shows them.'
    );
  end if;
  return private.delivery_json(v_delivery);
end;
$$;

create function private.redeliver_dead(p_webhook_id uuid) returns json
language sql security definer set search_path = pg_catalog, pg_temp as $$
  select private.require_writable();
  with revived as (
    update private.deliveries
    set state = 'pending', attempts = 0, run_at = now(), finished_at = null
    where id = any (array(
      select d.id from private.deliveries as d
      where d.state = 'dead' and d.lane = p_webhook_id::text
      order by d.id limit 10000 for update skip locked
    ))
    returning id
  )
  select json_build_object('redelivered', count(*)) from revived
$$;
