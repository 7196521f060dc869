-- The tables of the outbox: who is told when a job ends, and what is still to be told.
--
-- A delivery is one event for one target: a webhook endpoint of the operator's, or the push token
-- of a user's device. It is written in the transaction that ends the job (66), so it exists exactly
-- if the job ended; workers send it (79) until the target has taken it. Its id is what the target
-- sees, the same with every try. There is one delivery for each generation and target, which is all
-- that order within a generation needs.
--
-- Deliveries are kept apart by lane: an endpoint's id, or expo for all pushes. Workers serve each
-- lane for itself, so a target that hangs holds up nobody else.

-- 32 bytes as the Standard Webhooks specification writes them. Two random uuids hold 244 bits.
create function private.new_webhook_secret() returns text
language sql set search_path = pg_catalog, pg_temp as $$
  select 'whsec_' || encode(
    sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())), 'base64'
  )
$$;

create table private.webhook_endpoints (
  id uuid primary key default private.uuid_v7(),
  url text not null,
  events text[] not null,
  description text not null default '',
  secret text not null default private.new_webhook_secret(),
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
  'Devices that are told when a job of their user ends, by the token Expo gave them.';
comment on column private.push_tokens.registered_at is 'When the app last registered it.';

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
comment on column private.deliveries.attempts is 'Tries that the target answered or did not.';
comment on column private.deliveries.run_at is
  'Not before this time: backoff, the lease of the worker that sends it, or until a receipt.';
comment on column private.deliveries.token is 'Proof of that lease, from lease_tokens.';
comment on column private.deliveries.last_status is
  'HTTP status of the last try; null: no answer.';
comment on column private.deliveries.ticket is
  'Of a push that Expo took: what its receipt is asked for by, until it is read.';

-- Read by due_lanes and claim_deliveries.
create index deliveries_pending_idx on private.deliveries (lane, run_at) where state = 'pending';
-- Read by redeliver_dead and by health.
create index deliveries_dead_idx on private.deliveries (lane) where state = 'dead';
-- Read by claim_receipts.
create index deliveries_ticket_idx on private.deliveries (run_at) where ticket is not null;
-- Read by trim_deliveries.
create index deliveries_finished_at_idx
on private.deliveries (finished_at) where finished_at is not null;
