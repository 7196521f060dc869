-- Webhooks and push: who is told when a job ends. An optional part: nothing before it knows of it.
--
-- A delivery is one event for one target: a webhook endpoint of the operator's, or the push token
-- of a user's device. A trigger writes it in the transaction that ends the job, so it exists
-- exactly if the job ended; its words are made when it is sent, for only then are images and refund
-- in place. Its id is what the target sees, the same with every try. There is one delivery for each
-- generation and target, which is all that order within a generation needs.
--
-- Deliveries are kept apart by lane: an endpoint's id, or expo for all pushes. Workers ask which
-- lanes have something due, claim from one, send, and say what became of it; so a target that hangs
-- holds up nobody else. A claim moves run_at behind the lease and hands out a token. A worker that
-- dies has changed nothing else, so once the lease has run out another sends the delivery again:
-- at least once, and twice only if a worker died between sending and saying so.

alter table private.settings
add column delivery_retries interval[] not null
default '{5 seconds,1 minute,5 minutes,15 minutes,30 minutes,1 hour,3 hours,6 hours,12 hours}',
add column push_expires interval not null default '1 hour',
add column keep_deliveries interval not null default '7 days',
add column webhook_allows_private boolean not null default false,
add constraint settings_delivery_times_are_in_reach check (
  array_position(delivery_retries, null) is null and interval '0' <= all(delivery_retries)
  and least(push_expires, keep_deliveries) >= '0'
  and greatest(push_expires, keep_deliveries) <= '1000 years'
);

comment on column private.settings.delivery_retries is
  'How long to wait after each failed try of a webhook or push; after one more it is dead.';
comment on column private.settings.push_expires is
  'A push notification this late is not sent any more.';
comment on column private.settings.keep_deliveries is
  'How long deliveries are kept once delivered or dead.';
comment on column private.settings.webhook_allows_private is
  'For development only: webhooks may be http and on private addresses. The worker needs '
  'WEBHOOK_ALLOWED_HOSTS too.';

create table private.webhook_endpoints (
  id uuid primary key default private.uuid_v7(),
  url text not null,
  events text[] not null,
  description text not null default '',
  -- 32 bytes, as the Standard Webhooks specification writes them. Two random uuids hold 244 bits.
  secret text not null default 'whsec_' || encode(
    sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())), 'base64'
  ),
  previous_secret text,
  previous_secret_until timestamptz,
  created_at timestamptz not null default now(),
  disabled_at timestamptz,
  constraint webhook_endpoints_events_are_known check (
    cardinality(events) > 0
    and events <@ '{generation.completed,generation.failed,generation.canceled}'
  )
);

comment on table private.webhook_endpoints is
  'Addresses that are told when a job ends: see register_webhook.';
comment on column private.webhook_endpoints.secret is
  'Signs what is sent: whsec_ and base64. Shown once, when it is made.';
comment on column private.webhook_endpoints.previous_secret_until is
  'Until then previous_secret signs too (rotate_webhook_secret).';
comment on column private.webhook_endpoints.disabled_at is
  'When it answered 410 Gone: it is told nothing until enable_webhook.';

create table private.push_tokens (
  token text primary key,
  user_id uuid not null references public.entitlements (user_id) on delete cascade,
  registered_at timestamptz not null default clock_timestamp(),
  constraint push_tokens_token_is_expos check (
    token ~ '^Expo(nent)?PushToken\[[A-Za-z0-9_-]{1,100}\]$'
  )
);

comment on table private.push_tokens is
  'Devices that are told when a job of their user ends, by the token Expo gave them. A token is '
  'its last caller''s: who signs in on a borrowed phone leaves no news of his jobs to its owner.';

create index push_tokens_user_id_idx on private.push_tokens (user_id);

create table private.push_texts (
  event_type text primary key,
  title text not null,
  body text not null
);

comment on table private.push_texts is
  'What a push notification says. An event without a row here is not pushed.';

create table private.deliveries (
  id uuid primary key default private.uuid_v7(),
  generation_id uuid not null references public.generations (id) on delete cascade,
  event_type text not null,
  -- No foreign keys to the targets: they would lock an endpoint's row at the end of every job.
  lane text not null,
  push_token text,
  user_id uuid,
  state text not null default 'pending',
  attempts smallint not null default 0,
  run_at timestamptz not null default now(),
  token bigint,
  last_status smallint,
  last_error text,
  ticket text,
  created_at timestamptz not null default now(),
  finished_at timestamptz,
  unique nulls not distinct (generation_id, lane, push_token),
  constraint deliveries_state_is_known check (state in ('pending', 'delivered', 'dead')),
  constraint deliveries_finished_at_matches_state check (
    (finished_at is not null) = (state in ('delivered', 'dead'))
  ),
  constraint deliveries_push_token_matches_lane check (
    (push_token is not null) = (lane = 'expo') and (user_id is not null) = (lane = 'expo')
  ),
  constraint deliveries_attempts_are_not_negative check (attempts >= 0)
) with (autovacuum_vacuum_scale_factor = 0.02);

comment on table private.deliveries is
  'The outbox: one event for one target, sent until the target has taken it.';
comment on column private.deliveries.id is 'The webhook-id, after evt_: the same with every try.';
comment on column private.deliveries.lane is 'An endpoint''s id, or expo.';
comment on column private.deliveries.user_id is 'Whose push it is: users take turns.';
comment on column private.deliveries.state is
  'pending -> delivered (the target took it) | dead (retries used up, or the target is gone); dead '
  '-> pending (redeliver).';
comment on column private.deliveries.run_at is
  'Not before this time: backoff, the lease of the worker that sends it, or until a receipt.';
comment on column private.deliveries.token is 'Proof of that lease, from lease_tokens.';
comment on column private.deliveries.last_status is 'Of HTTP; null: no answer.';
comment on column private.deliveries.ticket is
  'Of a push that Expo took: what its receipt is asked for by, until it is read.';

-- Read by due_lanes and claim_deliveries; by redeliver_dead and health; by claim_receipts; by
-- trim_deliveries.
create index deliveries_pending_idx on private.deliveries (lane, run_at) where state = 'pending';
create index deliveries_dead_idx on private.deliveries (lane) where state = 'dead';
create index deliveries_ticket_idx on private.deliveries (run_at) where ticket is not null;
create index deliveries_finished_at_idx
on private.deliveries (finished_at) where finished_at is not null;

alter table private.webhook_endpoints enable row level security;
alter table private.push_tokens enable row level security;
alter table private.push_texts enable row level security;
alter table private.deliveries enable row level security;

-- The way in.

-- Writes one delivery for each target that wants to know how this generation ended. Should it end a
-- second time, the new event takes the old one's place, sent or not.
create function private.record_event() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_event_type text;
begin
  if not exists (select from private.webhook_endpoints)
    and not exists (select from private.push_tokens where user_id = new.user_id) then
    return null;
  end if;
  v_event_type := 'generation.' || new.status;
  insert into private.deliveries as d (generation_id, event_type, lane, push_token, user_id)
  select new.id, v_event_type, w.id::text, null, null
  from private.webhook_endpoints as w
  where w.disabled_at is null and v_event_type = any (w.events)
  union all
  select new.id, v_event_type, 'expo', t.token, new.user_id
  from private.push_tokens as t
  where t.user_id = new.user_id
    and exists (select from private.push_texts as x where x.event_type = v_event_type)
  on conflict (generation_id, lane, push_token) do update set
    id = excluded.id, event_type = excluded.event_type, state = 'pending', attempts = 0,
    run_at = now(), token = null, last_status = null, last_error = null, ticket = null,
    user_id = excluded.user_id, created_at = now(), finished_at = null;
  return null;
end;
$$;

create trigger generations_record_event after update of status on public.generations
for each row when (old.status is distinct from new.status and new.finished_at is not null)
execute function private.record_event();

-- When a user becomes part of another (42), whose the generations are then.
create function private.move_pushes() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  update private.push_tokens set user_id = new.into_id where user_id = new.user_id;
  update private.deliveries as d set user_id = new.into_id
  from public.generations as g
  where g.user_id = new.user_id and d.generation_id = g.id and d.user_id = new.user_id;
  return null;
end;
$$;

create trigger merged_users_move_pushes after insert on private.merged_users
for each row execute function private.move_pushes();

-- The way out: for workers.

-- From lane to lane through the index, however many deliveries wait in each.
create or replace function private.due_lanes() returns setof text
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  with recursive lanes as (
    (select d.lane from private.deliveries as d where d.state = 'pending' order by d.lane limit 1)
    union all
    select (
      select d.lane from private.deliveries as d
      where d.state = 'pending' and d.lane > l.lane order by d.lane limit 1
    )
    from lanes as l where l.lane is not null
  )
  select l.lane
  from lanes as l
  where l.lane is not null and (
    select d.run_at from private.deliveries as d
    where d.state = 'pending' and d.lane = l.lane order by d.run_at limit 1
  ) <= now()
$$;

-- What is sent. An endpoint is told the job as get_job_status shows it, and whose it is; Expo
-- nothing of the prompt, for it is shown on locked screens. Null if nobody should get a push any
-- more: the token is gone or somebody else's, it is late, or another push of the same batch to the
-- same device is to come, which is enough. The last of a batch has neither an unfinished sibling
-- nor a later push, so it is always sent.
--
-- A push whose answer was lost is sent again. collapseId and tag have the device show it once.
create function private.delivery_body(p_delivery private.deliveries) returns jsonb
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
  where g.id = p_delivery.generation_id and p_delivery.lane <> 'expo'
  union all
  select jsonb_build_array(jsonb_build_object(
    'to', t.token, 'title', x.title, 'body', x.body,
    'collapseId', coalesce(g.batch_id, g.id), 'tag', coalesce(g.batch_id, g.id),
    'data', jsonb_build_object('job_id', g.id, 'status', g.status, 'batch_id', g.batch_id)
  ))
  from public.generations as g
  cross join private.settings as s
  inner join private.push_tokens as t on t.token = p_delivery.push_token and t.user_id = g.user_id
  inner join private.push_texts as x on x.event_type = p_delivery.event_type
  where g.id = p_delivery.generation_id and p_delivery.created_at > now() - s.push_expires
    and not exists (
      select from public.batches as b
      cross join unnest(b.job_ids) as j (id)
      inner join public.generations as o on o.id = j.id
      left join private.deliveries as d
        on d.generation_id = o.id and d.lane = 'expo' and d.push_token = p_delivery.push_token
      where b.id = g.batch_id and (
        o.finished_at is null or (d.state = 'pending' and d.id > p_delivery.id)
      )
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
  if p_lane = 'expo' then
    -- Users take turns, and who has a push under way waits for its end: whatever tokens somebody
    -- invents, they hold up his own pushes only.
    v_pushes := array(
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
    );
  else
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
      body := private.delivery_body(v_delivery);
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
-- the target asks for it in a Retry-After. A push that would be late is not tried again.
create function private.finish_delivery(
  p_delivery_id uuid, p_token bigint, p_outcome text, p_status integer, p_error text,
  p_retry_after text default null, p_ticket text default null
) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_settings private.settings := (select s from private.settings as s);
  v_delivery private.deliveries;
  v_delay interval;
  v_state text;
begin
  select * into v_delivery from private.deliveries as d
  where d.id = p_delivery_id and d.token = p_token and d.state = 'pending' for update;
  if not found then
    return 'lost';
  end if;
  v_delay := private.asked_delay(
    v_settings.delivery_retries[v_delivery.attempts + 1] * (0.8 + 0.4 * random()),
    private.asked_seconds(p_retry_after), 86400
  );
  v_state := case
    when p_outcome = 'delivered' then 'delivered'
    when p_outcome = 'gone'
      or v_delivery.attempts >= cardinality(v_settings.delivery_retries)
      or v_delivery.lane = 'expo'
      and now() + v_delay >= v_delivery.created_at + v_settings.push_expires then 'dead'
    else 'pending'
  end;
  update private.deliveries set
    state = v_state, attempts = attempts + 1, token = null,
    last_status = p_status, last_error = left(p_error, 200),
    ticket = case when v_state = 'delivered' then p_ticket end,
    run_at = case v_state
      when 'pending' then now() + v_delay
      when 'delivered' then now() + interval '15 minutes'
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
create or replace function private.claim_receipts(p_at_most integer)
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

-- A step of retention (85): forgets deliveries that ended longer than keep_deliveries ago.
create function private.trim_deliveries(
  p_place text, p_at_most integer, out place text, out done integer
)
language sql set search_path = pg_catalog, pg_temp as $$
  select null, private.skip_failing(
    'delete from private.deliveries where id = any ($1) returning 0',
    array(
      select d.id from private.deliveries as d
      where d.finished_at < now() - (select s.keep_deliveries from private.settings as s)
      order by d.finished_at limit p_at_most
    )
  )
$$;

-- For apps: push tokens.

-- Locks: the entitlement row, so that concurrent calls cannot pass the cap.
create function private.register_push_token(p_token text) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_user_id(p_writes => true);
begin
  if p_token is null or p_token !~ '^Expo(nent)?PushToken\[[A-Za-z0-9_-]{1,100}\]$' then
    perform private.refuse_input(
      'token: not an Expo push token', 'Send what getExpoPushTokenAsync() answers.'
    );
  end if;
  perform from public.entitlements where user_id = v_user_id for update;
  if not found then
    perform private.refuse_unknown_user();
  end if;
  insert into private.push_tokens as t (token, user_id) values (p_token, v_user_id)
  on conflict (token) do update set user_id = excluded.user_id, registered_at = clock_timestamp();
  -- More devices than anybody has: those not heard of longest are forgotten.
  delete from private.push_tokens where token = any (array(
    select t.token from private.push_tokens as t
    where t.user_id = v_user_id order by t.registered_at desc offset 5 for update skip locked
  ));
  return json_build_object('registered', true);
end;
$$;

create function private.unregister_push_token(p_token text) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_known_user_id(p_writes => true);
begin
  delete from private.push_tokens where token = p_token and user_id = v_user_id;
  return json_build_object('registered', false);
end;
$$;

create function public.register_push_token(token text) returns json
language sql set search_path = pg_catalog, pg_temp
return private.register_push_token(token);

comment on function public.register_push_token is
  'Has this device told by an Expo push notification when your jobs end. Call it at each start of '
  'the app: a token is its last caller''s, and the 5 last registered of a user are kept. Answers '
  '{registered}. Errors: PT400 invalid_input, PT401 not_authenticated.';

create function public.unregister_push_token(token text) returns json
language sql set search_path = pg_catalog, pg_temp
return private.unregister_push_token(token);

comment on function public.unregister_push_token is
  'Takes a push token of yours back; call it before signing out. Repeating it changes nothing. '
  'Answers {registered}. Errors: PT401 not_authenticated.';

-- For the operator's backend. Nobody else may call these, so they need no door.

-- An address is called from inside the operator's network, so what could mean something in there is
-- refused: here by its name, and by the worker again by the addresses that the name has when it
-- connects. A name is full, and its last label begins with a letter: whatever else ends in a number
-- is an IP address to those who connect, in one of its many spellings (127.0.0.0x1).
create function public.register_webhook(
  url text, events text[] default null, description text default ''
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_variable
declare
  v_all text[] := '{generation.completed,generation.failed,generation.canceled}'::text[];
  v_events text[] := coalesce(events, v_all);
  -- Scheme, host, port, and the rest: no user, no password, no fragment.
  v_parts text[] := regexp_match(
    url, '^(https?)://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?(?:[/?][!"$-\[\]-~]*)?$', 'i'
  );
  v_problem text;
  v_endpoint private.webhook_endpoints;
begin
  perform private.require_writable();
  if v_parts is null or length(url) > 2000 or v_parts[3]::integer not between 1 and 65535 then
    perform private.refuse_input(
      'url: not an address', 'Send one such as https://api.example.com/hooks/darkroom.'
    );
  elsif not (select s.webhook_allows_private from private.settings as s) then
    v_problem := case
      when lower(v_parts[1]) <> 'https' then 'not https'
      when v_parts[3]::integer < 1024 and v_parts[3]::integer <> 443
        then 'neither port 443 nor one from 1024 on'
      when length(v_parts[2]) > 253 or lower(v_parts[2])
        !~ '^([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)+[a-z][a-z0-9-]{0,61}[a-z0-9]$'
        then 'not a full host name'
      when lower(v_parts[2])
        ~ '\.(localhost|localdomain|local|internal|intranet|lan|home|corp|arpa|test|onion)$'
        then 'a name of a private network'
    end;
  end if;
  if v_problem is not null then
    perform private.refuse_input(
      'url: ' || v_problem, 'For development see private.settings.webhook_allows_private.'
    );
  elsif cardinality(v_events) not between 1 and 3 or not v_events <@ v_all then
    perform private.refuse_input('events: not some of ' || array_to_string(v_all, ', '));
  elsif length(description) > 200 or description <> '' and private.is_blank(description) then
    perform private.refuse_input('description: blank, or longer than 200 characters');
  elsif (select count(*) from private.webhook_endpoints) >= 20 then
    perform private.refuse_input('url: there are 20 webhooks', 'Delete one first.');
  end if;
  insert into private.webhook_endpoints (url, events, description)
  values (url, v_events, coalesce(description, ''))
  returning * into v_endpoint;
  return json_build_object('webhook_id', v_endpoint.id, 'secret', v_endpoint.secret);
end;
$$;

comment on function public.register_webhook is
  'Has an address told when jobs end, signed as the Standard Webhooks specification says. events: '
  'generation.completed | failed | canceled; all if left out. Answers {webhook_id, secret}; the '
  'secret is shown this once. Errors: PT400 invalid_input.';

-- An endpoint as the API shows it: never with its secret.
--
-- Raises PT404 not_found: the update or delete that is to show it met none.
create function private.webhook_json(p_endpoint private.webhook_endpoints) returns json
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  if p_endpoint.id is null then
    perform private.refuse_missing('webhook_id: no such webhook', 'list_webhooks() shows them.');
  end if;
  return json_build_object(
    'webhook_id', p_endpoint.id, 'url', p_endpoint.url, 'events', p_endpoint.events,
    'description', p_endpoint.description, 'created_at', p_endpoint.created_at,
    'disabled_at', p_endpoint.disabled_at
  );
end;
$$;

create function public.list_webhooks() returns json
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select coalesce(json_agg(private.webhook_json(w) order by w.id), '[]')
  from private.webhook_endpoints as w
$$;

comment on function public.list_webhooks is
  'The webhooks: [{webhook_id, url, events, description, created_at, disabled_at (when it answered '
  '410 Gone, else null)}].';

-- Deliveries first, as when one ends with 410. What a job that is just ending adds is buried when
-- it is due.
create function public.delete_webhook(webhook_id uuid) returns json
language sql security definer set search_path = pg_catalog, pg_temp as $$
  select private.require_writable();
  delete from private.deliveries where lane = webhook_id::text and state = 'pending';
  with deleted as (delete from private.webhook_endpoints as w where w.id = webhook_id returning w)
  select private.webhook_json((select d.w from deleted as d));
$$;

comment on function public.delete_webhook is
  'Deletes a webhook and what it was still to be told. Answers it. Errors: PT404 not_found.';

create function public.enable_webhook(webhook_id uuid) returns json
language sql security definer set search_path = pg_catalog, pg_temp as $$
  select private.require_writable();
  with enabled as (
    update private.webhook_endpoints as w set disabled_at = null where w.id = webhook_id returning w
  )
  select private.webhook_json((select e.w from enabled as e));
$$;

comment on function public.enable_webhook is
  'Has a webhook told again that was disabled by a 410 Gone. Answers it. Errors: PT404 not_found.';

create function public.rotate_webhook_secret(webhook_id uuid) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_endpoint private.webhook_endpoints;
begin
  perform private.require_writable();
  update private.webhook_endpoints set
    secret = default, previous_secret = secret, previous_secret_until = now() + interval '1 day'
  where id = webhook_id returning * into v_endpoint;
  perform private.webhook_json(v_endpoint);
  return json_build_object(
    'webhook_id', v_endpoint.id, 'secret', v_endpoint.secret,
    'previous_secret_until', v_endpoint.previous_secret_until
  );
end;
$$;

comment on function public.rotate_webhook_secret is
  'Gives a webhook a new secret; for a day the old one signs too. Answers {webhook_id, secret, '
  'previous_secret_until}. Errors: PT404 not_found.';

-- One delivery as operators see it. A push token is as good as a password, so it is not shown.
--
-- Raises PT404 not_found: the update that is to show it met none.
create function private.delivery_json(p_delivery private.deliveries) returns json
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  if p_delivery.id is null then
    perform private.refuse_missing(
      'delivery_id: no such delivery', 'list_deliveries() shows them.'
    );
  end if;
  return json_build_object(
    'delivery_id', p_delivery.id, 'lane', p_delivery.lane, 'event', p_delivery.event_type,
    'job_id', p_delivery.generation_id, 'state', p_delivery.state,
    'attempts', p_delivery.attempts,
    'run_at', case when p_delivery.state = 'pending' then p_delivery.run_at end,
    'last_status', p_delivery.last_status, 'last_error', p_delivery.last_error,
    'created_at', p_delivery.created_at, 'finished_at', p_delivery.finished_at
  );
end;
$$;

-- Planned for the state: dead ones have an index of their own.
create function public.list_deliveries(
  state text default null, at_most integer default 100
) returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_custom_plan as $$
#variable_conflict use_variable
begin
  if state not in ('pending', 'delivered', 'dead') then
    perform private.refuse_input('state: not one of pending, delivered, dead');
  elsif at_most is null or at_most not between 1 and 1000 then
    perform private.refuse_input('at_most: not between 1 and 1000');
  end if;
  return (
    select coalesce(json_agg(private.delivery_json(last) order by last.id desc), '[]')
    from (
      select * from private.deliveries as d
      where state is null or d.state = state
      order by d.id desc limit at_most
    ) as last
  );
end;
$$;

comment on function public.list_deliveries is
  'The outbox, newest first; state: pending | delivered | dead, all if left out. Answers '
  '[{delivery_id, lane (webhook_id, or expo), event, job_id, state, attempts, run_at (of the next '
  'try), last_status, last_error, created_at, finished_at}]. Errors: PT400 invalid_input.';

create function private.revive_deliveries(p_ids uuid[]) returns setof private.deliveries
language sql set search_path = pg_catalog, pg_temp as $$
  update private.deliveries set
    state = 'pending', attempts = 0, run_at = now(), token = null, finished_at = null, ticket = null
  where id = any (p_ids) returning *
$$;

create function public.redeliver(delivery_id uuid) returns json
language sql security definer set search_path = pg_catalog, pg_temp as $$
  select private.require_writable();
  select private.delivery_json((select d from private.revive_deliveries(array[delivery_id]) as d));
$$;

comment on function public.redeliver is
  'Sends a delivery again, dead or delivered, under the same id and with all its retries. Answers '
  'it. Errors: PT404 not_found.';

create function public.redeliver_dead(webhook_id uuid) returns json
language sql security definer set search_path = pg_catalog, pg_temp as $$
  select private.require_writable();
  select json_build_object('redelivered', count(*)) from private.revive_deliveries(array(
    select d.id from private.deliveries as d
    where d.state = 'dead' and d.lane = webhook_id::text
    order by d.id limit 10000 for update skip locked
  ));
$$;

comment on function public.redeliver_dead is
  'Sends everything again that a webhook did not take, at most 10,000 in one call, the oldest '
  'first. Answers {redelivered}: call again while it is not 0.';

-- For who looks on.

-- Dead deliveries count while their webhook is there: deleting it says that nobody misses them. A
-- push that found no device any more is nothing to mend.
create or replace function private.outbox_health() returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object(
    'pending', count(*),
    'oldest_pending_seconds', extract(epoch from now() - min(d.created_at)),
    'dead', (
      select count(*)
      from private.webhook_endpoints as e
      inner join private.deliveries as dead on dead.lane = e.id::text and dead.state = 'dead'
    )
  )
  from private.deliveries as d
  where d.state = 'pending'
$$;

insert into private.push_texts (event_type, title, body) values
('generation.completed', 'Your picture is ready', 'Tap to see it.'),
('generation.failed', 'Your picture could not be made', 'Your credits are back.');

insert into private.retention_walks (name) values ('trim_deliveries');

insert into private.exported_tables (name, owner, left_out) values
('private.push_tokens', 'user_id', '{}'),
('private.deliveries', 'generation_id', '{token,attempts,run_at,last_status,last_error,ticket}');

insert into private.alert_rules (alert, threshold, unit, min_cases, severity, hint) values (
  'dead_deliveries', 0, 'deliveries', 0, 'warning',
  'list_deliveries(''dead'') says why. Then enable_webhook and redeliver_dead, or delete_webhook.'
);

-- Who may call what: as in 92, what is not named here nobody may call.

revoke all on table private.webhook_endpoints, private.push_tokens, private.push_texts,
private.deliveries
from public, anon, authenticated, service_role;
revoke all on function
private.claim_deliveries, private.delivery_body, private.delivery_json, private.finish_delivery,
private.finish_receipts, private.move_pushes, private.record_event, private.register_push_token,
private.revive_deliveries, private.trim_deliveries, private.unregister_push_token,
private.webhook_json,
public.delete_webhook, public.enable_webhook, public.list_deliveries, public.list_webhooks,
public.redeliver, public.redeliver_dead, public.register_push_token, public.register_webhook,
public.rotate_webhook_secret, public.unregister_push_token
from public, anon, authenticated, service_role;

grant execute on function
private.register_push_token, private.unregister_push_token,
public.register_push_token, public.unregister_push_token
to anon, authenticated;
grant execute on function
public.delete_webhook, public.enable_webhook, public.list_deliveries, public.list_webhooks,
public.redeliver, public.redeliver_dead, public.register_webhook, public.rotate_webhook_secret
to service_role;
grant execute on function
private.claim_deliveries, private.finish_delivery, private.finish_receipts
to darkroom_worker;

notify pgrst, 'reload schema';
