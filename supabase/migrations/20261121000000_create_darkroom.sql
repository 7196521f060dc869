-- Built from sql/ by `make migration`: edit there, not here.
-- Darkroom: the backend of an app whose users generate images, living in PostgreSQL.
--
-- Read these files in order. A user asks for a picture with enqueue_generation (50), which gates
-- (30, 32), charges and queues (50) in one transaction. A worker claims the job (72), makes
-- the picture and completes or fails it (75). What a dead worker left is picked up by
-- recover_stale_jobs (80). The user reads the state with get_job_status (60).
--
-- Schema `public` is what PostgREST exposes: tables with row level security, thin security invoker
-- wrappers for users, and definers that only operators may call. Schema `private` holds the queue
-- and the security definer bodies. NEVER add `private` to the exposed schemas.
--
-- Every function has `search_path = pg_catalog, pg_temp`. With an empty path types are looked for
-- among the caller's temporary objects first, and a `uuid` of theirs would run in a definer.
--
-- Errors for clients. The stable token is the `message`; `detail` is for people, `hint` says what
-- to do. Those marked * carry a Retry-After header through PostgREST's PGRST form, and as hint
-- always `Try again in N seconds.`, for clients that see no headers.
--   PT400 invalid_input           an argument is missing, too long or not allowed
--   PT401 not_authenticated       no token, no user in it, or the user is gone
--   PT402 insufficient_credits    the price is more than the balance
--   PT403 requires_paid_plan      the model is for paid users
--   PT404 not_found               no such job or model, or not yours, or deleted
--   PT405 method_not_allowed      what changes something is called by POST
--   PT409 idempotency_conflict    the key was used before with another payload
--   PT409 not_finished            the job is queued or running: wait for it or cancel it
--   PT409 already_finished        the job has ended: there is nothing to cancel or to retry
--   PT429 too_many_active *       as many jobs are queued or running as the plan allows
--   PT429 rate_limited *          as many requests in this minute as the plan allows
--   PT503 busy *                  jobs wait longer than the plan's busy_after
--   PT503 model_paused *          the model or its provider is paused
--   PT503 unavailable *           the database is read only: a full disk, a standby
-- Errors for the worker.
--   DR001 lease_lost              the token no longer holds the job: drop everything
--   DR002 canceled                the user canceled: stop and clean up
-- SQLSTATE 40001 is never raised: PostgREST before 16 retries it for ever.

do $$
begin
  -- Other people's tables (auth.users, storage.objects, realtime.messages) get triggers and
  -- policies. If the installation queued behind a long transaction, sign-ups would queue behind it.
  perform set_config('lock_timeout', '5s', true);
  if to_regclass('auth.users') is null or to_regprocedure('auth.uid()') is null then
    raise exception 'Darkroom needs Supabase Auth: auth.users and auth.uid() are missing'
      using errcode = 'undefined_object',
        hint = 'Install on a Supabase database, or start Supabase Lite on this one first.';
  end if;
  if to_regclass('private.ready_jobs') is not null then
    raise exception 'Darkroom is installed here already'
      using errcode = 'duplicate_schema', hint = 'Nothing was changed.';
  end if;
  if to_regnamespace('private') is not null then
    raise exception 'Darkroom needs the schema private for itself, and there is one'
      using errcode = 'duplicate_schema', hint = 'Rename yours. Nothing was changed.';
  end if;
  if to_regclass('storage.objects') is not null then
    -- What it does not know there, it takes for left over and deletes after a day.
    if exists (select from storage.objects where bucket_id in ('generations', 'inputs')) then
      raise exception 'Darkroom needs the buckets generations and inputs for itself'
        using errcode = 'object_not_in_prerequisite_state',
          hint = 'Move what is in them to another bucket. Nothing was changed.';
    end if;
  end if;
  -- A filter with a costly pattern on a prompt of one's own would take for ever, also when nobody
  -- waits for it any more. PostgREST applies what its roles have.
  if to_regrole('anon') is null then
    create role anon nologin noinherit;
    alter role anon set statement_timeout = '3s';
  end if;
  if to_regrole('authenticated') is null then
    create role authenticated nologin noinherit;
    alter role authenticated set statement_timeout = '8s';
  end if;
  if to_regrole('service_role') is null then
    create role service_role nologin noinherit bypassrls;
  end if;
  if to_regrole('darkroom_worker') is null then
    -- No password: it cannot log in until the DBA gives it one.
    create role darkroom_worker login noinherit;
  end if;
  if to_regrole('darkroom_monitor') is null then
    create role darkroom_monitor login noinherit;
  end if;
  if to_regrole('authenticator') is not null then
    -- So that PostgREST may take it on for a token that names it.
    grant darkroom_monitor to authenticator;
  end if;
end;
$$;

-- A worker's call takes milliseconds; one that hangs must not hold locks for ever.
alter role darkroom_worker set statement_timeout = '30s';
alter role darkroom_worker set idle_in_transaction_session_timeout = '15s';
-- Who looks on must never be in the way.
alter role darkroom_monitor set statement_timeout = '10s';
alter role darkroom_monitor set idle_in_transaction_session_timeout = '15s';
alter role darkroom_monitor set default_transaction_read_only = on;

create schema private;

comment on schema private is
  'Darkroom''s queue and function bodies. Never expose it through PostgREST.';

revoke all on schema private from public;
grant usage on schema private
to anon, authenticated, service_role, darkroom_worker, darkroom_monitor;
-- The tables of schema public: what users own and may read.
--
-- An entitlement says what a user may do; the credit ledger says how the balance came to be; a
-- generation is one request of a user and its permanent record; an image is one stored output. The
-- catalogue of models is in 11. The queue is elsewhere (12): a generation is written when it is
-- enqueued and when its state changes, never by heartbeats or progress.
--
-- Always true: entitlements.credits is the sum of the user's ledger amounts and never negative.

-- Time-ordered ids: 48 bits of milliseconds, 12 bits of the fraction, 62 random bits (RFC 9562).
create function private.uuid_v7() returns uuid
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_us bigint := date_part('epoch', clock_timestamp()) * 1000000;
begin
  return encode(
    int8send(v_us / 1000 * 65536 + 28672 + v_us % 1000 * 4096 / 1000)
    || substring(uuid_send(gen_random_uuid()) from 9),
    'hex'
  )::uuid;
end;
$$;

-- No foreign keys between tables that users may read, here and in 95: PostgREST lets who reads one
-- embed the other, and that one in it again, so that a short address makes an answer without end.
-- What goes with a row, its triggers delete (84).

-- Domains, where a table is written in every request: PostgreSQL reads a check of a table anew in
-- each statement, which for a list of words takes longer than to write the row.
create domain public.job_status as text constraint job_status_is_known check (
  value in ('queued', 'processing', 'completed', 'failed', 'canceled')
);

create domain public.ledger_kind as text constraint ledger_kind_is_known check (
  value in ('grant', 'charge', 'refund', 'adjust', 'carry')
);

create domain public.credits as integer constraint credits_are_not_negative check (value >= 0);
create domain public.image_count as smallint
constraint image_count_is_positive check (value > 0);
create domain public.params as jsonb
constraint params_are_an_object check (jsonb_typeof(value) = 'object');

-- A function, for the same reason, where a rule holds several columns together.
create function private.fits_kind(
  p_kind text, p_amount integer, p_generation_id uuid
) returns boolean
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  return (p_generation_id is not null) = (p_kind in ('charge', 'refund'))
    and case p_kind
      when 'charge' then p_amount <= 0
      when 'adjust' then p_amount <> 0
      else p_amount >= 0
    end;
end;
$$;

create function private.fits_status(
  p_status text, p_error_code text, p_finished_at timestamptz, p_deleted_at timestamptz
) returns boolean
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  return (p_finished_at is null) = (p_status in ('queued', 'processing'))
    and (p_error_code is not null) = (p_status = 'failed')
    -- A deleted one is hidden: no job may run unseen, nor be counted as active.
    and (p_deleted_at is null or p_finished_at is not null);
end;
$$;

-- A trigger (84) cascades from auth.users, not a foreign key: whoever moves a balance twice in one
-- transaction would have its check lock the user, whom a deletion holds while it waits for jobs.
create table public.entitlements (
  user_id uuid primary key,
  paid_until timestamptz,
  credits public.credits not null default 0,
  last_fair_key bigint not null default 0,
  minute_started_at timestamptz not null default '-infinity',
  minute_jobs integer not null default 0,
  day_started_at timestamptz not null default '-infinity',
  day_jobs integer not null default 0,
  day_burned integer not null default 0,
  created_at timestamptz not null default now()
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);

comment on table public.entitlements is
  'A user''s plan and balance: the row every money step locks.';
comment on column public.entitlements.paid_until is
  'End of the paid plan; infinity for one without end, null for none.';
comment on column public.entitlements.credits is
  'Balance in credits: the sum of the user''s ledger amounts.';
comment on column public.entitlements.last_fair_key is
  'Virtual finish time of the user''s last job; see ready_jobs.fair_key.';
comment on column public.entitlements.minute_jobs is
  'Jobs enqueued since minute_started_at, also those canceled since.';
comment on column public.entitlements.day_burned is
  'Jobs canceled since day_started_at that the provider may bill us.';

-- No foreign keys: the books may outlive the user and do outlive the generation they speak of.
create table public.credit_ledger (
  id bigint generated always as identity,
  user_id uuid,
  generation_id uuid,
  kind public.ledger_kind not null,
  amount integer not null,
  balance_after public.credits not null,
  external_id text,
  created_at timestamptz not null default now(),
  primary key (user_id, id),
  constraint credit_ledger_amount_and_generation_match_kind check (
    private.fits_kind(kind, amount, generation_id)
  )
);

comment on table public.credit_ledger is
  'Append-only entries that explain every balance. No row is ever updated, and none of a user who '
  'is here is deleted.';
comment on column public.credit_ledger.kind is
  'grant, charge (of a generation), refund (of one), adjust, or carry: the sum of older entries, '
  'as the first edition made it.';
comment on column public.credit_ledger.amount is
  'Credits: negative for a charge, positive for a grant or refund.';
comment on column public.credit_ledger.external_id is
  'The caller''s id of a grant (a payment''s, say): the same id is applied once.';

-- A generation is given back at most once. Its charge needs no index: enqueue writes it together
-- with the generation's new id.
create unique index credit_ledger_refund_once_idx
on public.credit_ledger (generation_id) where kind = 'refund';
create unique index credit_ledger_external_id_idx
on public.credit_ledger (external_id) where external_id is not null;

create function private.refuse_change() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  raise exception '% is append-only', tg_table_name
    using errcode = 'insufficient_privilege';
end;
$$;

create trigger credit_ledger_is_append_only
before update or truncate on public.credit_ledger
for each statement execute function private.refuse_change();

-- The books of a user are erased only when the user is gone.
create function private.refuse_change_while_user_exists() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  if exists (select from public.entitlements as e where e.user_id = old.user_id) then
    raise exception '% is append-only', tg_table_name
      using errcode = 'insufficient_privilege';
  end if;
  return old;
end;
$$;

create trigger credit_ledger_is_kept_while_user_exists
before delete on public.credit_ledger
for each row execute function private.refuse_change_while_user_exists();

create table public.batches (
  id uuid primary key default private.uuid_v7(),
  user_id uuid not null,
  request_hash text not null,
  job_ids uuid[] not null default '{}',
  idempotency_key text,
  created_at timestamptz not null default now()
);

comment on table public.batches is 'Generations that were asked for together.';
comment on column public.batches.job_ids is 'In the order of the prompts; also those erased since.';
comment on column public.batches.request_hash is
  'Hash of model, prompts and params: what a repeated idempotency_key must match.';

create index batches_user_id_idx on public.batches (user_id);
create unique index batches_idempotency_key_idx
on public.batches (user_id, idempotency_key) where idempotency_key is not null;

create table public.generations (
  id uuid primary key default private.uuid_v7(),
  -- No foreign keys: they would look up and lock a row each in every enqueue, which has locked the
  -- entitlement already. A trigger (84) deletes with the user; models are deactivated.
  user_id uuid not null,
  model_id text not null,
  alias_id text,
  batch_id uuid,
  retry_of uuid,
  prompt text not null,
  input public.params not null,
  provider_input jsonb not null,
  status public.job_status not null default 'queued',
  error_code text,
  error_message text,
  price_credits public.credits not null,
  image_count public.image_count not null,
  queue_distance bigint,
  idempotency_key text,
  is_favorite boolean not null default false,
  tags text[] not null default '{}',
  created_at timestamptz not null default now(),
  started_at timestamptz,
  finished_at timestamptz,
  updated_at timestamptz not null default now(),
  deleted_at timestamptz,
  constraint generations_end_matches_status check (
    private.fits_status(status, error_code, finished_at, deleted_at)
  )
) with (fillfactor = 80);

comment on table public.generations is
  'What a user asked for and what became of it: the job''s permanent record.';
comment on column public.generations.alias_id is
  'The alias that was asked for and stood for model_id; null: the model itself was.';
comment on column public.generations.retry_of is
  'The failed or canceled generation that this one repeats.';
comment on column public.generations.provider_input is
  'What is sent to the provider: prompt, params, defaults and the chosen seed.';
comment on column public.generations.status is
  'queued -> processing (claim) -> completed | failed | canceled | queued again (retry, release).';
comment on column public.generations.error_code is 'Why it failed: a code of private.error_codes.';
comment on column public.generations.price_credits is
  'Credits charged for the whole generation at enqueue.';
comment on column public.generations.queue_distance is
  'How far behind the queue''s present it was put: ready_jobs.fair_key less the virtual clock.';
comment on column public.generations.idempotency_key is
  'The client''s own name for the request: the same key answers with this row.';
comment on column public.generations.deleted_at is
  'When the user deleted it: hidden from then on, erased after settings.keep_deleted.';

create index generations_user_id_id_idx on public.generations (user_id, id desc);
-- Read by list_generations. Only the update that sets or clears a favorite pays for it.
create index generations_favorites_idx
on public.generations (user_id, id desc) where is_favorite;
create unique index generations_idempotency_key_idx
on public.generations (user_id, idempotency_key) where idempotency_key is not null;

-- By the old one: retry_of is looked up backwards only where there is a retry.
create table private.retries (
  retry_of uuid,
  generation_id uuid,
  primary key (retry_of, generation_id)
);

comment on table private.retries is 'generations.retry_of, to be found by it.';

create table public.images (
  generation_id uuid not null,
  position smallint not null,
  user_id uuid not null,
  storage_path text not null,
  preview_path text,
  content_type text not null,
  width integer,
  height integer,
  bytes integer not null,
  blurhash text,
  share_id uuid,
  shows_prompt boolean not null default false,
  created_at timestamptz not null default now(),
  primary key (generation_id, position),
  constraint images_position_is_not_negative check (position >= 0),
  constraint images_path_is_the_owners check (
    starts_with(storage_path, concat(user_id, '/', generation_id, '/', position, '.'))
  ),
  constraint images_preview_path_is_the_owners check (
    starts_with(preview_path, concat(user_id, '/', generation_id, '/', position, '.'))
  ),
  constraint images_prompt_has_a_share check (not shows_prompt or share_id is not null),
  constraint images_content_type_is_an_image check (content_type like 'image/%'),
  constraint images_size_is_positive check (bytes > 0 and width > 0 and height > 0)
);

comment on table public.images is 'One stored output of a generation.';
comment on column public.images.storage_path is
  'Path in bucket generations: <user_id>/<generation_id>/<position>.<ext>. Never changes: a good '
  'cache key.';
comment on column public.images.preview_path is
  'Path of a smaller WebP for galleries; null where none was made.';
comment on column public.images.share_id is
  'Given when the owner shares it, in the order of time; null: private.';

-- Read by the policy on images.
create index images_user_id_idx on public.images (user_id);
-- The catalogue: what can be asked for.
--
-- A model is a row, made of its provider's own schema (make import-model) or by hand; an alias is a
-- name that stands for one of several models. Models are data: nothing else refers to them by key.

create table public.models (
  id text primary key,
  provider text not null,
  provider_ref text not null,
  title text not null,
  price_credits integer not null,
  paid_price_credits integer not null,
  requires_paid boolean not null default false,
  is_active boolean not null default true,
  input_schema jsonb not null,
  default_input jsonb not null default '{}',
  required_inputs text[] not null default '{}',
  lowest_seed bigint,
  highest_seed bigint,
  client_inputs text[] not null,
  prompt_input text default 'prompt',
  image_inputs text[] not null default '{}',
  image_count_input text,
  operator_input jsonb not null default '{}',
  max_images smallint not null default 1,
  deadline interval not null default '5 minutes',
  cost_usd numeric(12, 6),
  cost_unit text,
  is_schema_confirmed boolean not null default true,
  constraint models_id_is_owner_slash_name check (id ~ '^[a-z0-9_.-]+/[a-z0-9_.-]+$'),
  constraint models_provider_is_known check (provider in ('preview', 'replicate')),
  constraint models_prices_are_not_negative check (price_credits >= 0 and paid_price_credits >= 0),
  -- With 16 images and 100 jobs of a batch it is an integer still.
  constraint models_prices_are_at_most_a_million check (
    greatest(price_credits, paid_price_credits) <= 1000000
  ),
  constraint models_input_schema_has_properties check (
    coalesce(jsonb_typeof(input_schema -> 'properties'), '') = 'object'
  ),
  constraint models_prompt_input_is_no_client_input check (not prompt_input = any(client_inputs)),
  constraint models_image_inputs_are_client_inputs check (client_inputs @> image_inputs),
  constraint models_operator_input_is_an_object check (jsonb_typeof(operator_input) = 'object'),
  constraint models_cost_has_a_unit check (
    (cost_usd is null) = (cost_unit is null) and cost_usd >= 0 and cost_unit in ('image', 'second')
  ),
  constraint models_image_count_input_is_a_client_input check (
    image_count_input is null or image_count_input = any(client_inputs)
  ),
  constraint models_max_images_is_sane check (max_images between 1 and 16),
  constraint models_deadline_is_positive check (deadline > interval '0')
);

comment on table public.models is
  'The catalogue: what can be asked for, at what price, run by whom.';
comment on column public.models.provider_ref is
  'What the provider calls the model: owner/name, or owner/name:version.';
comment on column public.models.price_credits is 'Credits per image for a free user.';
comment on column public.models.paid_price_credits is
  'Credits per image for a paid user; 0 means included in the plan.';
comment on column public.models.input_schema is
  'JSON schema of the provider''s input: {"properties": {name: {type, minimum, maximum, enum, '
  'default}}}.';
comment on column public.models.default_input is
  'What input_schema gives for what nobody says. This and the next three are kept by a trigger.';
comment on column public.models.required_inputs is
  'The client inputs that nobody else gives a value.';
comment on column public.models.lowest_seed is
  'From here to highest_seed a seed is chosen where nobody says one; null: the model has none.';
comment on column public.models.image_inputs is
  'The client inputs that take source images: paths in bucket inputs, which the worker signs.';
comment on column public.models.image_count_input is
  'The client input that says how many images; null: none does, and max_images are charged until '
  'they are counted.';
comment on column public.models.operator_input is
  'Sent with every job, over defaults and params; clients cannot change it.';
comment on column public.models.max_images is
  'Most images of one generation; what it charges where no input says how many.';
comment on column public.models.cost_usd is
  'US dollars the provider takes per cost_unit; null: not known.';
comment on column public.models.cost_unit is
  'image (each output) or second (of the provider''s compute).';
comment on column public.models.is_schema_confirmed is
  'False: input_schema was written from documentation, not imported from the provider.';

-- Taken out once, not in every request. A seed is chosen (32), not taken from the schema.
create function private.set_derived_inputs() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  new.default_input := (
    select coalesce(jsonb_object_agg(p.key, p.value -> 'default'), '{}')
    from jsonb_each(new.input_schema -> 'properties') as p
    where p.value ? 'default' and not (p.key = 'seed' and p.value ->> 'type' = 'integer')
  );
  new.required_inputs := array(
    select i.name from unnest(new.client_inputs) as i (name)
    where new.input_schema -> 'required' ? i.name and i.name <> 'seed'
      and not new.input_schema #> array['properties', i.name] ? 'default'
      and not new.operator_input ? i.name
  );
  new.lowest_seed := null;
  new.highest_seed := null;
  if new.input_schema #>> '{properties,seed,type}' = 'integer' then
    new.lowest_seed := greatest(
      0, (new.input_schema #>> '{properties,seed,minimum}')::numeric
    );
    new.highest_seed := least(
      2147483647, (new.input_schema #>> '{properties,seed,maximum}')::numeric
    );
  end if;
  return new;
end;
$$;

create trigger models_set_derived_inputs
before insert or update on public.models
for each row execute function private.set_derived_inputs();

create table public.model_aliases (
  id text,
  model_id text references public.models (id) on delete cascade,
  weight integer not null default 1,
  primary key (id, model_id),
  constraint model_aliases_id_is_owner_slash_name check (id ~ '^[a-z0-9_.-]+/[a-z0-9_.-]+$'),
  constraint model_aliases_weight_is_not_negative check (weight >= 0)
);

comment on table public.model_aliases is
  'Names that stand for one of several models, to try them against each other: one row for each '
  'arm. A user stays with one arm while the weights stay and it is not paused.';
comment on column public.model_aliases.id is
  'What clients ask for, auto/fast say. A model of that name goes first.';
comment on column public.model_aliases.weight is
  'Share of the users against the weights of the other arms; 0: none.';

create index model_aliases_model_id_idx on public.model_aliases (model_id);
-- The tables of the queue and its workers.
--
-- A live job is in exactly one of two small tables: ready_jobs while it may be claimed,
-- running_jobs while a worker has its lease. History is elsewhere (generations, attempts), so both
-- stay as small as the work in hand and no scan of them meets finished jobs.
--
-- A lease is proven by its token. Every call of a worker names (job, token): where that row is
-- gone, the lease is lost and the call changes nothing.
--
-- Their job ids have no foreign key to generations: it would look up and lock that row in every
-- enqueue and claim. Only finished generations are deleted, but for a deleted user's (84).

create sequence private.lease_tokens;

comment on sequence private.lease_tokens is
  'Lease tokens: one global order, so an old token never matches again.';

-- A sequence is a variable that can be read and set without locks and leaves no dead rows behind,
-- however long another session holds back vacuum.
create sequence private.virtual_clock minvalue 0 start 0;

comment on sequence private.virtual_clock is
  'Virtual time of the queue: the fair_key of the job last claimed. A hint; nothing breaks if it '
  'is off.';

create sequence private.scan_due minvalue 0 start 0;

comment on sequence private.scan_due is
  'When ready_jobs may next be read from its start, in milliseconds since 1970: see '
  'private.put_off().';

create sequence private.recovery_due minvalue 0 start 0;

comment on sequence private.recovery_due is 'The same for a look at all of running_jobs.';

create table private.ready_jobs (
  job_id uuid primary key,
  seq bigint generated always as identity,
  user_id uuid not null,
  model_id text not null,
  fair_key bigint not null,
  attempt smallint not null default 0,
  run_at timestamptz,
  queued_at timestamptz not null default now(),
  provider_job_id text,
  create_started_at timestamptz,
  input_sha256 bytea
) with (
  fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500,
  autovacuum_vacuum_insert_threshold = -1, autovacuum_analyze_scale_factor = 0.1,
  autovacuum_vacuum_cost_delay = 0
);

comment on table private.ready_jobs is 'Jobs that wait to be claimed.';
comment on column private.ready_jobs.fair_key is
  'Virtual finish time: greatest(virtual clock, the user''s last) + price / weight. Smallest is '
  'claimed first.';
comment on column private.ready_jobs.attempt is 'Attempts used so far.';
comment on column private.ready_jobs.queued_at is 'Since when it may be claimed.';
comment on column private.ready_jobs.provider_job_id is
  'The provider''s job an earlier attempt began: resume it.';
comment on column private.ready_jobs.create_started_at is
  'An earlier attempt may have asked the provider to create, then or later, and never learned the '
  'outcome: look first.';
comment on column private.ready_jobs.input_sha256 is
  'What it asked for then: see running_jobs.input_sha256.';

-- Delayed jobs are out of the claim's index, so a pile of them costs the claim nothing.
create index ready_jobs_claim_idx on private.ready_jobs (fair_key, seq) where run_at is null;
create index ready_jobs_run_at_idx on private.ready_jobs (run_at) where run_at is not null;
-- A user's live jobs are counted, not kept count of: see live_jobs (30).
create index ready_jobs_user_id_idx on private.ready_jobs (user_id);
-- Claims read it instead of the first while some model is paused.
create index ready_jobs_model_idx on private.ready_jobs (model_id, fair_key, seq)
where run_at is null;

-- Domains, like job_status (10): a list of words is read once in a session, not in each statement.
create domain private.job_stage as text constraint job_stage_is_known check (
  value in ('generating', 'storing')
);

create domain private.attempt_outcome as text constraint attempt_outcome_is_known check (
  value in ('completed', 'retried', 'failed', 'released', 'canceled')
);

-- No index on what heartbeats change, and half-empty pages: beats are HOT updates.
create table private.running_jobs (
  job_id uuid primary key,
  user_id uuid not null,
  model_id text not null,
  token bigint not null,
  worker_id bigint not null,
  attempt smallint not null,
  claimed_at timestamptz not null default now(),
  lease_until timestamptz not null,
  deadline_at timestamptz not null,
  stage private.job_stage not null default 'generating',
  progress smallint,
  provider_job_id text,
  create_started_at timestamptz,
  input_sha256 bytea,
  cancel_requested boolean not null default false,
  constraint running_jobs_progress_is_a_percentage check (progress between 0 and 100)
) with (
  fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200,
  autovacuum_vacuum_insert_threshold = -1, autovacuum_vacuum_cost_delay = 0
);

comment on table private.running_jobs is
  'Jobs a worker holds a lease on: as many rows as slots in the fleet.';
comment on column private.running_jobs.lease_until is
  'When the worker counts as dead unless it beats.';
comment on column private.running_jobs.stage is
  'generating (at the provider) -> storing (download, upload).';
comment on column private.running_jobs.provider_job_id is
  'Checkpoint: the provider''s id, saved as soon as it is known.';
comment on column private.running_jobs.create_started_at is
  'Since when the provider may have been asked to create: the first claim whose outcome nobody '
  'learned, or this one.';
comment on column private.running_jobs.input_sha256 is
  'Of what the provider was last asked to create, where that has addresses of sources: they are '
  'made anew each time. null with such a job: nothing was asked for.';

create index running_jobs_user_id_idx on private.running_jobs (user_id);

create table private.workers (
  id bigint generated always as identity primary key,
  host text not null,
  version text not null,
  slots smallint not null,
  asleep boolean not null default false,
  is_listening boolean not null default true,
  started_at timestamptz not null default now(),
  seen_at timestamptz not null default now(),
  constraint workers_slots_are_positive check (slots > 0)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);

comment on table private.workers is 'Worker processes: liveness and wake-up.';
comment on column private.workers.asleep is
  'Found no work and waits for NOTIFY on darkroom_worker_<id>.';
comment on column private.workers.is_listening is
  'Whether NOTIFY reaches it, as it says with each beat; false: it finds jobs by polling only.';

create table private.attempts (
  generation_id uuid not null references public.generations (id) on delete cascade,
  token bigint not null,
  model_id text not null,
  attempt smallint not null,
  worker_id bigint not null,
  started_at timestamptz not null,
  ended_at timestamptz not null default now(),
  outcome private.attempt_outcome not null,
  error_code text,
  error_detail text,
  provider_job_id text,
  provider_seconds real,
  provider_images integer,
  cost_usd numeric(18, 6),
  primary key (generation_id, token)
);

comment on table private.attempts is
  'One row for each ended claim of a job. For operators only: provider text stays here.';
comment on column private.attempts.attempt is
  'Attempt number; a released or throttled claim shares it with the next, so (generation, token) '
  'is the key.';
comment on column private.attempts.outcome is
  'completed | retried (failed, queued again) | failed | released (graceful stop) | canceled.';
comment on column private.attempts.provider_images is 'Images the provider made, as it bills them.';

-- Written in the order of time, so a BRIN index finds the last minutes, and costs next to nothing.
create index attempts_ended_at_idx
on private.attempts using brin (ended_at) with (pages_per_range = 16, autosummarize = true);

create table private.purchases (
  generation_id uuid not null references public.generations (id) on delete cascade,
  provider_job_id text not null,
  primary key (generation_id, provider_job_id),
  unique (provider_job_id)
);

comment on table private.purchases is
  'The provider''s jobs that ours have bought, from when the id is known until the generation is '
  'erased. No two jobs have the same one, whatever a provider answers.';

create table private.error_codes (
  code text primary key,
  message text not null,
  is_retryable boolean not null,
  uses_attempt boolean not null default true,
  resumes boolean not null default false,
  trips_breaker boolean not null default false
);

comment on table private.error_codes is
  'What a job can fail with, and what fail_jobs does about it.';
comment on column private.error_codes.uses_attempt is
  'False: the retry does not count (the provider was busy).';
comment on column private.error_codes.resumes is
  'True: the next attempt resumes the provider''s job, which may be alive and paid for. False: it'
  ' starts anew.';
comment on column private.error_codes.trips_breaker is
  'True: the provider''s fault; enough in a row pause the model or the provider.';
-- What operators set: the plans of users, and one row of settings. Other files add what is theirs.
--
-- Whoever changes a row changes the product from the next request on; nothing is started anew.

create table private.plans (
  name text primary key,
  max_active integer not null,
  max_per_minute integer not null,
  full_minutes_per_day smallint not null default 30,
  max_burned_per_day integer not null default 5,
  max_batch integer not null,
  weight integer not null,
  busy_after interval,
  oldest_ready_at timestamptz,
  looked_at timestamptz not null default now(),
  constraint plans_name_is_known check (name in ('free', 'paid')),
  constraint plans_limits_are_positive check (
    least(max_active, max_per_minute, full_minutes_per_day, max_burned_per_day) > 0
    and max_batch between 1 and 100
  ),
  constraint plans_weight_is_a_step_of_the_queue check (weight between 1 and 1000),
  constraint plans_busy_after_is_positive check (
    busy_after > interval '0' and busy_after <= interval '1000 years'
  )
) with (fillfactor = 50);

comment on table private.plans is 'Limits of free and paid users.';
comment on column private.plans.full_minutes_per_day is
  'Times max_per_minute: jobs enqueued in a day, each of which keeps its row.';
comment on column private.plans.max_burned_per_day is
  'Jobs of a day that a user may cancel when the provider may bill us already; then no more are '
  'let in.';
comment on column private.plans.max_batch is
  'Prompts of one batch. A batch is let in whole while there is room for one job more, and then '
  'counts in full.';
comment on column private.plans.weight is 'Share of the queue against other users'' weights.';
comment on column private.plans.oldest_ready_at is
  'queued_at of the job that could be claimed longest at looked_at; null: there was none. Too dear '
  'to look up in every enqueue, and here because each of them reads its plan.';
comment on column private.plans.busy_after is
  'Requests are refused as busy while a job has waited this long whose user has nothing running; '
  'null: never.';

create table private.settings (
  id boolean primary key default true,
  welcome_credits integer not null default 10,
  max_prompt_chars integer not null default 4000,
  max_params_bytes integer not null default 8192,
  lease interval not null default '60 seconds',
  heartbeat interval not null default '15 seconds',
  max_attempts smallint not null default 3,
  retry_base interval not null default '2 seconds',
  retry_cap interval not null default '60 seconds',
  give_up_after interval not null default '1 hour',
  running_cancel_refund_percent smallint not null default 100,
  credit_usd numeric(12, 6),
  broadcasts boolean not null default true,
  breaker_failures smallint not null default 5,
  breaker_provider_failures smallint not null default 15,
  breaker_users smallint not null default 3,
  breaker_window interval not null default '5 minutes',
  breaker_pause interval not null default '30 seconds',
  breaker_pause_cap interval not null default '15 minutes',
  constraint settings_is_one_row check (id),
  -- So short ones need no look here.
  constraint settings_sizes_are_a_thousand_at_least check (
    least(max_prompt_chars, max_params_bytes) >= 1000
  ),
  constraint settings_credit_is_not_negative check (credit_usd >= 0),
  constraint settings_welcome_credits_are_not_negative check (welcome_credits >= 0),
  constraint settings_welcome_credits_are_at_most_a_million check (welcome_credits <= 1000000),
  constraint settings_lease_outlives_three_heartbeats check (lease >= 3 * heartbeat),
  constraint settings_max_attempts_is_positive check (max_attempts > 0),
  constraint settings_running_cancel_refund_is_a_percentage check (
    running_cancel_refund_percent between 0 and 100
  ),
  constraint settings_breaker_limits_are_positive check (
    least(breaker_failures, breaker_provider_failures, breaker_users) > 0
    and least(breaker_window, breaker_pause, breaker_pause_cap) > interval '0'
  )
);

comment on table private.settings is 'The one row of operator settings.';
comment on column private.settings.welcome_credits is 'Credits of a new user; 0 for none.';
comment on column private.settings.lease is
  'How long a worker may be silent before its jobs are given to others.';
comment on column private.settings.heartbeat is 'How often workers beat.';
comment on column private.settings.retry_base is
  'Retry n of a job waits up to retry_base * 2^(n-1), at most retry_cap.';
comment on column private.settings.give_up_after is 'A job this old is not retried any more.';
comment on column private.settings.credit_usd is
  'What a credit earns, in US dollars, for margin_usd of the cost views; null: not said.';
comment on column private.settings.running_cancel_refund_percent is
  'Share of the price given back when a job is canceled after the provider was asked for it.';
comment on column private.settings.broadcasts is
  'Whether each new state of a job is broadcast where Supabase Realtime is; else clients poll.';
comment on column private.settings.breaker_failures is
  'Failures in a row, with no success between, that pause a model.';
comment on column private.settings.breaker_provider_failures is
  'The same for a provider. A model that is paused adds none, so several must fail.';
comment on column private.settings.breaker_users is
  'From how many users the failures must come, for no few users'' input pauses a model for all.';
comment on column private.settings.breaker_window is 'Failures in a row count for this long.';
comment on column private.settings.breaker_pause is
  'Pause n in a row lasts breaker_pause * 2^(n-1), at most breaker_pause_cap.';
-- What the routines leave behind: when each ran, and what it passed over. And the alerts' rules.
--
-- A threshold is a row, not code: queue_health() (88) holds what it counts against alert_rules.
-- Each routine that pg_cron starts leaves its time in routines, so that its silence is seen without
-- reading pg_cron's own history, which may be huge or not readable.

create table private.alert_rules (
  alert text primary key,
  threshold numeric,
  unit text not null,
  min_cases integer not null default 0,
  severity text not null,
  hint text not null,
  constraint alert_rules_threshold_is_not_negative check (threshold >= 0),
  constraint alert_rules_severity_is_known check (severity in ('warning', 'critical'))
);

comment on table private.alert_rules is
  'When queue_health() raises an alert, how bad that is (warning: look today; critical: users '
  'notice now), and what to do about it.';
comment on column private.alert_rules.threshold is
  'Raised above so many of the unit; null: never.';
comment on column private.alert_rules.min_cases is
  'Silent where the value rests on fewer cases than this.';

create table private.routines (
  name text primary key,
  every interval,
  last_run_at timestamptz not null default now(),
  result jsonb
);

comment on table private.routines is
  'What runs by itself, when it last ran to its end, and what it found, where that is worth '
  'keeping (check_books).';
comment on column private.routines.every is
  'How often pg_cron is to run it; null: nobody waits for it.';

create table private.skipped_rows (
  step text,
  key text,
  code text not null,
  problem text not null,
  times integer not null default 1,
  first_at timestamptz not null default now(),
  last_at timestamptz not null default now(),
  primary key (step, key)
);

comment on table private.skipped_rows is
  'What routines over many users could not do and passed over. Forgotten once it is done, or a '
  'week after the last try; whoever mends a row may delete its line.';
comment on column private.skipped_rows.step is 'The function or table the row was met in.';
comment on column private.skipped_rows.key is 'Which row; * if the step failed as a whole.';
comment on column private.skipped_rows.code is 'SQLSTATE of the last try; problem is its message.';

-- Notes that a routine ran to its end; pg_cron calls it after the routine.
create function private.note_run(p_name text) returns void
language sql set search_path = pg_catalog, pg_temp as $$
  update private.routines set last_run_at = now() where name = p_name
$$;

-- Waits for nobody, and stops at a thousand rows: by then it is not the rows that are at fault.
create function private.note_skipped(
  p_step text, p_key text, p_code text, p_problem text
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  update private.skipped_rows
  set code = p_code, problem = left(p_problem, 500), times = times + 1, last_at = now()
  where ctid = any (array(
    select s.ctid from private.skipped_rows as s
    where (s.step, s.key) = (p_step, left(p_key, 200)) for update skip locked
  ));
  if not found then
    insert into private.skipped_rows (step, key, code, problem)
    select p_step, left(p_key, 200), p_code, left(p_problem, 500)
    where (select count(*) < 1000 from private.skipped_rows)
    on conflict (step, key) do nothing;
  end if;
end;
$$;

-- Has a statement done for all keys at once. If that fails, for each half, down to the row that is
-- at fault: it is noted and passed over, and the rest is done. Answers the sum of what it answers.
--
-- A fault of the server or of the installation is no row's and is raised. A lock that somebody
-- holds for ever is a fault like any other where the caller has set lock_timeout.
create function private.skip_failing(p_statement text, p_keys anyarray) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_step text := substring(p_statement from 'private\.(\w+)');
  v_half integer := cardinality(p_keys) / 2;
  v_done text;
begin
  if coalesce(cardinality(p_keys), 0) = 0 then
    return 0;
  end if;
  begin
    execute p_statement into v_done using p_keys;
    delete from private.skipped_rows where ctid = any (array(
      select s.ctid from private.skipped_rows as s
      where s.step = v_step and s.key = any (p_keys::text[]) for update skip locked
    ));
    return coalesce(nullif(v_done, '')::integer, 0);
  exception when others then
    if sqlstate ~ '^(25|42|53|57|58)' then
      raise;
    elsif v_half = 0 then
      perform private.note_skipped(v_step, p_keys[1]::text, sqlstate, sqlerrm);
      return 0;
    end if;
  end;
  return private.skip_failing(p_statement, p_keys[:v_half])
    + private.skip_failing(p_statement, p_keys[v_half + 1:]);
end;
$$;
-- Row level security: who may read what. Nobody writes a table: the functions do.
--
-- Users read their own rows in public, but not what they deleted; the catalogue is read through
-- list_models(). Private tables have RLS (92) and no policy, which denies everybody but their owner
-- even where a gateway grants too much. Functions run as that owner.

alter table public.entitlements enable row level security;
alter table public.credit_ledger enable row level security;
alter table public.models enable row level security;
alter table public.model_aliases enable row level security;
alter table public.batches enable row level security;
alter table public.generations enable row level security;
alter table public.images enable row level security;

revoke all on table public.entitlements, public.credit_ledger, public.models,
public.model_aliases, public.batches, public.generations, public.images
from public, anon, authenticated, service_role;
revoke all on sequence public.credit_ledger_id_seq from public, anon, authenticated, service_role;
revoke all on domain public.job_status, public.ledger_kind, public.credits, public.image_count,
public.params, private.job_stage, private.attempt_outcome
from public, anon, authenticated, service_role;

grant select on table public.entitlements, public.credit_ledger, public.batches,
public.generations, public.images to authenticated, service_role;
grant select, insert, update on table public.models to service_role;
grant select, insert, update, delete on table public.model_aliases to service_role;

-- The user of the request's JWT; null if it names none. As Supabase's auth.uid(), which fails where
-- the sub is no uuid or the claims are no JSON, and which each transaction would plan anew.
--
-- Raises: PT401 not_authenticated.
create function private.caller_id() returns uuid
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
  return coalesce(
    nullif(current_setting('request.jwt.claim.sub', true), ''),
    nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'
  )::uuid;
exception when data_exception then
  perform private.refuse(
    'not_authenticated', 'The sub of the token is no user''s id.', 'Sign in again.'
  );
  return null;
end;
$$;

create policy "Users read their own entitlement" on public.entitlements
for select to authenticated using (user_id = (select private.caller_id()));

create policy "Users read their own ledger" on public.credit_ledger
for select to authenticated using (user_id = (select private.caller_id()));

create policy "Users read their own batches" on public.batches
for select to authenticated using (user_id = (select private.caller_id()));

create policy "Users read their own generations" on public.generations
for select to authenticated using (user_id = (select private.caller_id()) and deleted_at is null);

-- The policy above applies inside, too: the images of a deleted generation are hidden with it.
create policy "Users read their own images" on public.images
for select to authenticated using (
  user_id = (select private.caller_id())
  and exists (
    select from public.generations as g
    where g.id = images.generation_id
  )
);

-- Whether a user may put a file there: it has a name of its own below the folder, and the user has
-- not as many others as may be kept. Who uploads several at once may get a few more in.
create function private.may_store_input(p_path text) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
  return octet_length(p_path) <= 512
    and p_path ~ '^[^/]+(/[^/]+)+$' and p_path !~ '/\.\.?(/|$)'
    and (
      -- As a filter: the planner may else read the whole bucket.
      select count(*) filter (where o.bucket_id = 'inputs' and o.name <> p_path)
        < (select s.max_input_files from private.settings as s)
      from storage.objects as o
      -- From <id>/ up to <id>0, the next character: operators that the index of names serves.
      where o.name ~>=~ concat(auth.uid(), '/') and o.name ~<~ concat(auth.uid(), '0')
    );
end;
$$;

-- Storage: outputs are read by their owner and written by the worker alone; inputs for
-- image-to-image are put into the user's own folder. On a text, so that where the table is
-- another's it can be shown to somebody who may.
do $do$
declare
  v_policies text := $policies$
  create policy "Users read their own generated images" on storage.objects
  for select to authenticated using (
    bucket_id = 'generations' and split_part(name, '/', 1) = (select auth.uid())::text
  );
  create policy "Users read their own input images" on storage.objects
  for select to authenticated using (
    bucket_id = 'inputs' and split_part(name, '/', 1) = (select auth.uid())::text
  );
  create policy "Users add their own input images" on storage.objects
  for insert to authenticated with check (
    bucket_id = 'inputs' and split_part(name, '/', 1) = (select auth.uid())::text
    and private.may_store_input(name)
  );
  create policy "Users replace their own input images" on storage.objects
  for update to authenticated using (
    bucket_id = 'inputs' and split_part(name, '/', 1) = (select auth.uid())::text
  ) with check (
    bucket_id = 'inputs' and split_part(name, '/', 1) = (select auth.uid())::text
    and private.may_store_input(name)
  );
  create policy "Users delete their own input images" on storage.objects
  for delete to authenticated using (
    bucket_id = 'inputs' and split_part(name, '/', 1) = (select auth.uid())::text
  );
$policies$;
begin
  if to_regclass('storage.objects') is null then
    raise notice 'Darkroom: no storage.objects here; buckets and their policies are skipped';
    return;
  end if;
  begin
    execute v_policies;
  exception when insufficient_privilege then
    raise notice 'Darkroom: no right to make policies on storage.objects; until its owner, or '
      'Supabase''s SQL editor, has run these, users reach no file: %', v_policies;
  end;
end;
$do$;
-- Breakers: a model or a provider that keeps failing is left alone for a while.
--
-- A breaker is a row named like a model or a provider; where there is none, all is well. Closed:
-- failures in a row are counted, and a success between starts anew. Enough of them, from enough
-- users, open it. Nobody can tell yet who is to blame: the model, or the input of these users. So
-- for a pause, longer each time, only their jobs are not claimed (72) and refused (30). The jobs of
-- others are tried, one at a time: a failure makes its user one of them, a success closes the
-- breaker. Whoever failed where another then succeeded is doubted for a while: their failures
-- count no more. When a pause is over it is half-open: one job is tried, of a user who has not
-- failed if there is one, and its failure opens the breaker again.
--
-- What is tried is the probe. One that ends without an answer, dies, or takes longer than the pause
-- leaves its place to the next. Jobs that wait lose neither attempts nor place.
--
-- A provider whose account is refused is paused for everybody (pause_provider). An operator opens
-- and closes a breaker with pause_model and resume_model; a pause of theirs is for everybody, and
-- just ends when it is over.
--
-- Lock order: a breaker comes after all other rows, and a provider's before its models'. A job that
-- ends without anything to count or to reset takes no lock here.

create table private.breakers (
  name text primary key,
  failures smallint not null default 0,
  failing_since timestamptz,
  failed_users uuid[] not null default '{}',
  times_opened smallint not null default 0,
  paused_until timestamptz,
  pause_reason text,
  probe_job_id uuid,
  resumed_at timestamptz,
  doubted_users uuid[] not null default '{}',
  doubted_at timestamptz
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 50);

comment on table private.breakers is
  'Models and providers that failed or were paused: whether their jobs wait.';
comment on column private.breakers.failed_users is
  'Different users among the failures. While it is paused their jobs wait and others are tried; '
  'where there are none, everybody''s wait.';
comment on column private.breakers.times_opened is
  'Pauses in a row by failures or a refused account: the next is longer. 0: none, or an operator''s'
  ' pause, which ends without a probe.';
comment on column private.breakers.paused_until is
  'null: closed. In the future: open, no job is claimed. Past: half-open, one job is tried.';
comment on column private.breakers.probe_job_id is
  'The job that is tried, as long as it is in running_jobs.';
comment on column private.breakers.resumed_at is 'When its last pause ended.';
comment on column private.breakers.doubted_users is
  'Users who failed where others then succeeded: for breaker_pause_cap from doubted_at their '
  'failures count for nobody else.';

create view private.paused_models with (security_invoker = true) as
select
  m.id,
  b.paused_until,
  b.resumed_at
from private.breakers as b
inner join public.models as m on b.name in (m.id, m.provider)
where b.paused_until is not null or b.resumed_at is not null;

comment on view private.paused_models is
  'Models that are or were paused, themselves or with their provider.';

-- Until when the model is paused for this user, itself or with its provider; null unless it is. A
-- pause that failures began is one for those who failed.
--
-- Who keeps failing where others do not, as the breakers noticed, is let wait like a model:
-- for the window in which so many failures would pause one.
create function private.paused_until(p_model public.models, p_user_id uuid) returns timestamptz
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_until timestamptz;
  v_is_suspected boolean;
begin
  select
    max(b.paused_until) filter (
      where b.paused_until > now() and (b.failed_users = '{}' or p_user_id = any (b.failed_users))
    ),
    bool_or(p_user_id = any (b.failed_users || b.doubted_users))
  into v_until, v_is_suspected
  from private.breakers as b where b.name in (p_model.id, p_model.provider);
  if v_is_suspected then
    v_until := greatest(v_until, (
      select recent.finished_at + s.breaker_window
      from private.settings as s
      cross join lateral (
        select g.finished_at from (
          select * from public.generations where user_id = p_user_id order by id desc limit 100
        ) as g
        inner join private.error_codes as e on e.code = g.error_code and e.trips_breaker
        where g.model_id = p_model.id and g.finished_at > now() - s.breaker_window
        order by g.finished_at desc offset s.breaker_failures - 1 limit 1
      ) as recent
    ));
  end if;
  return v_until;
end;
$$;

-- How long the n-th pause in a row lasts.
create function private.pause_length(p_times integer) returns interval
language sql stable set search_path = pg_catalog, pg_temp as $$
  select least(s.breaker_pause_cap, s.breaker_pause * power(2, least(p_times - 1, 20)))
  from private.settings as s
$$;

create function private.breaker_state(p_breaker private.breakers) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select case
    when p_breaker.paused_until is null then 'closed'
    when p_breaker.times_opened = 0
      then case when p_breaker.paused_until > now() then 'open' else 'closed' end
    when exists (
      select from private.running_jobs as r
      where r.job_id = p_breaker.probe_job_id
        and r.claimed_at > now() - private.pause_length(p_breaker.times_opened)
    ) then 'probing'
    when p_breaker.paused_until > now() then 'open'
    else 'half-open'
  end
$$;

create function private.breaker_json(p_breaker private.breakers) returns json
language sql stable set search_path = pg_catalog, pg_temp as $$
  select json_build_object(
    'name', p_breaker.name,
    'state', b.state,
    'paused_until', case when p_breaker.paused_until > now() then p_breaker.paused_until end,
    'reason', case when b.state <> 'closed' then p_breaker.pause_reason end,
    'failures', p_breaker.failures,
    'times_opened', p_breaker.times_opened
  )
  from (select private.breaker_state(p_breaker) as state) as b
$$;

-- Whether a job may be claimed in spite of the breaker: as its probe, unless it is closed. From a
-- hundred users on who have failed it is no few users' input: nobody is tried during a pause.
create function private.admits(p_breaker private.breakers, p_user_id uuid) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select case private.breaker_state(p_breaker)
    when 'open' then cardinality(p_breaker.failed_users) between 1 and 99
      and not p_user_id = any (p_breaker.failed_users)
    when 'probing' then false
    else true
  end
$$;

create function private.is_doubted(p_breaker private.breakers, p_user_id uuid) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(
    p_user_id = any (p_breaker.doubted_users)
      and p_breaker.doubted_at > now() - s.breaker_pause_cap,
    false
  )
  from private.settings as s
$$;

-- Counts one failure against a breaker, which the caller has locked, and opens it if that was
-- enough, or if its probe failed after the pause.
create function private.count_failure(
  p_name text, p_job private.running_jobs, p_code text, p_threshold integer
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_breaker private.breakers := (select b from private.breakers as b where b.name = p_name);
  v_settings private.settings := (select s from private.settings as s);
  v_is_closed boolean := private.breaker_state(v_breaker) = 'closed';
  v_opens boolean;
begin
  -- Neither who is doubted counts, nor what fails while an operator's pause lasts.
  if (v_is_closed and private.is_doubted(v_breaker, p_job.user_id))
    or (not v_is_closed and v_breaker.times_opened = 0) then
    return;
  end if;
  if v_is_closed and v_breaker.failing_since > now() - v_settings.breaker_window is not true then
    v_breaker.failures := 0;
    v_breaker.failing_since := now();
    v_breaker.failed_users := '{}';
  end if;
  -- Where everybody waits, nobody in particular does.
  if cardinality(v_breaker.failed_users) between (not v_is_closed)::integer and 99
    and not p_job.user_id = any (v_breaker.failed_users) then
    v_breaker.failed_users := v_breaker.failed_users || p_job.user_id;
  end if;
  if v_is_closed then
    v_breaker.failures := v_breaker.failures + 1;
    v_opens := v_breaker.failures >= p_threshold
      and cardinality(v_breaker.failed_users) >= v_settings.breaker_users;
  else
    v_opens := v_breaker.probe_job_id = p_job.job_id and v_breaker.paused_until <= now();
  end if;
  if v_opens then
    v_breaker.pause_reason := case
      when v_is_closed then format('%s failures in a row, the last: %s', v_breaker.failures, p_code)
      else format('the probe failed: %s', p_code)
    end;
    v_breaker.failures := 0;
    v_breaker.times_opened := least(v_breaker.times_opened + 1, 1000);
    v_breaker.paused_until := now() + private.pause_length(v_breaker.times_opened);
  end if;
  update private.breakers set
    failures = v_breaker.failures, failing_since = v_breaker.failing_since,
    failed_users = v_breaker.failed_users, times_opened = v_breaker.times_opened,
    paused_until = v_breaker.paused_until, pause_reason = v_breaker.pause_reason
  where name = p_name;
end;
$$;

-- Counts failed attempts, where the code is the provider's fault, against their models, and against
-- the provider unless the model is paused: one model alone does not pause a provider.
--
-- Locks: the breakers of the providers and the models, in order.
create function private.note_failures(p_jobs private.running_jobs[], p_codes text[]) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_settings private.settings := (select s from private.settings as s);
  v_job private.running_jobs;
  v_at bigint;
  v_provider text;
begin
  for v_at, v_provider in
    select j.ordinality, m.provider
    from unnest(p_jobs) with ordinality as j
    inner join private.error_codes as e on e.code = p_codes[j.ordinality] and e.trips_breaker
    inner join public.models as m on m.id = j.model_id
    order by m.provider, j.model_id, j.ordinality
  loop
    v_job := p_jobs[v_at];
    insert into private.breakers (name) values (v_provider), (v_job.model_id)
    on conflict do nothing;
    perform from private.breakers where name = v_provider for update;
    perform from private.breakers where name = v_job.model_id for update;
    if exists (
      select from private.breakers as b
      where (b.name = v_provider and b.probe_job_id = v_job.job_id)
        or (b.name = v_job.model_id and private.breaker_state(b) = 'closed')
    ) then
      perform private.count_failure(
        v_provider, v_job, p_codes[v_at], v_settings.breaker_provider_failures
      );
    end if;
    perform private.count_failure(
      v_job.model_id, v_job, p_codes[v_at], v_settings.breaker_failures
    );
  end loop;
end;
$$;

-- Jobs ended well: failures of their models are forgotten, and what is paused though one began
-- after the failures is closed. Who failed meanwhile is doubted, but not if the pause was over:
-- then it may well have been the model.
--
-- Locks: the breakers of the providers and the models, in order.
create function private.note_successes(p_jobs private.running_jobs[]) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_job record;
  v_is_resumed boolean;
begin
  for v_job in
    select j.job_id, j.user_id, j.claimed_at, names.name
    from unnest(p_jobs) as j
    left join public.models as m on m.id = j.model_id
    cross join lateral (values (1, m.provider), (2, j.model_id)) as names (place, name)
    order by m.provider, names.place, j.model_id
  loop
    update private.breakers as b set
      doubted_users = case
        when b.failed_users <> '{}' and (b.times_opened = 0 or b.paused_until > now())
          then (array_remove(
            b.failed_users
            || case when b.doubted_at > now() - s.breaker_pause_cap then b.doubted_users end,
            v_job.user_id
          ))[:200]
        else b.doubted_users
      end,
      doubted_at = case
        when b.failed_users <> '{}' and (b.times_opened = 0 or b.paused_until > now()) then now()
        else b.doubted_at
      end,
      failures = 0, failing_since = null, failed_users = '{}', times_opened = 0,
      paused_until = null, pause_reason = null, probe_job_id = null,
      resumed_at = case when b.times_opened > 0 then now() else b.resumed_at end
    from private.settings as s
    where b.name = v_job.name and case b.times_opened
      when 0 then b.failures > 0
      else v_job.claimed_at > b.failing_since or v_job.job_id = b.probe_job_id
    end
    returning b.resumed_at = now() into v_is_resumed;
    if v_is_resumed then
      perform setval('private.scan_due', 0);  -- what waited may be far below the virtual clock
      perform private.wake_workers();
    end if;
  end loop;
end;
$$;

-- An operator's pause stays what it is, and a user who is doubted begins none.
create function private.pause_provider(
  p_provider text, p_seconds integer, p_reason text, p_user_id uuid default null
) returns boolean
language sql security definer set search_path = pg_catalog, pg_temp as $$
  insert into private.breakers as b (
    name, paused_until, pause_reason, times_opened, failing_since, failed_users
  )
  select
    p_provider, now() + least(p_seconds, 3600) * interval '1 second', left(p_reason, 500), 1,
    now(), array_remove(array[p_user_id], null)
  where exists (select from public.models as m where m.provider = p_provider)
  on conflict (name) do update set
    paused_until = greatest(b.paused_until, excluded.paused_until),
    pause_reason = excluded.pause_reason,
    times_opened = greatest(b.times_opened, 1),
    failing_since = case when b.times_opened = 0 then now() else b.failing_since end,
    failed_users = case
      when b.times_opened = 0 then excluded.failed_users
      when p_user_id is null or b.failed_users = '{}' then '{}'
      when p_user_id = any (b.failed_users) then b.failed_users
      else b.failed_users || p_user_id
    end,
    probe_job_id = null
  where (b.times_opened > 0 or b.paused_until > now() is not true)
    and (b.times_opened > 0 or not private.is_doubted(b, p_user_id));
  select exists (
    select from private.breakers as b where b.name = p_provider and b.paused_until > now()
  )
$$;

comment on function private.pause_provider is
  'Keeps the jobs of a provider from being claimed for a while: the account was refused, and no '
  'job is to blame. Nothing fails and nobody is charged for it. With a user, where it is not sure '
  'that others would be refused, too: theirs wait, others'' are tried one by one. Answers whether '
  'it is paused now; not where others were served lately though this user failed: then the job is '
  'to blame.';

-- Pauses a model or a provider, or ends its pause where p_until is null. What the breaker counted
-- ends with it: from then on it is the operator's.
--
-- Raises: PT404 not_found.
create function private.set_pause(p_name text, p_until timestamptz, p_reason text) returns json
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_breaker private.breakers;
begin
  if not exists (select from public.models as m where p_name in (m.id, m.provider)) then
    perform private.refuse_missing(
      'model: no such model or provider',
      'Use the id of a model or the name of a provider in public.models.'
    );
  end if;
  insert into private.breakers as b (name, paused_until, pause_reason)
  values (p_name, p_until, p_reason)
  on conflict (name) do update set
    failures = 0, failing_since = null, failed_users = '{}', times_opened = 0, probe_job_id = null,
    paused_until = excluded.paused_until, pause_reason = excluded.pause_reason,
    resumed_at = case
      when p_until is null and b.paused_until is not null then now()
      else b.resumed_at
    end
  returning * into v_breaker;
  return private.breaker_json(v_breaker);
end;
$$;

create function public.pause_model(
  model text, until timestamptz default 'infinity', reason text default null
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform private.require_writable();
  if coalesce(until <= now(), true) then
    perform private.refuse_input(
      'until: not in the future', 'Leave it out to pause until resumed.'
    );
  elsif length(reason) > 500 then
    perform private.refuse_input('reason: longer than 500 characters');
  end if;
  return private.set_pause(model, until, reason);
end;
$$;

comment on function public.pause_model is
  'Pauses a model, or all models of a provider, until a time or resume_model: new requests are '
  'refused with model_paused, queued jobs wait and keep their place, running ones go on. Answers '
  '{name, state (open | closed | half-open | probing), paused_until, reason, failures, '
  'times_opened}. Errors: PT400 invalid_input, PT404 not_found.';

create function public.resume_model(model text) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_answer json;
begin
  perform private.require_writable();
  v_answer := private.set_pause(model, null, null);
  perform setval('private.scan_due', 0);
  perform private.wake_workers();
  return v_answer;
end;
$$;

comment on function public.resume_model is
  'Ends a pause of a model or a provider, whoever began it: its jobs are claimed at once, in their '
  'old order. Repeating it changes nothing. Answers as pause_model does. Errors: PT404 not_found.';
-- Gating: may this user ask for this? Nothing here writes but the lock of the user's entitlement.
--
-- gate() brings all that a request is held against in one statement; where that is not plainly
-- well, require_model() and refuse_limits() look closer and say what is wrong. Whether the input
-- fits the model is checked in 32. Every refusal of the API goes through refuse().

-- Raises one of the API's errors: a stable token, what is wrong, what to do. The one place that
-- says which HTTP status a token has.
--
-- One that passes with time carries Retry-After. PostgREST reads status and headers from the detail
-- of SQLSTATE PGRST (docs.postgrest.org, "Raise errors with HTTP status codes"). Browsers show no
-- such header to the page and supabase-js none at all, and a body has texts only: so the hint is
-- always this sentence, to be read as data.
create function private.refuse(
  p_token text, p_detail text, p_hint text default null, p_retry_after integer default null
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_status integer := (jsonb '{
    "invalid_input": 400, "not_authenticated": 401, "insufficient_credits": 402,
    "requires_paid_plan": 403, "not_found": 404, "method_not_allowed": 405,
    "idempotency_conflict": 409, "not_finished": 409, "already_finished": 409,
    "too_many_active": 429, "rate_limited": 429,
    "busy": 503, "model_paused": 503, "unavailable": 503
  }' ->> p_token)::integer;
begin
  if p_retry_after is null then
    raise exception using
      errcode = 'PT' || v_status, message = p_token, detail = p_detail, hint = coalesce(
        p_hint, 'Correct the argument and call again.'
      );
  end if;
  raise sqlstate 'PGRST' using
    message = json_build_object(
      'code', 'PT' || v_status,
      'message', p_token,
      'details', p_detail,
      'hint', format('Try again in %s seconds.', p_retry_after)
    )::text,
    detail = json_build_object(
      'status', v_status, 'headers', json_build_object('Retry-After', p_retry_after::text)
    )::text;
end;
$$;

create function private.refuse_input(p_detail text, p_hint text default null) returns void
language sql set search_path = pg_catalog, pg_temp
return private.refuse('invalid_input', p_detail, p_hint);

create function private.refuse_missing(p_detail text, p_hint text) returns void
language sql set search_path = pg_catalog, pg_temp
return private.refuse('not_found', p_detail, p_hint);

-- The token outlived the user.
create function private.refuse_unknown_user() returns void
language sql set search_path = pg_catalog, pg_temp
return private.refuse(
  'not_authenticated', 'There is no such user any more.', 'Sign in again.'
);

-- The transaction may write: it is not a GET's, and the database is not read only, as a standby is
-- and one whose disk is nearly full. Asked before anything is, so that the refusal is ours. The
-- default counts too: PostgREST opens its transactions read-write whatever it says, and no worker
-- would come for what was taken in.
--
-- Raises: PT405 method_not_allowed, PT503 unavailable.
create function private.require_writable() returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  if current_setting('transaction_read_only') = 'off'
    and current_setting('default_transaction_read_only') = 'off' then
    return;
  elsif current_setting('request.method', true) in ('GET', 'HEAD') then
    perform private.refuse(
      'method_not_allowed', 'This function changes something.', 'Call it by POST.'
    );
  end if;
  perform private.refuse(
    'unavailable', 'The database takes no changes at the moment.', p_retry_after => 30
  );
end;
$$;

-- The user of the request's JWT, who may write where the function does.
--
-- Raises: PT401 not_authenticated, PT405 method_not_allowed, PT503 unavailable.
create function private.require_user_id(p_writes boolean default false) returns uuid
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.caller_id();
begin
  if v_user_id is null then
    perform private.refuse(
      'not_authenticated', 'The request carries no user.',
      'Sign in and send the access token as Authorization: Bearer.'
    );
  elsif p_writes then
    perform private.require_writable();
  end if;
  return v_user_id;
end;
$$;

-- The same, who must still be there: for functions that neither lock the entitlement nor look for a
-- row of the user's.
--
-- Raises: PT401 not_authenticated, PT405 method_not_allowed, PT503 unavailable.
create function private.require_known_user_id(p_writes boolean default false) returns uuid
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_user_id(p_writes);
begin
  if not exists (select from public.entitlements where user_id = v_user_id) then
    perform private.refuse_unknown_user();
  end if;
  return v_user_id;
end;
$$;

-- Raises PT404 not_found, the same for a job that never was, is somebody else's, or is deleted; or
-- PT401 not_authenticated: the user is.
create function private.refuse_unknown_job() returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  perform private.require_known_user_id();
  perform private.refuse_missing(
    'job_id: no such job of yours', 'Use the job_id that enqueue_generation answered.'
  );
end;
$$;

-- The user's generation. Somebody else's is not found, like one that never was.
--
-- Raises: PT404 not_found.
create function private.require_generation(p_job_id uuid, p_user_id uuid) returns public.generations
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_generation public.generations;
begin
  select * into v_generation from public.generations
  where id = p_job_id and user_id = p_user_id and deleted_at is null;
  if not found then
    perform private.refuse_unknown_job();
  end if;
  return v_generation;
end;
$$;

-- The params as an object, if they, the prompts and the key are of a size and form we take. Some
-- gateways hand a jsonb argument as a JSON string that holds the text: it is unwrapped here, once.
-- p_field is what a refusal calls a prompt, with its place for %1$s.
--
-- Raises: PT400 invalid_input.
create function private.read_request(
  p_prompts text[], p_params jsonb, p_idempotency_key text, p_field text default 'prompt'
) returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_params jsonb := coalesce(p_params, '{}');
  v_max_bytes integer;
  v_max_chars integer;
begin
  select s.max_params_bytes, s.max_prompt_chars into v_max_bytes, v_max_chars
  from private.settings as s;
  if jsonb_typeof(v_params) = 'string' and pg_column_size(v_params) <= 2 * v_max_bytes then
    begin
      v_params := (v_params #>> '{}')::jsonb;
    exception
      when invalid_text_representation or untranslatable_character or numeric_value_out_of_range
        or statement_too_complex then
        v_params := 'null';
    end;
  end if;
  -- Measured before anything is written out: in memory no JSON has more than eight times the bytes
  -- of its text, and what has less than 500 holds too few numbers to come to much. 1e131071 is
  -- eight bytes on the way in, sixteen here, and 131 kB once it is written, 0e-16383 likewise. No
  -- schema has a use for one.
  if pg_column_size(v_params) between 500 and 8 * v_max_bytes and exists (
    select from jsonb_path_query(v_params, 'strict $.** ? (@.type() == "number")') as n (value)
    where abs(n.value::numeric) >= 1e400 or scale(n.value::numeric) > 400
  ) then
    perform private.refuse_input('params: a number of more than 400 digits');
  elsif pg_column_size(v_params) > 8 * v_max_bytes
    or octet_length(v_params::text) > v_max_bytes then
    perform private.refuse_input(format('params: longer than %s bytes', v_max_bytes));
  elsif jsonb_typeof(v_params) <> 'object' then
    perform private.refuse_input(
      'params: not a JSON object', 'Send an object such as {"seed": 7}, or leave it out.'
    );
  elsif octet_length(p_idempotency_key) not between 1 and 200 then
    perform private.refuse_input(
      'idempotency_key: not 1 to 200 bytes', 'Use a UUID made on the device.'
    );
  end if;
  for v_at in 1 .. cardinality(p_prompts) loop
    -- Bytes first: counting the characters of a hundred megabytes is work for nothing.
    if octet_length(p_prompts[v_at]) > 4 * v_max_chars
      or length(p_prompts[v_at]) > v_max_chars then
      perform private.refuse_input(
        format(p_field || ': longer than %2$s characters', v_at - 1, v_max_chars)
      );
    end if;
  end loop;
  return v_params;
end;
$$;

create view private.queue_floor with (security_invoker = true) as
select c.last_value - 100000 as fair_key from private.virtual_clock as c;  -- 100 credits, weight 1

comment on view private.queue_floor is
  'The fair_key a scan of the queue may start at: what is queued below is rare, and found by a '
  'full scan at least once a second.';

create view private.live_jobs with (security_invoker = true) as
select
  r.job_id,
  r.user_id
from private.ready_jobs as r
union all
select
  r.job_id,
  r.user_id
from private.running_jobs as r;

comment on view private.live_jobs is
  'Jobs that are queued or running. A user''s are counted when asked for: a count kept in a row of '
  'the user is written at every end of a job, and while a long transaction holds back vacuum, each '
  'write walks all the versions before it.';

-- The plan of a user now: paid or free.
create function private.plan_of(p_entitlement public.entitlements) returns private.plans
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return (select p from private.plans as p where p.name = case
    when p_entitlement.paid_until > now() then 'paid' else 'free'
  end);
end;
$$;

create type private.gate as (
  user_id uuid,
  credits integer,
  last_fair_key bigint,
  plan text,
  weight integer,
  max_active integer,
  max_batch integer,
  may_be_over_limits boolean,
  is_model_unclear boolean,
  model public.models
);

comment on type private.gate is
  'What a request is held against: the user''s balance and plan, the model, and whether there is '
  'anything to look at more closely. See private.gate().';

-- All that a request of this user for this model is held against, with the entitlement locked. From
-- here on the user's requests take turns, and what a later statement counts is sure until the end.
--
-- oldest_ready_at is renewed twice a minute, or not at all while nothing runs. Nothing that is
-- ready now can have been so before the oldest that was ready then, nor, if there was none, before
-- then. So it never hides that the queue is busy; where it may be, the queue itself is looked at.
--
-- The lock is taken apart, for who waits for it may be paid when it comes, and so has another plan.
--
-- Raises: PT401 not_authenticated.
create function private.gate(p_user_id uuid, p_model text) returns private.gate
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_gate private.gate;
begin
  select
    e.user_id, e.credits, e.last_fair_key, p.name, p.weight, p.max_active, p.max_batch,
    -- A minute or a day that is over, too: refuse_limits looks closer.
    e.minute_jobs >= p.max_per_minute or e.day_burned >= p.max_burned_per_day
    or e.day_jobs >= p.max_per_minute::bigint * p.full_minutes_per_day
    or least(p.oldest_ready_at, p.looked_at) < now() - p.busy_after,
    m.id is null or (m.requires_paid and p.name <> 'paid') or exists (
      select from private.breakers as b
      where b.paused_until > now() or e.user_id = any (b.failed_users || b.doubted_users)
    ),
    m
  into v_gate
  from (select * from public.entitlements where user_id = p_user_id for update) as e
  inner join private.plans as p
    on p.name = case when e.paid_until > now() then 'paid' else 'free' end
  left join public.models as m on m.id = p_model and m.is_active;
  if not found then
    perform private.refuse_unknown_user();
  end if;
  return v_gate;
end;
$$;

-- The model of this name, or the one that an alias of this name stands for, if this user may use
-- it.
--
-- Weighted rendezvous hashing: each arm of an alias draws a number that depends on nothing but user
-- and arm, and the smallest wins. So a user stays with an arm, and a change of weights moves as few
-- as possible. A paused arm is passed over while another is not.
--
-- Raises: PT404 not_found, PT403 requires_paid_plan, PT503 model_paused.
create function private.require_model(p_gate private.gate, p_name text) returns public.models
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_model public.models := p_gate.model;
  v_paused_until timestamptz;
begin
  if v_model.id is null then
    select m.* into v_model
    from public.model_aliases as a
    inner join public.models as m on m.id = a.model_id
    cross join lateral (
      select
        ('x' || left(md5(concat_ws(' ', p_gate.user_id, a.id, m.id)), 12))::bit(48)::bigint as n
    ) as drawn
    where a.id = p_name and a.weight > 0 and m.is_active
      and (p_gate.plan = 'paid' or not m.requires_paid)
    order by
      private.paused_until(m, p_gate.user_id) is not null,
      -ln((drawn.n + 1) / 281474976710657.0) / a.weight
    limit 1;
  end if;
  if v_model.id is null then
    perform private.refuse_missing('model: no such model', 'list_models() names them.');
  elsif v_model.requires_paid and p_gate.plan <> 'paid' then
    perform private.refuse(
      'requires_paid_plan', format('%s is for paid users', v_model.id),
      'Choose another model or a paid plan.'
    );
  end if;
  v_paused_until := private.paused_until(v_model, p_gate.user_id);
  if v_paused_until is not null then
    perform private.refuse(
      'model_paused', format('%s is paused', v_model.id), p_retry_after => ceil(
        extract(epoch from least(v_paused_until, now() + interval '1 hour') - now())
      )::integer
    );
  end if;
  return v_model;
end;
$$;

-- Whether a job has waited this long though its user has nothing running. Who has, waits for his
-- own: one user's long queue is old, but no reason to refuse others, who go before it. Looked for
-- among the next jobs in fair order: whoever has waited for a first job is there.
create function private.is_busy(p_plan private.plans) returns boolean
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  if least(p_plan.oldest_ready_at, p_plan.looked_at) < now() - p_plan.busy_after then
    return exists (
      select from (
        select r.user_id, r.model_id, r.queued_at from private.ready_jobs as r
        where r.run_at is null and r.fair_key >= (select f.fair_key from private.queue_floor as f)
        order by r.fair_key, r.seq limit 1000
      ) as next
      where next.queued_at < now() - p_plan.busy_after
        and next.user_id not in (select r.user_id from private.running_jobs as r)
        -- Nor does it wait for us while its model is paused.
        and not exists (
          select from private.paused_models as p
          where p.id = next.model_id
            and (p.paused_until is not null or p.resumed_at > now() - p_plan.busy_after)
        )
    );
  end if;
  return false;
end;
$$;

-- Raises PT429 too_many_active, PT429 rate_limited or PT503 busy, unless one more job fits after
-- all: the queue is not as old as it seemed.
create function private.refuse_limits(p_user_id uuid) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_used public.entitlements := (
    select e from public.entitlements as e where e.user_id = p_user_id
  );
  v_plan private.plans := private.plan_of(v_used);
  v_max_per_day bigint := v_plan.max_per_minute::bigint * v_plan.full_minutes_per_day;
begin
  if v_plan.max_active <= (
    select count(*) from (
      select from private.live_jobs as j where j.user_id = p_user_id limit v_plan.max_active
    ) as live
  ) then
    perform private.refuse(
      'too_many_active',
      format('%s jobs are queued or running, the plan''s limit', v_plan.max_active),
      p_retry_after => 5
    );
  elsif v_used.minute_started_at > now() - interval '1 minute'
    and v_used.minute_jobs >= v_plan.max_per_minute then
    perform private.refuse(
      'rate_limited', format('%s jobs in this minute, the plan''s limit', v_plan.max_per_minute),
      p_retry_after => ceil(
        extract(epoch from v_used.minute_started_at + interval '1 minute' - now())
      )::integer
    );
  elsif v_used.day_started_at > now() - interval '1 day' and (
    v_used.day_jobs >= v_max_per_day or v_used.day_burned >= v_plan.max_burned_per_day
  ) then
    perform private.refuse(
      'rate_limited', format(
        '%s jobs in this day, %s of them canceled when they ran: the plan''s limits are %s and %s',
        v_used.day_jobs, v_used.day_burned, v_max_per_day, v_plan.max_burned_per_day
      ),
      p_retry_after => ceil(
        extract(epoch from v_used.day_started_at + interval '1 day' - now())
      )::integer
    );
  elsif private.is_busy(v_plan) then
    perform private.refuse('busy', 'Jobs wait too long to take in more.', p_retry_after => 60);
  end if;
end;
$$;
-- Input: do the params fit the model's schema, and what is the provider sent?
--
-- provider_inputs does all of it before any credit moves: a size in the model's own words, every
-- param held against the schema, defaults under it, the operator's own values over it, then the
-- prompt and a seed of each job. The generation keeps both what was asked (input) and what is sent
-- (provider_input).

-- Why a value does not fit a property of a schema, with what is allowed; null if it does. Beyond
-- 2^53 JSON numbers are not exact.
create function private.input_problem(p_value jsonb, p_rules jsonb) returns text
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_type text := p_rules ->> 'type';
  v_least numeric;
  v_most numeric;
  v_size numeric;
begin
  if p_value = 'null' and p_rules @> '{"nullable": true}' then
    return null;
  elsif p_rules ? 'anyOf' then
    return case when (
      select bool_and(private.input_problem(p_value, o.value) is not null)
      from jsonb_array_elements(p_rules -> 'anyOf') as o
    ) then 'none of its types: ' || left(p_rules ->> 'anyOf', 1000) end;
  elsif jsonb_typeof(p_value) is distinct from replace(v_type, 'integer', 'number')
    or (v_type = 'integer' and p_value::numeric % 1 <> 0) then
    return 'not of type ' || coalesce(v_type, 'allowed here');
  elsif p_rules ? 'enum' and not (p_rules -> 'enum') @> jsonb_build_array(p_value) then
    return 'not one of ' || left(p_rules ->> 'enum', 1000);
  elsif v_type in ('integer', 'number') then
    v_least := coalesce((p_rules ->> 'minimum')::numeric, -9007199254740991);
    v_most := coalesce((p_rules ->> 'maximum')::numeric, 9007199254740991);
    v_size := p_value::numeric;
    if v_size not between v_least and v_most then
      return format('not between %s and %s', v_least, v_most);
    elsif p_rules ?| '{exclusiveMinimum,exclusiveMaximum,multipleOf}' then
      return case
        when v_size <= (p_rules ->> 'exclusiveMinimum')::numeric
          then 'not above ' || (p_rules ->> 'exclusiveMinimum')
        when v_size >= (p_rules ->> 'exclusiveMaximum')::numeric
          then 'not below ' || (p_rules ->> 'exclusiveMaximum')
        when v_size % (p_rules ->> 'multipleOf')::numeric <> 0
          then 'not a multiple of ' || (p_rules ->> 'multipleOf')
      end;
    end if;
  elsif v_type = 'string' and p_rules ?| '{maxLength,minLength}' then
    v_size := length(p_value #>> '{}');
    return case
      when v_size > (p_rules ->> 'maxLength')::numeric
        then format('longer than %s characters', p_rules ->> 'maxLength')
      when v_size < (p_rules ->> 'minLength')::numeric
        then format('shorter than %s characters', p_rules ->> 'minLength')
    end;
  elsif v_type = 'array' then
    v_most := coalesce((p_rules ->> 'maxItems')::numeric, 16);
    v_size := jsonb_array_length(p_value);
    return case
      when v_size > v_most then format('longer than %s items', v_most)
      when v_size < (p_rules ->> 'minItems')::numeric
        then format('shorter than %s items', p_rules ->> 'minItems')
      else (
        select 'an item is ' || q.problem
        from jsonb_array_elements(p_value) with ordinality as i (value, place)
        cross join private.input_problem(i.value, p_rules -> 'items') as q (problem)
        where q.problem is not null order by i.place limit 1
      )
    end;
  end if;
  return null;
end;
$$;

-- The params with a size the model knows in place of one it does not: the nearest of its own ratios
-- or sizes (shape counts before area), or pixels of that shape, with the area of its defaults, in
-- the nearest steps it allows. What cannot be mapped stays as it is, for its schema to refuse.
create function private.map_size(p_model public.models, p_params jsonb) returns jsonb
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_properties jsonb := p_model.input_schema -> 'properties';
  v_takes_pixels boolean := p_model.client_inputs @> '{width,height}';
  v_sides numeric[] := array(
    select s.side from unnest('{width,height}'::text[]) with ordinality as n (name, place)
    cross join lateral (
      select case jsonb_typeof(p_params -> n.name) when 'number' then (p_params ->> n.name)::numeric
      end as side
    ) as s
    where s.side % 1 = 0 and s.side between 1 and 16384 order by n.place
  );
  v_ratio numeric[] := regexp_match(
    p_params ->> 'aspect_ratio', '^0*([1-9]\d{0,3}):0*([1-9]\d{0,3})$'
  )::numeric[];
  v_unknown text[] := array['aspect_ratio'];
  v_size jsonb;
begin
  if cardinality(v_sides) = 2 and not v_takes_pixels then
    v_ratio := v_sides;
    v_unknown := array['width', 'height'];
  elsif v_ratio is null or 'aspect_ratio' = any (p_model.client_inputs) then
    if cardinality(v_sides) = 2 then
      -- Some models look at pixels only when asked for a custom shape.
      select coalesce(jsonb_object_agg(c.name, 'custom'), '{}') into v_size
      from unnest('{aspect_ratio,size}'::text[]) as c (name)
      where v_properties #> array[c.name, 'enum'] @> '["custom"]';
    end if;
    return coalesce(v_size, '{}') || p_params;
  end if;
  if v_takes_pixels then
    select jsonb_object_agg(s.name, coalesce(
      (
        select e.value::numeric from jsonb_array_elements(r.rules -> 'enum') as e
        order by abs(e.value::numeric - s.pixels) limit 1
      ),
      least(
        floor(coalesce((r.rules ->> 'maximum')::numeric, 2048) / r.step) * r.step,
        greatest(
          ceil(coalesce((r.rules ->> 'minimum')::numeric, 64) / r.step) * r.step,
          round(s.pixels / r.step) * r.step
        )
      )
    )) into v_size
    from (
      select coalesce((v_properties #>> '{width,default}')::numeric, 1024)
        * coalesce((v_properties #>> '{height,default}')::numeric, 1024) as area
    ) as a
    cross join lateral (values
      ('width', sqrt(a.area * v_ratio[1] / v_ratio[2])),
      ('height', sqrt(a.area * v_ratio[2] / v_ratio[1]))
    ) as s (name, pixels)
    cross join lateral (
      -- Multiples of 64, as diffusion models like them.
      select v_properties -> s.name as rules, case
        when 64 % coalesce((v_properties #>> array[s.name, 'multipleOf'])::numeric, 1) = 0 then 64
        else (v_properties #>> array[s.name, 'multipleOf'])::numeric
      end as step
    ) as r;
  else
    select jsonb_build_object(p.name, o.option) into v_size
    from unnest('{aspect_ratio,size,image_size,resolution}'::text[])
      with ordinality as p (name, place)
    cross join jsonb_array_elements_text(
      coalesce(v_properties #> array[p.name, 'enum'], '[]')
    ) as o (option)
    cross join regexp_match(o.option, '^(\d{1,5}) ?[:x*×] ?(\d{1,5})$') as m
    where p.name = any (p_model.client_inputs) and m[1]::numeric > 0 and m[2]::numeric > 0
    order by
      p.place,
      abs(ln(m[1]::numeric / m[2]::numeric) - ln(v_ratio[1] / v_ratio[2])),
      abs(ln(m[1]::numeric * m[2]::numeric) - ln(v_ratio[1] * v_ratio[2]))
    limit 1;
  end if;
  return case when v_size is null then p_params else v_size || (p_params - v_unknown) end;
end;
$$;

-- Source images are files in bucket inputs, in the user's own folder. An address is none.
--
-- Raises: PT400 invalid_input.
create function private.check_source_images(
  p_model public.models, p_user_id uuid, p_params jsonb
) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_name text;
  v_path text;
begin
  for v_name, v_path in
    select i.name, p.path
    from unnest(p_model.image_inputs) as i (name)
    cross join jsonb_path_query(p_params -> i.name, 'lax $[*]') as v (path)
    cross join lateral (select v.path #>> '{}' as path) as p
    where v.path <> 'null'
  loop
    if v_path !~ ('^' || p_user_id || '(/[A-Za-z0-9_-][A-Za-z0-9_. -]{0,100}){1,4}$') then
      perform private.refuse_input(
        format('params.%s: not a path in your folder of bucket inputs', v_name),
        format('Upload the picture to inputs as %s/<name> and give that path.', p_user_id)
      );
    elsif to_regclass('storage.objects') is not null and not exists (
      select from storage.objects where bucket_id = 'inputs' and name = v_path
    ) then
      perform private.refuse_input(format('params.%s: no such file in bucket inputs', v_name));
    end if;
  end loop;
end;
$$;

-- There is nothing to see in a text, or no text: it is of controls, spaces, format characters,
-- fillers, variation selectors, tags and marks without a letter. By number, for what the classes of
-- a regular expression hold depends on the locale.
create function private.is_blank(p_text text) returns boolean
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  return p_text !~ (
    '[^\u0001-\u0020\u007f-\u00a0\u00ad\u0300-\u036f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891'
    '\u08e2\u115f\u1160\u1680\u17b4\u17b5\u180b-\u180f\u1ab0-\u1aff\u1dc0-\u1dff\u2000-\u200f'
    '\u2028-\u202f\u205f-\u206f\u20d0-\u20ff\u2800\u3000\u3164\ufe00-\ufe0f\ufe20-\ufe2f\ufeff'
    '\uffa0\ufff0-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f\U00016fe4'
    '\U0001bca0-\U0001bca3\U0001d159\U0001d173-\U0001d17a\U000e0000-\U000e0fff]'
  ) is not false;
end;
$$;

-- What the provider is sent for each prompt. A seed is chosen where the model has one and nobody
-- said it, so that every picture can be made again. It also marks the job: a lost create is found
-- at the provider by its input. params.reuse is ours, not the model's: see enqueue_generation (50).
-- p_field is what a refusal calls a prompt, with its place for %1$s.
--
-- Raises: PT400 invalid_input, naming the field and what is allowed.
create function private.provider_inputs(
  p_model public.models, p_user_id uuid, p_params jsonb, p_prompts text[],
  p_field text default 'prompt'
) returns jsonb[]
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_params jsonb := p_params;
  v_rules jsonb := p_model.input_schema -> 'properties';
  v_prompt_rules jsonb;
  v_name text;
  v_problem text;
  v_inputs jsonb[];
begin
  if v_params - p_model.client_inputs <> '{}' or v_params ? 'aspect_ratio'
    or v_params ?& '{width,height}' or v_params ?| p_model.image_inputs then
    if jsonb_typeof(v_params -> 'reuse') <> 'boolean' then
      perform private.refuse_input('params.reuse: not of type boolean');
    elsif v_params @> '{"reuse": true}' and not v_params ? 'seed' then
      perform private.refuse_input(
        'params.reuse: needs params.seed', 'Without a seed every picture is another one.'
      );
    end if;
    v_params := private.map_size(p_model, v_params - 'reuse');
    v_name := (
      select min(f.name) from jsonb_object_keys(v_params - p_model.client_inputs) as f (name)
    );
    if v_name is not null then
      perform private.refuse_input(
        format('params.%s: not an input of %s', left(v_name, 60), p_model.id),
        'Allowed: ' || array_to_string(p_model.client_inputs, ', ')
      );
    end if;
  end if;
  foreach v_name in array p_model.client_inputs loop
    -- A plain number, what is asked most, costs no call.
    if (case when v_params ? v_name then (
      jsonb_typeof(v_params -> v_name) = 'number' and (v_params -> v_name)::numeric % 1 = 0
      and (v_rules -> v_name) - '{default,maximum,minimum}'::text[] = '{"type": "integer"}'
      and v_params -> v_name >= v_rules -> v_name -> 'minimum'
      and v_params -> v_name <= v_rules -> v_name -> 'maximum'
    ) is not true else v_name = any (p_model.required_inputs) end) then
      v_problem := case when v_params ? v_name
        then private.input_problem(v_params -> v_name, v_rules -> v_name) else 'missing'
      end;
      if v_problem is not null then
        perform private.refuse_input(format('params.%s: %s', v_name, v_problem));
      end if;
    end if;
  end loop;
  if v_params ?| p_model.image_inputs then
    perform private.check_source_images(p_model, p_user_id, v_params);
  end if;
  v_params := p_model.default_input || v_params || p_model.operator_input;
  for v_at in 1 .. cardinality(p_prompts) loop
    if (
      p_prompts[v_at] ~ '[0-9A-Za-z]'
      and (v_rules -> p_model.prompt_input) - 'default'::text = '{"type": "string"}'
    ) is not true then
      v_prompt_rules := v_rules -> p_model.prompt_input;
      if not private.is_blank(p_prompts[v_at]) then
        v_problem := case when v_prompt_rules ?| '{anyOf,enum,maxLength,minLength}'
          then private.input_problem(to_jsonb(p_prompts[v_at]), v_prompt_rules)
        end;
      -- One that needs a picture and has a prompt of its own, an upscaler say, does without.
      elsif p_model.prompt_input is null or (
        p_model.input_schema -> 'required' ?| p_model.image_inputs
        and not p_model.input_schema -> 'required' ? p_model.prompt_input
        and v_prompt_rules ? 'default'
      ) then
        p_prompts[v_at] := null;
      else
        v_problem := 'missing or blank';
      end if;
      if v_problem is not null then
        perform private.refuse_input(format(p_field || ': %2$s', v_at - 1, v_problem));
      end if;
    end if;
    v_inputs[v_at] := v_params || case
      when p_model.prompt_input is not null and p_prompts[v_at] is not null
        then jsonb_build_object(p_model.prompt_input, p_prompts[v_at])
      else '{}'
    end || case
      when p_model.highest_seed is not null and not v_params ? 'seed'
        then jsonb_build_object('seed', p_model.lowest_seed + floor(
          random() * (p_model.highest_seed - p_model.lowest_seed + 1)
        )::bigint)
      else '{}'
    end;
  end loop;
  return v_inputs;
end;
$$;
-- Credits: grant and refund, and what a new user begins with. With the charge, in accept (50), the
-- only code that moves a balance.
--
-- Every step locks the user's entitlement row, writes one ledger entry that holds the new balance,
-- and moves the balance by the same amount, in one transaction. Give-backs are keyed by generation:
-- the unique ledger entry goes in first, and the balance moves only if it did.

-- Gives credits of a generation back; the second time does nothing.
--
-- Locks: the entitlement row.
create function private.refund_generation(
  p_user_id uuid, p_generation_id uuid, p_credits integer
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_balance integer;
begin
  select credits + p_credits into v_balance
  from public.entitlements where user_id = p_user_id for update;
  if not found then
    return;
  end if;
  insert into public.credit_ledger (user_id, generation_id, kind, amount, balance_after)
  values (p_user_id, p_generation_id, 'refund', p_credits, v_balance)
  on conflict (generation_id) where kind = 'refund' do nothing;
  if found then
    update public.entitlements set credits = v_balance where user_id = p_user_id;
  end if;
end;
$$;

-- A user's plan, balance and limits as the API shows them; null if there is no such user.
create function private.entitlement_json(p_user_id uuid) returns json
language sql stable set search_path = pg_catalog, pg_temp as $$
  select json_build_object(
    'user_id', e.user_id,
    'plan', p.name,
    'paid_until', e.paid_until,
    'credits', e.credits,
    'active_jobs', (select count(*) from private.live_jobs as j where j.user_id = p_user_id),
    'max_active', p.max_active,
    'minute_jobs', case
      when e.minute_started_at > now() - interval '1 minute' then e.minute_jobs
      else 0
    end,
    'max_per_minute', p.max_per_minute,
    'max_batch', p.max_batch,
    'is_busy', private.is_busy(p)
  )
  from public.entitlements as e
  cross join lateral private.plan_of(e) as p
  where e.user_id = p_user_id
$$;

-- Locks: the entitlement row.
create function public.grant_credits(
  user_id uuid, amount integer, kind text, external_id text
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
  v_user_id uuid := user_id;
  v_amount integer := amount;
  v_external_id text := external_id;
  v_credits integer;
  v_charged bigint;
  v_entry public.credit_ledger;
begin
  perform private.require_writable();
  if ((kind = 'grant' and v_amount > 0) or (kind = 'adjust' and v_amount <> 0)) is not true then
    perform private.refuse_input(
      'kind: grant with a positive amount, or adjust with one that is not 0'
    );
  elsif coalesce(octet_length(v_external_id) not between 1 and 200, true) then
    perform private.refuse_input(
      'external_id: not 1 to 200 bytes', 'Use the payment''s id: repeats are applied once.'
    );
  end if;
  select credits into v_credits from public.entitlements where user_id = v_user_id for update;
  if not found then
    perform private.refuse_missing('user_id: no such user', 'Use the id of auth.users.');
  end if;
  loop  -- once more where another user's grant takes the id just now
    select * into v_entry from public.credit_ledger where external_id = v_external_id;
    if v_entry.id is not null and (v_entry.user_id, v_entry.amount, v_entry.kind)
      is distinct from (v_user_id, v_amount, kind) then
      perform private.refuse(
        'idempotency_conflict', 'external_id was used for another grant',
        'Use the payment''s own id, once for each payment.'
      );
    elsif v_entry.id is not null then
      return json_build_object('credits', v_credits, 'applied', false);
    end if;
    -- Far below what an integer holds, also once what jobs under way were charged has come back: so
    -- no refund can ever overflow.
    select coalesce(sum(g.price_credits), 0) into v_charged
    from private.live_jobs as j inner join public.generations as g on g.id = j.job_id
    where j.user_id = v_user_id;
    if v_credits::bigint + v_amount not between 0 and 1000000000 - v_charged then
      perform private.refuse_input(
        format('amount: the balance is %s, and %s are in jobs under way', v_credits, v_charged)
      );
    end if;
    insert into public.credit_ledger (user_id, kind, amount, balance_after, external_id)
    values (v_user_id, kind, v_amount, v_credits + v_amount, v_external_id)
    on conflict (external_id) where external_id is not null do nothing;
    exit when found;
  end loop;
  update public.entitlements set credits = credits + v_amount where user_id = v_user_id;
  return json_build_object('credits', v_credits + v_amount, 'applied', true);
end;
$$;

comment on function public.grant_credits is
  'Adds credits to a user: kind grant (amount > 0) or adjust (either sign). The same external_id '
  'is applied once. Answers {credits, applied}. Errors: PT400 invalid_input, PT404 not_found, '
  'PT409 idempotency_conflict.';

-- Locks: the entitlement row.
create function public.set_paid(user_id uuid, paid_until timestamptz) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform private.require_writable();
  update public.entitlements as e set paid_until = set_paid.paid_until
  where e.user_id = set_paid.user_id;
  if not found then
    perform private.refuse_missing('user_id: no such user', 'Use the id of auth.users.');
  end if;
  return private.entitlement_json(user_id);
end;
$$;

comment on function public.set_paid is
  'Makes a user paid until a time (infinity: without end; null: not paid). Repeating it changes '
  'nothing. Answers the entitlement. Errors: PT404 not_found.';

-- Gives a new user an entitlement with the welcome credits.
create function private.create_entitlement(p_user_id uuid) returns void
language sql set search_path = pg_catalog, pg_temp as $$
  with created as (
    insert into public.entitlements (user_id, credits)
    select p_user_id, s.welcome_credits from private.settings as s
    on conflict (user_id) do nothing
    returning user_id, credits
  )
  insert into public.credit_ledger (user_id, kind, amount, balance_after, external_id)
  select c.user_id, 'grant', c.credits, c.credits, 'welcome:' || c.user_id
  from created as c
  where c.credits > 0
$$;

-- Definer: sign-up runs as the auth server's role, which has no rights here.
create function private.create_entitlement_of_new_user() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform private.create_entitlement(new.id);
  return null;
end;
$$;

create trigger darkroom_create_entitlement
after insert on auth.users
for each row execute function private.create_entitlement_of_new_user();
-- ETA: how many jobs are before this one, and in how many seconds it is likely to be finished.
--
-- forecast_jobs answers both from one look at the queue. It goes by what jobs of a model have taken
-- lately, from claim to end (model_stats), by the slots of the workers that live, and by how many
-- jobs have lately been put before others, as fairness does with the jobs of users who ask for
-- little. Where something of that is not known it says null, never a guess.
--
-- model_stats is written by refresh_model_stats alone, which recovery (80) calls: finishing a job
-- writes no row that others write too. What ends while a refresh runs may go uncounted.

create table private.model_stats (
  model_id text primary key,
  mean_seconds double precision not null,
  sample_count integer not null,
  requests_per_second double precision not null default 0,
  queue_distance double precision,
  refreshed_at timestamptz not null,
  constraint model_stats_samples_are_positive check (sample_count > 0)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);

comment on table private.model_stats is
  'What jobs of each model took and how often they came lately: what eta_seconds goes by.';
comment on column private.model_stats.mean_seconds is
  'Seconds from claim to end of completed attempts, a mean that forgets old ones.';
comment on column private.model_stats.queue_distance is
  'Mean of generations.queue_distance in these minutes.';

-- Takes in the attempts completed since the last time and the requests of the last five minutes.
-- A mean remembers about as many attempts as p_memory. Does nothing within 15 seconds of the last.
create function private.refresh_model_stats(
  p_memory integer default 200, p_requests integer default 2000
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_since timestamptz := coalesce(
    (select max(s.refreshed_at) from private.model_stats as s), now() - interval '1 day'
  );
begin
  if v_since > now() - interval '15 seconds' then
    return;
  end if;
  -- One session at a time: by a row's lock, for one by number could be held by anybody.
  perform from private.plans where name = 'free' for update skip locked;
  if not found then
    return;
  end if;
  insert into private.model_stats as s (model_id, mean_seconds, sample_count, refreshed_at)
  select
    a.model_id, avg(extract(epoch from a.ended_at - a.started_at)), least(count(*), p_memory), now()
  from private.attempts as a
  where a.ended_at > v_since and a.outcome = 'completed'
    and isfinite(a.started_at) and isfinite(a.ended_at)
  group by a.model_id
  on conflict (model_id) do update set
    mean_seconds = s.mean_seconds + (excluded.mean_seconds - s.mean_seconds)
      * excluded.sample_count / least(p_memory, s.sample_count + excluded.sample_count),
    sample_count = least(p_memory, s.sample_count + excluded.sample_count);
  with latest as (
    select g.model_id, g.queue_distance, g.created_at
    from public.generations as g order by g.id desc limit p_requests
  ),
  recent as (
    select
      l.model_id, count(*) as jobs, avg(l.queue_distance) as distance,
      case sum(count(*)) over ()
        when p_requests then extract(epoch from now() - min(min(l.created_at)) over ())
        else 300
      end as seconds
    from latest as l where l.created_at > now() - interval '5 minutes' group by l.model_id
  )
  update private.model_stats as s set
    requests_per_second = coalesce(
      (select r.jobs / r.seconds from recent as r where r.model_id = s.model_id), 0
    ),
    queue_distance = (select r.distance from recent as r where r.model_id = s.model_id),
    refreshed_at = now();
end;
$$;

-- In how many seconds a running job ends if it takes p_mean_seconds; below zero if it is overdue.
-- The provider's progress counts as much as the clock.
create function private.due_seconds(
  p_job private.running_jobs, p_mean_seconds double precision
) returns double precision
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_seconds double precision := date_part('epoch', now() - p_job.claimed_at);
begin
  return case
    when p_job.stage = 'storing' then 0
    when p_job.progress between 5 and 100
      then (p_mean_seconds - v_seconds + v_seconds * (100.0 / p_job.progress - 1)) / 2
    else p_mean_seconds - v_seconds
  end;
end;
$$;

create type private.forecast as (
  job_id uuid,
  queue_position integer,
  eta_seconds numeric,
  due_seconds double precision
);

-- For each of these jobs that is live: jobs that would be claimed before it, counted up to
-- p_at_most, null unless it is queued; seconds until it is likely to be finished, which for one
-- that runs are never less than a quarter of its mean, for late jobs are not done any moment; and
-- seconds until it would be if all goes as a rule, from which clients are told when to look. These
-- are null while no worker lives, for a model of which nothing was completed yet, while it is
-- paused without end or tried with a probe, and behind more jobs than are counted. A model that was
-- never measured counts like the mean of all.
--
-- The queue is looked at once, as far as the last of these jobs. Few are queued below the floor
-- (30). They are not counted, so that nobody walks what was claimed while vacuum is held back.
-- Without sorting: a plan made while the queue was empty would else read and sort all of it once it
-- is long.
create function private.forecast_jobs(
  p_job_ids uuid[], p_at_most integer default 1000
) returns private.forecast[]
language plpgsql stable set search_path = pg_catalog, pg_temp
set enable_sort = off set jit = off as $$
declare
  v_queued private.ready_jobs[] := array(
    select q.job from (
      select r as job from private.ready_jobs as r where r.job_id = any (p_job_ids) offset 0
    ) as q order by (q.job).fair_key desc, (q.job).seq desc
  );
  v_forecasts private.forecast[];
  v_keys bigint[];  -- of the queue, in its order
  v_seqs bigint[];
  v_lengths double precision[];
  v_begins double precision[];  -- when the first of them begins, the second, and one behind all
  v_slots double precision[];  -- in how many seconds each is free, soonest first
  v_count integer;
  v_place integer;
  v_seconds double precision;
begin
  if cardinality(v_queued) < cardinality(p_job_ids) then
    v_forecasts := array(
      select row(
        r.job_id, null, round(greatest(0.25 * s.mean_seconds, due.seconds)::numeric, 1), due.seconds
      )::private.forecast
      from private.running_jobs as r
      left join private.model_stats as s on s.model_id = r.model_id
      cross join lateral private.due_seconds(r, s.mean_seconds) as due (seconds)
      where r.job_id = any (p_job_ids)
    );
  end if;
  if v_queued = '{}' then
    return v_forecasts;
  end if;
  select
    coalesce(array_agg(q.fair_key), '{}'), coalesce(array_agg(q.seq), '{}'),
    coalesce(array_agg(q.seconds), '{}')
  into v_keys, v_seqs, v_lengths
  from (
    select r.fair_key, r.seq, coalesce(
      s.mean_seconds, (select avg(a.mean_seconds) from private.model_stats as a)
    ) as seconds
    from private.ready_jobs as r
    left join private.model_stats as s on s.model_id = r.model_id
    where r.run_at is null and r.fair_key >= (select f.fair_key from private.queue_floor as f)
      and (r.fair_key, r.seq) < (v_queued[1].fair_key, v_queued[1].seq)
      and not r.model_id = any (array(
        select p.id from private.paused_models as p where p.paused_until is not null
      ))
    order by r.fair_key, r.seq limit p_at_most
  ) as q;
  select sum(w.slots)::integer into v_count
  from private.workers as w
  where w.seen_at > now() - (select s.lease from private.settings as s)
    and exists (select from private.model_stats);
  if v_count is not null and (cardinality(v_keys) < p_at_most or cardinality(v_queued) > 1) then
    v_slots := array(
      select greatest(0.25 * m.seconds, private.due_seconds(r, m.seconds))
      from private.running_jobs as r
      left join private.model_stats as s on s.model_id = r.model_id
      cross join lateral (
        select coalesce(
          s.mean_seconds, (select avg(a.mean_seconds) from private.model_stats as a)
        ) as seconds
      ) as m
      order by 1
    );
    v_slots := array_fill(0::float, array[greatest(v_count - cardinality(v_slots), 0)]) || v_slots;
    v_begins := v_slots[1:1];
    -- The first of the queue take the slot that is free first each, the rest all of them evenly.
    for v_at in 1 .. least(20, cardinality(v_lengths)) loop
      v_seconds := v_slots[1] + v_lengths[v_at];
      v_place := width_bucket(v_seconds, v_slots[2:]);
      v_slots := v_slots[2:v_place + 1] || v_seconds || v_slots[v_place + 2:];
      v_begins[v_at + 1] := v_slots[1];
    end loop;
    v_begins := v_begins || array(
      select v_slots[1] + sum(q.seconds) over (order by q.place) / cardinality(v_slots)
      from unnest(v_lengths[21:]) with ordinality as q (seconds, place)
    );
  end if;
  return v_forecasts || array(
    select row(q.job_id, p.place, round(due.seconds::numeric, 1), due.seconds)::private.forecast
    from unnest(v_queued) as q
    cross join lateral (
      select width_bucket(q.fair_key - 1, v_keys) as first, width_bucket(q.fair_key, v_keys) as last
    ) as same
    cross join lateral (
      select same.first + width_bucket(q.seq - 1, v_seqs[same.first + 1:same.last]) as place
    ) as p
    left join lateral (
      -- A share of the slots goes to jobs that come later and are put before it: at first all that
      -- are put nearer to the queue's present, ever fewer as it moves up.
      select s.mean_seconds + greatest(
        v_begins[p.place + 1] / (1 - case when v_begins[p.place + 1] > 0 then least(
          0.6, coalesce(later.slots, 0) / cardinality(v_slots)
        ) else 0 end),
        date_part('epoch', q.run_at - now()),
        date_part('epoch', pause.until - now())
      ) as seconds
      from private.model_stats as s
      cross join lateral (
        select max(b.paused_until) as until from private.breakers as b
        where b.name in (
            s.model_id, (select m.provider from public.models as m where m.id = s.model_id)
          )
          and (b.paused_until > now() or (b.paused_until is not null and b.times_opened > 0))
      ) as pause
      cross join lateral (
        select sum(
          a.requests_per_second * a.mean_seconds
          * greatest(0, 1 - a.queue_distance / greatest(q.fair_key - c.last_value, 1))
        ) as slots
        from private.model_stats as a cross join private.virtual_clock as c
      ) as later
      where s.model_id = q.model_id and v_slots is not null and p.place < p_at_most
        and (pause.until is null or (pause.until > now() and pause.until < 'infinity'))
    ) as due on true
  );
end;
$$;

-- The same for one job; null unless it is live.
create function private.forecast(
  p_generation public.generations, p_at_most integer default 1000
) returns private.forecast
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  if p_generation.finished_at is null then
    return (private.forecast_jobs(array[p_generation.id], p_at_most))[1];
  end if;
  return null;
end;
$$;

-- How long a client should wait before it reads the state of an active job again, between one and
-- ten seconds. Two fifths of what is left until the job is due, so that it asks more often as the
-- end comes near; a thirtieth of its age at least, for one that is overdue may be so for long.
-- Where nobody knows when it is due, half of its age. So a job of a minute is read some ten times,
-- and seen within two seconds of its end if it takes what its model takes.
create function private.poll_after_ms(
  p_created_at timestamptz, p_due_seconds double precision default null
) returns integer
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_age double precision := date_part('epoch', now() - p_created_at);
begin
  return least(10000, greatest(
    1000,
    p_due_seconds * 400,
    v_age * case when p_due_seconds is null then 500 else 1000 / 30.0 end
  ))::integer;
end;
$$;
-- The one way in: gate, charge, and enqueue in one transaction, or nothing at all.
--
-- Each way in, this and those of 52 and 54, locks the entitlement first (gate, 30), and accept()
-- writes for all of them: the entitlement, and new rows. All other functions lock running or ready
-- row -> generation -> entitlement, so none of them can wait for another in a circle. The lock also
-- serialises one user's requests: limits, balance and idempotency key are read and written without
-- a race.

-- Wakes sleeping workers, as many as there is work for: those heard of last, which are least likely
-- dead.
--
-- NOTIFY serialises commits over the whole instance, so it is sent only when somebody sleeps. A
-- worker another transaction is waking is skipped. A wake-up that falls between is made good by the
-- worker, which claims again after it went to sleep.
create function private.wake_workers(p_at_most integer default 1) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_worker_id bigint;
begin
  for v_worker_id in
    update private.workers set asleep = false
    where id = any (array(
      select w.id from private.workers as w
      where w.asleep and w.seen_at > now() - (select s.lease from private.settings as s)
      order by w.seen_at desc limit p_at_most for update skip locked
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
-- Raises: PT400 invalid_input, PT402 insufficient_credits, PT429 too_many_active, PT429
-- rate_limited, PT503 busy.
create function private.accept(
  p_gate private.gate, p_name text, p_params jsonb, p_prompts text[], p_inputs jsonb[],
  p_idempotency_key text default null, p_batch_id uuid default null, p_retry_of uuid default null,
  p_is_free boolean default false
) returns json
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_model public.models := p_gate.model;
  v_jobs integer := cardinality(p_inputs);
  v_images numeric := case jsonb_typeof(p_inputs[1] -> v_model.image_count_input)
    when 'number' then (p_inputs[1] -> v_model.image_count_input)::numeric  -- the same in each
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
    perform private.refuse_limits(p_gate.user_id);
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
      perform private.refuse_limits(p_gate.user_id);
    end if;
    if v_images not between 1 and v_model.max_images then
      perform private.refuse_input(format(
        'params.%s: not between 1 and %s', v_model.image_count_input, v_model.max_images
      ));
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
  if coalesce(p_batch_id, p_retry_of) is not null then
    update public.batches set job_ids = v_ids where id = p_batch_id;
    insert into private.retries (retry_of, generation_id)
    select p_retry_of, v_ids[1] where p_retry_of is not null;
  end if;
  if v_is_anybody_asleep then
    perform private.wake_workers(v_jobs);
  end if;
  return json_build_object(
    'job_id', v_ids[1],
    'status', 'queued',
    'reused', false,
    'credits_left', p_gate.credits - v_price * v_jobs,
    'queue_position', null,
    'eta_seconds', null,
    'poll_after_ms', 1000
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
  p_model text, p_prompt text, p_params jsonb, p_idempotency_key text
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
  return private.accept(v_gate, p_model, v_params, v_prompts, v_inputs, p_idempotency_key);
end;
$$;
-- Batch: many prompts in one call, all or nothing.
--
-- enqueue_batch writes one generation for each prompt, each charged by an entry of its own, under
-- one lock of the entitlement. It is let in whole while there is room for one job more, up to the
-- plan's max_batch. Fairness needs no rule of its own: the jobs of a batch have fair keys behind
-- one another, so others' jobs go between them.

-- A batch as the API shows it: the jobs that are not deleted. Raises: PT404 not_found if all are.
create function private.batch_json(p_batch public.batches) returns json
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_answer json;
begin
  select json_build_object(
    'batch_id', p_batch.id,
    'job_ids', coalesce(json_agg(g.id order by g.id), '[]'),
    'status', case when bool_or(g.finished_at is null) then 'active' else 'finished' end,
    'queued', count(*) filter (where g.status = 'queued'),
    'processing', count(*) filter (where g.status = 'processing'),
    'completed', count(*) filter (where g.status = 'completed'),
    'failed', count(*) filter (where g.status = 'failed'),
    'canceled', count(*) filter (where g.status = 'canceled'),
    'progress', coalesce(
      round(sum(case when g.finished_at is null then r.progress else 100 end) / count(*)), 0
    ),
    'credits_left', (
      select e.credits from public.entitlements as e where e.user_id = p_batch.user_id
    ),
    'poll_after_ms', case when bool_or(g.finished_at is null)
      then private.poll_after_ms(p_batch.created_at)
    end,
    'created_at', p_batch.created_at
  ) into v_answer
  from unnest(p_batch.job_ids) as j (id)
  cross join lateral (
    select * from public.generations where id = j.id and deleted_at is null offset 0
  ) as g
  left join private.running_jobs as r on r.job_id = g.id
  having count(*) > 0;
  if v_answer is null then
    perform private.refuse_missing(
      'batch_id: its jobs were deleted',
      'restore_generation brings them back. Use a new key for a new request.'
    );
  end if;
  return v_answer;
end;
$$;

-- Locks: the entitlement row.
-- Raises: see the comment on public.enqueue_batch.
create function private.enqueue_batch(
  p_model text, p_prompts text[], p_params jsonb, p_idempotency_key text
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
declare
  v_user_id uuid := private.require_user_id(p_writes => true);
  v_prompts text[];
  v_params jsonb;
  v_gate private.gate;
  v_hash text;
  v_batch public.batches;
begin
  -- 100: the most that any plan may allow.
  if coalesce(cardinality(p_prompts) not between 1 and 100, true) or array_ndims(p_prompts) > 1 then
    perform private.refuse_input('prompts: not 1 to 100 texts');
  end if;
  v_prompts := array(select coalesce(p.prompt, '') from unnest(p_prompts) as p (prompt));
  v_params := private.read_request(v_prompts, p_params, p_idempotency_key, 'prompts[%1$s]');
  if v_params ? 'reuse' then
    perform private.refuse_input('params.reuse: not in a batch');
  end if;
  -- No model has a longer name, and JSON may be six times as long as the text it holds.
  v_hash := md5(jsonb_build_array(left(p_model, 200), p_prompts, v_params)::text);
  v_gate := private.gate(v_user_id, p_model);
  select * into v_batch from public.batches
  where user_id = v_user_id and idempotency_key = p_idempotency_key;
  if v_batch.request_hash <> v_hash then
    perform private.refuse(
      'idempotency_conflict', 'idempotency_key was used with another payload',
      'Use a new key for a new request.'
    );
  elsif v_batch.id is null then
    if cardinality(p_prompts) > v_gate.max_batch then
      perform private.refuse_input(format('prompts: not 1 to %s texts', v_gate.max_batch));
    elsif v_gate.is_model_unclear then
      v_gate.model := private.require_model(v_gate, p_model);
    end if;
    insert into public.batches (user_id, request_hash, idempotency_key)
    values (v_user_id, v_hash, p_idempotency_key)
    returning * into v_batch;
    perform private.accept(
      v_gate, p_model, v_params, v_prompts,
      private.provider_inputs(
        v_gate.model, v_user_id, v_params, v_prompts, 'prompts[%1$s]'
      ),
      p_batch_id => v_batch.id
    );
    select * into v_batch from public.batches where id = v_batch.id;
  end if;
  return private.batch_json(v_batch);
end;
$$;

-- The user's batch. Raises: PT404 not_found.
create function private.require_batch(p_batch_id uuid, p_user_id uuid) returns public.batches
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_batch public.batches;
begin
  select * into v_batch from public.batches where id = p_batch_id and user_id = p_user_id;
  if not found then
    perform private.require_known_user_id();
    perform private.refuse_missing(
      'batch_id: no such batch of yours',
      'Use the batch_id that enqueue_batch answered.'
    );
  end if;
  return v_batch;
end;
$$;

-- Raises: PT401 not_authenticated, PT404 not_found.
create function private.get_batch_status(p_batch_id uuid) returns json
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select private.batch_json(private.require_batch(p_batch_id, private.require_user_id()))
$$;
-- Again: a failed or canceled generation as a new one.
--
-- retry_generation is the user's and is charged as any request; redrive_failed is the operator's,
-- after an outage, and is free. Either way the old generation stays what it was, so each is
-- charged once or refunded once, and retry_of says where the new one comes from. While that one is
-- under way or done, a further retry answers with it: a double tap buys once. A generation and its
-- retries, and theirs, are the tries of one wish, of which an operator gives one picture.

-- Locks: the entitlement row.
-- Raises: see the comment on public.retry_generation.
create function private.retry_generation(p_job_id uuid) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
declare
  v_user_id uuid := private.require_user_id(p_writes => true);
  v_old public.generations := private.require_generation(p_job_id, v_user_id);
  v_gate private.gate := private.gate(v_user_id, v_old.model_id);
  v_known public.generations;
begin
  if v_old.finished_at is null then
    perform private.refuse(
      'not_finished', format('the job is %s', v_old.status),
      'Wait for its end, or cancel it first.'
    );
  elsif v_old.status = 'completed' then
    perform private.refuse('already_finished', 'the job is completed', 'Enqueue a new one.');
  end if;
  select g.* into v_known
  from private.retries as r inner join public.generations as g on g.id = r.generation_id
  where r.retry_of = p_job_id and g.status not in ('failed', 'canceled') and g.deleted_at is null
  order by g.id limit 1;
  if found then
    return private.known_answer(v_known, v_gate.credits);
  end if;
  if v_gate.is_model_unclear then
    v_gate.model := private.require_model(v_gate, v_old.model_id);
  end if;
  return private.accept(
    v_gate, coalesce(v_old.alias_id, v_old.model_id), v_old.input, array[v_old.prompt],
    private.provider_inputs(v_gate.model, v_user_id, v_old.input, array[v_old.prompt]),
    p_retry_of => p_job_id
  );
end;
$$;

-- What a user wished for, each wish with all its tries: the last of them that is not deleted, the
-- price of one, whether none is under way or done, and since when one is that was free.
--
-- Each try is reached by its key, whatever the planner thinks of how many there are.
create function private.wishes_of(p_user_id uuid)
returns table (last_id uuid, price_credits integer, is_open boolean, given_at timestamptz)
language sql stable set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off as $$
  with recursive tries as (
    select
      g.id as wish_id, g.id, g.retry_of, g.price_credits, g.created_at, g.deleted_at,
      g.status in ('failed', 'canceled') as is_lost
    from public.generations as g
    where g.user_id = p_user_id
      and not exists (select from public.generations as o where o.id = g.retry_of)
    union all
    select
      t.wish_id, g.id, g.retry_of, g.price_credits, g.created_at, g.deleted_at,
      g.status in ('failed', 'canceled')
    from tries as t
    inner join private.retries as r on r.retry_of = t.id
    inner join public.generations as g on g.id = r.generation_id
  )
  select
    (array_agg(t.id order by t.id desc) filter (where t.deleted_at is null))[1],
    max(t.price_credits),
    bool_and(t.is_lost),
    min(t.created_at) filter (
      where not t.is_lost and t.price_credits = 0 and t.retry_of is not null
    )
  from tries as t
  group by t.wish_id
$$;

-- Queues one failed generation again, free, with what was sent before, as far as the model still
-- takes that. A pause is no reason against it: the job waits.
--
-- Locks: the entitlement row.
-- Raises: PT400 invalid_input, PT401 not_authenticated, PT403 requires_paid_plan, PT404 not_found.
create function private.redrive_generation(p_old public.generations) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_gate private.gate := private.gate(p_old.user_id, p_old.model_id);
  v_seed jsonb := p_old.provider_input -> 'seed';
  v_inputs jsonb[];
begin
  if (v_gate.model).id is null then
    perform private.refuse_missing('model: not active', 'Activate it.');
  elsif (v_gate.model).requires_paid and v_gate.plan <> 'paid' then
    perform private.refuse('requires_paid_plan', 'model: for paid users');
  end if;
  v_inputs := private.provider_inputs(
    v_gate.model, p_old.user_id, p_old.input, array[p_old.prompt]
  );
  if v_seed is not null and private.input_problem(
    v_seed, (v_gate.model).input_schema #> '{properties,seed}'
  ) is null then
    v_inputs[1] := v_inputs[1] || jsonb_build_object('seed', v_seed);
  end if;
  perform private.accept(
    v_gate, coalesce(p_old.alias_id, p_old.model_id), p_old.input, array[p_old.prompt], v_inputs,
    p_retry_of => p_old.id, p_is_free => true
  );
end;
$$;

-- Users in order, so that two runs lock in the same order; and each
-- user's wishes are read once nobody else can add a try.
--
-- What is given is free, for the failed tries were refunded: so it may cost no more than the user
-- has, or failures at the same credits would each become a picture. What was given since the same
-- time counts.
--
-- Locks: the users' entitlement rows.
create function public.redrive_failed(
  code text, since timestamptz, at_most integer default 1000
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid;
  v_credits bigint;
  v_wish record;
  v_redriven integer := 0;
  v_reason text;
  v_skipped jsonb := '{}'::jsonb;
begin
  perform private.require_writable();
  if not exists (select from private.error_codes as c where c.code = redrive_failed.code) then
    perform private.refuse_input('code: not a code of private.error_codes');
  elsif since is null or coalesce(at_most not between 1 and 10000, true) then
    perform private.refuse_input('since: missing, or at_most: not between 1 and 10000');
  end if;
  <<users>>
  for v_user_id in
    select distinct g.user_id from public.generations as g
    where g.status = 'failed' and g.error_code = redrive_failed.code and g.finished_at >= since
      and g.deleted_at is null
    order by g.user_id
  loop
    select e.credits into v_credits
    from public.entitlements as e where e.user_id = v_user_id for update;
    v_credits := v_credits - (
      select coalesce(sum(w.price_credits), 0) from private.wishes_of(v_user_id) as w
      where w.given_at >= since
    );
    for v_wish in
      select g as last, w.price_credits as price
      from private.wishes_of(v_user_id) as w
      inner join public.generations as g on g.id = w.last_id
      where w.is_open and g.status = 'failed' and g.error_code = redrive_failed.code
        and g.finished_at >= since
      order by g.id
    loop
      exit users when v_redriven = at_most;
      begin
        v_reason := 'insufficient_credits';
        if v_wish.price <= v_credits is not false then
          perform private.redrive_generation(v_wish.last);
          v_reason := null;
        end if;
      exception
        -- One that fits no more must not stop all others.
        when others then
          v_reason := case when sqlstate like 'PT%' then sqlerrm else 'internal' end;
          if v_reason = 'internal' then
            raise warning 'redrive_failed: %: % %', (v_wish.last).id, sqlstate, sqlerrm
              using errcode = '01000';
          end if;
      end;
      if v_reason is null then
        v_redriven := v_redriven + 1;
        v_credits := v_credits - v_wish.price;
      else
        v_skipped := v_skipped
          || jsonb_build_object(v_reason, coalesce((v_skipped ->> v_reason)::integer, 0) + 1);
      end if;
    end loop;
  end loop;
  return json_strip_nulls(
    json_build_object('redriven', v_redriven, 'skipped', nullif(v_skipped, '{}'))
  );
end;
$$;

comment on function public.redrive_failed is
  'Queues again what failed with a code since a time, free, with the same input: of each wish the '
  'last try, unless one is under way or done, and for each user no more than the credits at hand '
  'would buy. Answers {redriven, skipped: {reason: count} if any}; reasons are '
  'insufficient_credits, those of retry_generation, and internal. Call again while redriven is '
  'at_most. It reads the whole history: an operator''s tool. Errors: PT400 invalid_input.';
-- Hooks: what the core asks its optional parts, here answered as where none is installed.
--
-- A part (95, 96) replaces the answers that are its own. For all else it needs nothing in the core:
-- a job's end, a deletion and a user's leaving reach it by triggers of its own on generations and
-- entitlements, and what it keeps for a time goes by a step of retention (85), which is a row.
-- Columns of our own tables that only a part sets (is_favorite, tags, share_id, shows_prompt) are
-- theirs from the beginning, and false, empty or null without it.

-- The user's generations with a tag: see list_generations (62).
create function private.walk_tag(
  p_user_id uuid, p_tag text, p_before uuid, p_at_most integer
) returns uuid[]
language sql immutable set search_path = pg_catalog, pg_temp
return '{}'::uuid[];

-- What workers ask when they look for something to tell (96).
create function private.due_lanes() returns setof text
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select null::text where false
$$;

comment on function private.due_lanes is 'Lanes of the outbox that have something to send now.';

create function private.claim_receipts(p_at_most integer)
returns table (delivery_id uuid, ticket text)
language sql security definer set search_path = pg_catalog, pg_temp as $$
  select null::uuid, null::text where false
$$;

comment on function private.claim_receipts is
  'Tickets of pushes that Expo took a quarter of an hour ago or more, and whose receipt was not '
  'read yet; a quarter of an hour later they are answered again.';

-- See queue_health().
create function private.outbox_health() returns jsonb
language sql stable set search_path = pg_catalog, pg_temp
return '{}'::jsonb;
-- What users may read through the API: ping, one job, all active jobs, the plan, the catalogue.
--
-- All of it is STABLE, so GET works and repeats are harmless. Polling get_job_status is the
-- contract; Realtime (65) is only a hint to poll sooner.

-- These jobs as the API shows them, newest first: all of them, or those of a user that are not
-- deleted. One statement for all, for each costs its start, and the queue is looked at once, if
-- there is a live one among them. Progress is read from the running row: it is not history.
create function private.jobs_json(p_ids uuid[], p_user_id uuid default null) returns json[]
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return (
    select array_agg(json_build_object(
      'job_id', j.id,
      'status', j.status,
      'stage', (j.running).stage,
      'progress', (j.running).progress,
      'attempt', case when j.finished_at is null then coalesce(
        (j.running).attempt,
        (select r.attempt from private.ready_jobs as r where r.job_id = j.id)
      ) end,
      'cancel_requested', coalesce((j.running).cancel_requested, false),
      'queue_position', (j.forecast).queue_position,
      'eta_seconds', (j.forecast).eta_seconds,
      'poll_after_ms', case when j.finished_at is null then
        private.poll_after_ms(j.created_at, (j.forecast).due_seconds) end,
      'model', j.model_id,
      'alias', j.alias_id,
      'batch_id', j.batch_id,
      'retry_of', j.retry_of,
      'idempotency_key', j.idempotency_key,
      'prompt', j.prompt,
      'params', j.input,
      'price_credits', j.price_credits,
      'refunded_credits', coalesce((
        select l.amount from public.credit_ledger as l
        where l.generation_id = j.id and l.kind = 'refund'
      ), 0),
      'error', case when j.error_code is not null then
        json_build_object('code', j.error_code, 'message', j.error_message) end,
      'images', coalesce((
        select json_agg(json_build_object(
          'position', i.position, 'path', i.storage_path, 'preview_path', i.preview_path,
          'content_type', i.content_type,
          'width', i.width, 'height', i.height, 'bytes', i.bytes, 'blurhash', i.blurhash,
          'is_public', i.share_id is not null
        ) order by i.position)
        from public.images as i where i.generation_id = j.id
      ), '[]'),
      'is_favorite', j.is_favorite,
      'tags', j.tags,
      'created_at', j.created_at,
      'started_at', j.started_at,
      'finished_at', j.finished_at
    ) order by j.id desc)
    from (
      select
        g.*,
        case when g.finished_at is null then (
          select r from private.running_jobs as r where r.job_id = g.id
        ) end as running,
        case when g.finished_at is null then (
          select f from unnest(private.forecast_jobs(p_ids)) as f where f.job_id = g.id
        ) end as forecast
      -- Not any (p_ids), which would look into all partitions.
      from (select distinct unnest(p_ids) as id) as i
      cross join lateral (
        select h.* from public.generations as h where h.id = i.id offset 0
      ) as g
      where (p_user_id is null or (g.user_id = p_user_id and g.deleted_at is null))
      offset 0  -- else what is looked up once is looked up for each of its fields
    ) as j
  );
end;
$$;

create function private.job_json(p_generation public.generations) returns json
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return (private.jobs_json(array[p_generation.id]))[1];
end;
$$;

-- Raises: PT401 not_authenticated, PT404 not_found.
create function private.get_job_status(p_job_id uuid) returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
declare
  v_job json := (private.jobs_json(array[p_job_id], private.require_user_id()))[1];
begin
  if v_job is null then
    perform private.refuse_unknown_job();
  end if;
  return v_job;
end;
$$;

-- Raises: PT400 invalid_input, PT401 not_authenticated.
create function private.list_active_jobs(p_job_ids uuid[]) returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
declare
  v_user_id uuid := private.require_known_user_id();
  v_ids uuid[];
begin
  if cardinality(p_job_ids) > 100 or array_ndims(p_job_ids) > 1 then
    perform private.refuse_input('job_ids: not a list of at most 100');
  end if;
  v_ids := array(select j.job_id from private.live_jobs as j where j.user_id = v_user_id);
  return coalesce(array_to_json(private.jobs_json(v_ids || p_job_ids, v_user_id)), '[]');
end;
$$;

-- Raises: PT401 not_authenticated.
create function private.get_entitlement() returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_entitlement json := private.entitlement_json(private.require_user_id());
begin
  if v_entitlement is null then
    perform private.refuse_unknown_user();
  end if;
  return v_entitlement;
end;
$$;

create function private.list_models() returns json
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select coalesce(json_agg(json_build_object(
    'id', m.id,
    'title', m.title,
    'price_credits', m.price_credits,
    'paid_price_credits', m.paid_price_credits,
    'requires_paid', m.requires_paid,
    'paused_until', private.paused_until(m, auth.uid()),
    'max_images', m.max_images,
    'inputs', (
      select coalesce(json_object_agg(p.key, p.value order by p.key), '{}')
      from jsonb_each(m.input_schema -> 'properties') as p
      where p.key = any (m.client_inputs)
    ),
    'image_inputs', array(
      select i.name from unnest(m.image_inputs) as i (name) where i.name = any (m.client_inputs)
    )
  ) order by m.id), '[]')
  from public.models as m
  where m.is_active
$$;
-- The history of a user, page by page.
--
-- No page costs more than a walk over 200 ids and a look at each, however long the history and rare
-- what is asked for. Ids are in the order of time, so the last one of a page is where the next
-- begins, whatever was added or deleted meanwhile.

-- A tag as it is kept: lower case, single spaces, one way to write an accent.
--
-- Raises: PT400 invalid_input.
create function private.read_tag(p_field text, p_tag text) returns text
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_tag text;
begin
  if octet_length(p_tag) <= 800 then
    v_tag := normalize(lower(btrim(regexp_replace(p_tag, '\s+', ' ', 'g'))), nfc);
  end if;
  if private.is_blank(v_tag) or length(v_tag) > 50 then
    perform private.refuse_input(p_field || ': not 1 to 50 characters');
  end if;
  return v_tag;
end;
$$;

-- Raises PT400 invalid_input unless a page may have so many entries.
create function private.check_page_size(p_page_size integer) returns void
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  if (p_page_size between 1 and 100) is not true then
    perform private.refuse_input('page_size: not between 1 and 100');
  end if;
end;
$$;

-- What the walk names and the page leaves out (deleted, of another status) is passed over; the next
-- page begins where the walk or the page ended.
--
-- Raises: PT400 invalid_input, PT401 not_authenticated.
create function private.list_generations(
  p_before uuid, p_page_size integer, p_only_favorites boolean, p_tag text, p_status text
) returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
declare
  c_walk constant integer := 200;
  v_user_id uuid := private.require_known_user_id();
  v_before uuid := coalesce(p_before, 'ffffffff-ffff-ffff-ffff-ffffffffffff');
  v_tag text := case when p_tag is not null then private.read_tag('tag', p_tag) end;
  v_ids uuid[];
  v_page uuid[];
  v_last_id uuid;
begin
  perform private.check_page_size(p_page_size);
  if p_status not in ('queued', 'processing', 'completed', 'failed', 'canceled') then
    perform private.refuse_input(
      'status: not one of queued, processing, completed, failed, canceled'
    );
  end if;
  -- The ids, newest first, in the order of an index.
  if v_tag is not null then
    v_ids := private.walk_tag(v_user_id, v_tag, v_before, c_walk);
  elsif p_only_favorites then
    v_ids := array(
      select g.id from public.generations as g
      where g.user_id = v_user_id and g.is_favorite and g.id < v_before
      order by g.id desc limit c_walk
    );
  else
    v_ids := array(
      select g.id from public.generations as g
      where g.user_id = v_user_id and g.id < v_before
      order by g.id desc limit c_walk
    );
  end if;
  -- Those that are to be shown, by their key, until the page is full.
  v_page := array(
    select walk.id
    from (
      select w.* from unnest(v_ids) with ordinality as w (id, place) order by w.place
    ) as walk
    cross join lateral (
      select from public.generations as g
      where g.id = walk.id and g.deleted_at is null
        and (p_only_favorites is not true or g.is_favorite)
        and (p_status is null or g.status = p_status)
      limit 1
    ) as found
    order by walk.place limit p_page_size
  );
  v_last_id := case cardinality(v_page)
    when p_page_size then v_page[p_page_size]
    else v_ids[cardinality(v_ids)]
  end;
  return json_build_object(
    'generations', coalesce(array_to_json(private.jobs_json(v_page, v_user_id)), '[]'),
    'next_before', case
      when v_last_id <> v_ids[cardinality(v_ids)] or cardinality(v_ids) = c_walk then v_last_id
    end
  );
end;
$$;
-- Realtime: a hint that something changed, never the contract. Skipped where Supabase Realtime is
-- not.
--
-- Each new state of a generation is broadcast on its user's private topic user:<user id>, where
-- nobody else can listen and no client can send. Clients then read, as they would polling. A hint
-- may be lost, but fails no job and holds none up: realtime.send turns its errors (no partition for
-- today, say) into warnings.
--
-- Where nobody has ever listened, Realtime has made no partition, and each hint is a warning in
-- PostgreSQL's log: settings.broadcasts = false sends none.
--
-- For clients that use postgres_changes, generations is in the publication, with all its columns.
-- A list of columns would protect nothing: Realtime decodes with wal2json, which asks publications
-- for no columns, and then gives each subscriber the columns its role may select, of the rows it
-- may see. But with a list every update of a job would fail once somebody sets the table's replica
-- identity to full, for old_record. What RLS cannot hide is a deleted row: that it is gone, and its
-- id, reach all who subscribe without a filter.

-- Sends with the rights of Darkroom's owner: whatever changes a state is security definer. Realtime
-- locks its table while it adds or drops a partition; a hint does not wait for that.
create function private.broadcast_generation() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp
set lock_timeout = '50ms' as $$
begin
  if not (select s.broadcasts from private.settings as s) then
    return null;
  end if;
  perform realtime.send(
    jsonb_build_object('job_id', new.id, 'status', new.status),
    'generation',
    'user:' || new.user_id,
    true
  );
  return null;
exception
  -- The schema is Supabase's: it may go or close one day, and jobs go on.
  when undefined_function or invalid_schema_name or insufficient_privilege then
    raise warning 'Darkroom: not broadcast: %', sqlerrm using errcode = '01000';
    return null;
end;
$$;

-- On Supabase neither table nor publication need be ours: supautils.policy_grants lets postgres,
-- and no other role, make policies on realtime.messages, but not comment on them.
do $$
begin
  if to_regprocedure('realtime.send(jsonb, text, text, boolean)') is null
    or to_regprocedure('realtime.topic()') is null or to_regclass('realtime.messages') is null then
    raise notice 'Darkroom: no % here; broadcasts are skipped, clients poll',
      case when to_regnamespace('realtime') is null then 'schema realtime'
        else 'realtime.send, realtime.topic or realtime.messages' end;
    return;
  end if;
  create trigger generations_broadcast_insert after insert on public.generations
  for each row execute function private.broadcast_generation();
  create trigger generations_broadcast_status after update of status on public.generations
  for each row when (old.status is distinct from new.status)
  execute function private.broadcast_generation();
  begin
    -- Realtime asks when a client joins: it writes one message of each extension on the topic,
    -- looks which of them the client sees, and rolls back.
    create policy "Users receive hints about their own jobs" on realtime.messages
    for select to authenticated using (
      extension = 'broadcast'
      and topic = (select realtime.topic())
      and topic = 'user:' || (select auth.uid())::text
    );
  exception when insufficient_privilege then
    raise notice 'Darkroom: no right to make policies on realtime.messages; until the one in '
      'sql/65_realtime.sql is made in the SQL editor, clients cannot join and poll';
  end;
  begin
    if exists (select from pg_catalog.pg_publication where pubname = 'supabase_realtime')
      and not exists (
        select from pg_catalog.pg_publication_tables
        where pubname = 'supabase_realtime'
          and schemaname = 'public' and tablename = 'generations'
      ) then
      alter publication supabase_realtime add table public.generations;
    end if;
  exception when insufficient_privilege then
    raise notice 'Darkroom: no right to change publication supabase_realtime; postgres_changes '
      'will not tell of generations';
  end;
end;
$$;
-- A worker's own life: register, sleep, heartbeat, progress, unregister.
--
-- darkroom_worker may execute what 92 grants it and nothing else. A claim (72) hands out a token;
-- every later call matches (job, token), and where that row is gone the call changes nothing and
-- raises DR001. An attempt ends in 75.
--
-- What every job needs is called for many at once, with arrays of the same length, and answers one
-- row for each job whose lease holds: one without a row has lost it, which is no other's concern. A
-- token belongs to one claim of one job, so whoever names it holds that lease.
--
-- Lock order: running or ready rows in order of id, then generation, then entitlement. A function
-- that takes several rows in one statement forbids every plan but the walk of their index: that is
-- in the order of the index, and a table full of dead rows costs it nothing. Plans are made once in
-- a session, and without jit, which takes such a ban for an expensive plan.

-- Raises DR001 lease_lost.
create function private.refuse_lost_lease(p_job_id uuid) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  raise sqlstate 'DR001' using message = 'lease_lost', detail = format('job %s', p_job_id);
end;
$$;

create function private.register_worker(p_host text, p_slots integer, p_version text)
returns table (worker_id bigint, channel text, heartbeat_seconds real, lease_seconds real)
language sql security definer set search_path = pg_catalog, pg_temp as $$
  with registered as (
    insert into private.workers (host, slots, version)
    values (left(p_host, 200), p_slots, left(p_version, 50))
    returning id
  )
  select
    r.id,
    'darkroom_worker_' || r.id,
    extract(epoch from s.heartbeat)::real,
    extract(epoch from s.lease)::real
  from registered as r
  cross join private.settings as s
$$;

comment on function private.register_worker is
  'Enters a worker process. Answers its id, the channel to LISTEN on, and the intervals in '
  'seconds.';

create function private.unregister_worker(p_worker_id bigint) returns void
language sql security definer set search_path = pg_catalog, pg_temp as $$
  delete from private.workers where id = p_worker_id
$$;

comment on function private.unregister_worker is
  'Takes a worker that stops off the list, so that nobody tries to wake it.';

create function private.sleep(p_worker_id bigint) returns void
language sql security definer set search_path = pg_catalog, pg_temp as $$
  update private.workers set asleep = true where id = p_worker_id and not asleep
$$;

comment on function private.sleep is
  'Says that the worker found nothing and waits for NOTIFY. It must claim once more after this '
  'commits, and again a moment later: an enqueue in flight may have seen it awake.';

create function private.heartbeat(
  p_worker_id bigint, p_job_ids uuid[], p_tokens bigint[], p_progress smallint[],
  p_is_listening boolean default true
) returns table (job_id uuid, verdict text)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
begin
  update private.workers set seen_at = now(), is_listening = p_is_listening
  where id = p_worker_id;
  update private.running_jobs as r set
    lease_until = now() + s.lease,
    progress = case
      when p_progress[array_position(p_tokens, r.token)] is null then r.progress
      else least(100, greatest(0, p_progress[array_position(p_tokens, r.token)]))
    end
  from private.settings as s
  where r.job_id = any (p_job_ids) and r.token = any (p_tokens);
  -- A new look, for the first may have waited.
  return query
  select j.id, case
    when held.is_canceled is false then 'ok'
    -- Where even the generation is gone, no other worker stops what was bought.
    when held.is_canceled is null
      and exists (select from public.generations as g where g.id = j.id) then 'lost'
    else 'canceled'
  end
  from unnest(p_job_ids) with ordinality as j (id, place)
  cross join lateral (
    select (
      select r.cancel_requested from private.running_jobs as r
      where r.job_id = j.id and r.token = p_tokens[j.place]
    ) as is_canceled
  ) as held
  order by j.id, j.place;
end;
$$;

comment on function private.heartbeat is
  'One beat for all jobs of a worker: extends their leases and takes in progress (percent or '
  'null), and whether its LISTEN works. Answers for each job, in order of id: ok, lost (drop it) '
  'or canceled (stop it: its user wants that, or is gone).';

create function private.report_progress(
  p_job_ids uuid[], p_tokens bigint[], p_stages text[], p_progress smallint[]
) returns table (token bigint, verdict text)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
declare
  v_reported integer;
begin
  return query
  update private.running_jobs as r set
    stage = p_stages[array_position(p_tokens, r.token)],
    progress = case
      when p_progress[array_position(p_tokens, r.token)] is null then r.progress
      else least(100, greatest(0, p_progress[array_position(p_tokens, r.token)]))
    end
  where r.job_id = any (p_job_ids) and r.token = any (p_tokens) and not r.cancel_requested
  returning r.token, 'ok';
  get diagnostics v_reported = row_count;
  if v_reported < cardinality(p_tokens) then
    return query
    select r.token, 'canceled' from private.running_jobs as r
    where r.job_id = any (p_job_ids) and r.token = any (p_tokens) and r.cancel_requested;
  end if;
end;
$$;

comment on function private.report_progress is
  'Says at once what the next heartbeat would: stage (generating | storing) and percent or null. '
  'Answers each job whose lease holds: ok, or canceled (stop it).';
-- Claim: the next jobs in fair order move from ready_jobs to running_jobs.
--
-- claim_jobs locks the jobs with the smallest fair_key that nobody else is claiming (skip locked),
-- and moves them in one statement. While a breaker (28) is open, it has them chosen with care by
-- pick_admitted_jobs. No claim waits for a lock.

-- While a long transaction holds back vacuum, a look at a whole table of the queue walks the dead
-- rows of all jobs since. So one session looks for all: a sequence holds, in milliseconds since
-- 1970, when the next may. A time more than a minute ahead, left by a clock that was wrong, is not
-- believed.
create function private.is_due(p_due regclass, p_patience integer default 0) returns boolean
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_now double precision := 1000 * extract(epoch from clock_timestamp());
begin
  return coalesce(
    pg_sequence_last_value(p_due) not between v_now - p_patience and v_now + 60000, true
  );
end;
$$;

-- Such looks take a fiftieth of the time, but come once in ten seconds at least. One that took a
-- moment puts nothing off.
create function private.put_off(p_due regclass, p_began timestamptz) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_now double precision := extract(epoch from clock_timestamp());
  v_pause double precision := 50 * (v_now - extract(epoch from p_began));
begin
  if v_pause < 0.5 then
    v_pause := 0;
  end if;
  perform setval(p_due, (1000 * (v_now + least(v_pause, 10)))::bigint);
end;
$$;

-- What keeps jobs of a model back: whether nothing does; whether all wait; whether the pause is
-- over; and who failed, at model or provider, and at the provider.
create function private.gate_of(
  p_model_id text, p_provider text, out is_open boolean, out is_shut boolean, out is_over boolean,
  out failed_users uuid[], out failed_at_provider uuid[]
)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select
    count(*) = 0,
    coalesce(bool_or(private.admits(b, null) is false), false),
    bool_and(private.admits(b, null) is true),
    array(
      select unnest(f.failed_users) from private.breakers as f
      where f.name in (p_model_id, p_provider) and f.times_opened > 0
    ),
    array(
      select unnest(f.failed_users) from private.breakers as f
      where f.name = p_provider and f.times_opened > 0
    )
  from private.breakers as b
  where b.name in (p_model_id, p_provider) and private.breaker_state(b) <> 'closed'
$$;

-- Locks the next jobs that may run now while something is paused, and answers their ids: of each
-- model that is not, the next; of one that can be tried, one job of a user who has not failed;
-- after the pause, where there is no such job, one of a user who has.
--
-- Reads an index by model instead of the one in fair order, so that a pile of jobs that wait is
-- never walked. A range of models, though of one: else the index in fair order might be.
create function private.pick_admitted_jobs(p_at_most integer) returns uuid[]
language plpgsql set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
declare
  v_began timestamptz := clock_timestamp();
  v_from bigint := 0;
  v_breaker private.breakers;
  v_own uuid[];
  v_ids uuid[];
begin
  -- Operators' pauses that are over.
  update private.breakers set paused_until = null, pause_reason = null, resumed_at = now()
  where name = any (array(
    select b.name from private.breakers as b
    where b.paused_until <= now() and b.times_opened = 0 for update skip locked
  ));
  if not found and not private.is_due('private.scan_due') then
    select c.last_value into v_from from private.virtual_clock as c;
  end if;
  v_ids := array(
    select r.job_id from private.ready_jobs as r
    where r.run_at is null and r.job_id = any (array(
      -- From model to model through the index.
      with recursive waiting as (
        (
          select r.model_id from private.ready_jobs as r
          where r.run_at is null order by r.model_id limit 1
        )
        union all
        select (
          select r.model_id from private.ready_jobs as r
          where r.run_at is null and r.model_id > w.model_id order by r.model_id limit 1
        )
        from waiting as w where w.model_id is not null
      )
      select c.job_id from (
        select
          next.job_id,
          next.has_failed,
          bool_and(next.has_failed) over (partition by w.model_id) as all_of_model,
          next.failed_at_provider,
          bool_and(next.failed_at_provider) over (partition by m.provider) as all_of_provider
        from waiting as w
        left join public.models as m on m.id = w.model_id
        cross join lateral private.gate_of(w.model_id, m.provider) as gate
        cross join lateral (
          (
            select r.job_id, false as has_failed, false as failed_at_provider
            from private.ready_jobs as r
            where r.run_at is null and r.model_id between w.model_id and w.model_id
              and r.fair_key >= v_from and not r.user_id = any (gate.failed_users)
            order by r.model_id, r.fair_key, r.seq
            limit case when gate.is_open then p_at_most else 1 end
          )
          union all
          (
            select
              r.job_id, r.user_id = any (gate.failed_users),
              r.user_id = any (gate.failed_at_provider)
            from private.ready_jobs as r
            where r.run_at is null and r.model_id between w.model_id and w.model_id
              and r.fair_key >= v_from and gate.is_over
            order by r.model_id, r.fair_key, r.seq limit 1
          )
        ) as next
        where w.model_id is not null and not gate.is_shut
      ) as c
      where (c.all_of_model or not c.has_failed) and (c.all_of_provider or not c.failed_at_provider)
    ))
    order by r.fair_key, r.seq limit p_at_most for update skip locked
  );
  if v_from = 0 then
    perform private.put_off('private.scan_due', v_began);
  end if;
  -- Of each breaker that is not closed one job may go, as its probe. Providers first: their one job
  -- may be that of a model, too.
  for v_breaker in
    select b.* from private.breakers as b where b.times_opened > 0
    order by position('/' in b.name) > 0, b.name
  loop
    v_own := array(
      select r.job_id from private.ready_jobs as r
      left join public.models as m on m.id = r.model_id
      where r.job_id = any (v_ids) and v_breaker.name in (r.model_id, m.provider)
      order by r.user_id = any (v_breaker.failed_users), array_position(v_ids, r.job_id)
    );
    continue when v_own = '{}';
    perform from private.breakers
    where name = v_breaker.name and times_opened > 0 for update skip locked;
    if found then
      -- A new look, now that nobody else can begin one.
      update private.breakers as b set probe_job_id = r.job_id
      from private.ready_jobs as r
      where b.name = v_breaker.name and r.job_id = v_own[1] and private.admits(b, r.user_id);
    end if;
    if found then
      v_own := v_own[2:];
    end if;
    v_ids := array(
      select s.job_id from unnest(v_ids) with ordinality as s (job_id, place)
      where not s.job_id = any (v_own) order by s.place
    );
  end loop;
  return v_ids;
end;
$$;

-- While vacuum is held back, the index in fair order begins with every job claimed since. So most
-- claims read it from the virtual clock on. What came to lie below is found by who finds too few
-- there, and by one claim in half a second: unless that look has become dear.
--
-- Every row is reached by its key, whatever the planner thinks of the tables' sizes.
-- Outer joins: a job whose model somebody deleted must fail at the worker, not vanish here.
create function private.claim_jobs(p_worker_id bigint, p_slots integer)
returns table (
  job_id uuid, user_id uuid, token bigint, attempt smallint, provider text, provider_ref text,
  provider_input jsonb, provider_job_id text, image_inputs text[], image_count smallint,
  deadline_seconds real, begun_before timestamptz
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
declare
  v_from bigint := 0;
  v_began timestamptz;
  v_ids uuid[];
begin
  -- Delayed jobs whose time has come.
  if exists (select from private.ready_jobs as r where r.run_at <= now()) then
    update private.ready_jobs set run_at = null, queued_at = now()
    where job_id = any (array(
      select r.job_id from private.ready_jobs as r
      where r.run_at <= now() order by r.run_at limit p_slots for update skip locked
    ));
  end if;
  if exists (select from private.breakers as b where b.paused_until is not null) then
    v_ids := private.pick_admitted_jobs(p_slots);
  else
    if not private.is_due('private.scan_due', 500) then
      select c.last_value into v_from from private.virtual_clock as c;
    end if;
    loop
      v_began := clock_timestamp();
      v_ids := array(
        select r.job_id from private.ready_jobs as r
        where r.run_at is null and r.fair_key >= v_from
        order by r.fair_key, r.seq limit p_slots for update skip locked
      );
      if v_from = 0 then
        perform private.put_off('private.scan_due', v_began);
        exit;
      end if;
      exit when cardinality(v_ids) = p_slots or not private.is_due('private.scan_due');
      v_from := 0;
    end loop;
  end if;
  if v_ids = '{}' then
    return;
  end if;
  update private.workers set asleep = false where id = p_worker_id and asleep;
  perform setval('private.virtual_clock', greatest(c.last_value, r.fair_key))
  from private.virtual_clock as c cross join private.ready_jobs as r
  where r.job_id = v_ids[cardinality(v_ids)];
  return query
  with claimed as (
    delete from private.ready_jobs as r where r.job_id = any (v_ids) returning r.*
  ),
  running as (
    insert into private.running_jobs as r (
      job_id, user_id, model_id, token, worker_id, attempt,
      lease_until, deadline_at, provider_job_id, create_started_at, input_sha256
    )
    select
      c.job_id, c.user_id, c.model_id, nextval('private.lease_tokens'), p_worker_id, c.attempt + 1,
      now() + st.lease, now() + coalesce(m.deadline, st.lease), c.provider_job_id,
      coalesce(c.create_started_at, now()), c.input_sha256
    from claimed as c cross join private.settings as st
    left join public.models as m on m.id = c.model_id
    order by c.fair_key, c.seq
    returning r.*
  ),
  started as (
    update public.generations as g set
      status = 'processing', started_at = coalesce(g.started_at, now()), updated_at = now()
    where g.id = any (array(select r.job_id from running as r))
    returning g.id, g.provider_input, g.image_count
  )
  select
    r.job_id, r.user_id, r.token, r.attempt, m.provider, m.provider_ref, s.provider_input,
    r.provider_job_id, m.image_inputs, s.image_count::smallint,
    extract(epoch from m.deadline)::real, nullif(r.create_started_at, now())
  from running as r
  inner join started as s on s.id = r.job_id
  left join public.models as m on m.id = r.model_id
  order by r.token;
end;
$$;

comment on function private.claim_jobs is
  'Moves up to p_slots jobs in fair order from ready to running and answers them. provider_job_id'
  ' is set where an earlier attempt already bought something at the provider: resume it; else '
  'begun_before, where one may have: look for it before creating again. Seconds are durations.';
-- Purchase: what a worker says about its dealings with the provider, so that nothing is bought
-- twice, and what was bought for one job never becomes another's.
--
-- Creating a job at the provider costs money and cannot be repeated safely. So a claim (72) counts
-- as the begin of it, and checkpoint_jobs is called the moment the provider's id is known. A worker
-- that dies between the two leaves create_started_at behind: the next attempt looks at the provider
-- for what may have been bought and takes it over with adopt_provider_job. What it finds is proven
-- by the whole input. Where that has addresses of sources, which nobody can know again,
-- begin_creates saves its hash beforehand, for recall_create. A worker that asks later than at once
-- proves with begin_creates, too, that no other has begun to look. A refused account pauses the
-- provider (28).
--
-- Whoever puts a provider's id into purchases has it, and nobody else ever.

create function private.begin_creates(
  p_job_ids uuid[], p_tokens bigint[], p_inputs bytea[] default null
) returns table (token bigint, create_started_at timestamptz)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
begin
  return query
  update private.running_jobs as r
  set input_sha256 = coalesce(p_inputs[array_position(p_tokens, r.token)], r.input_sha256)
  where r.job_id = any (p_job_ids) and r.token = any (p_tokens)
  returning r.token, r.create_started_at;
end;
$$;

comment on function private.begin_creates is
  'Called before the provider is asked to create these jobs, where seconds have passed since their '
  'claim, or where the input has addresses of sources: p_inputs are its SHA-256 then, else null. '
  'Answers each whose lease holds, and since when something may have been bought for it.';

create function private.recall_create(p_job_id uuid, p_token bigint)
returns table (create_started_at timestamptz, input_sha256 bytea)
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
begin
  return query
  select r.create_started_at, r.input_sha256 from private.running_jobs as r
  where r.job_id = p_job_id and r.token = p_token;
  if not found then
    perform private.refuse_lost_lease(p_job_id);
  end if;
end;
$$;

comment on function private.recall_create is
  'Since when something may have been bought for a job, and the SHA-256 that begin_creates saved '
  'last. Errors: DR001 lease_lost.';

create function private.checkpoint_jobs(
  p_job_ids uuid[], p_tokens bigint[], p_provider_job_ids text[]
) returns table (token bigint, verdict text)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
begin
  return query
  with saved as (
    update private.running_jobs as r
    set provider_job_id = p_provider_job_ids[array_position(p_tokens, r.token)]
    where r.job_id = any (p_job_ids) and r.token = any (p_tokens)
    returning r.token, r.job_id, r.provider_job_id
  ),
  bought as (
    insert into private.purchases (generation_id, provider_job_id)
    select s.job_id, s.provider_job_id from saved as s order by s.provider_job_id
    on conflict (generation_id, provider_job_id) do nothing  -- said before; another's is an error
  )
  select s.token, 'ok' from saved as s;
end;
$$;

comment on function private.checkpoint_jobs is
  'Saves the provider''s ids of jobs the moment they are known, so that no attempt buys one twice. '
  'Answers each job whose lease holds: ok. Errors, which change nothing for any of the jobs: 23505 '
  'the provider''s job is another''s.';

create function private.adopt_provider_job(
  p_job_id uuid, p_token bigint, p_candidates text[]
) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_adopted text;
begin
  select r.provider_job_id into v_adopted from private.running_jobs as r
  where r.job_id = p_job_id and r.token = p_token for update;
  if not found then
    perform private.refuse_lost_lease(p_job_id);
  elsif v_adopted is not null then
    return v_adopted;  -- the answer to the first call was lost
  end if;
  foreach v_adopted in array p_candidates loop
    insert into private.purchases (generation_id, provider_job_id)
    values (p_job_id, v_adopted) on conflict do nothing;
    if found then
      update private.running_jobs set provider_job_id = v_adopted where job_id = p_job_id;
      return v_adopted;
    end if;
  end loop;
  return null;
end;
$$;

comment on function private.adopt_provider_job is
  'Checkpoints the first of these provider ids, oldest first, that no job has had, and answers it; '
  'null if there is none. For creates whose answer was lost. Errors: DR001 lease_lost.';
-- How an attempt ends: complete_jobs, fail_jobs, release_job, cancel_job, and the two steps that
-- cancel (77) and recovery (80) share with them.
--
-- Whoever deletes the running row has the right to settle. What follows is one of two: end_jobs
-- ends the job for good, as completed, failed or canceled, or requeue_job puts it back into the
-- queue. Either leaves one row in attempts for the claim that has ended.

-- Deletes the running rows that these tokens hold and answers them in order of id.
create function private.end_leases(
  p_job_ids uuid[], p_tokens bigint[]
) returns private.running_jobs[]
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_jobs private.running_jobs[];
begin
  with ended as (
    delete from private.running_jobs as r
    where r.job_id = any (p_job_ids) and r.token = any (p_tokens)
    returning r as job
  )
  select array_agg(e.job order by (e.job).job_id) into v_jobs from ended as e;
  return coalesce(v_jobs, '{}'::private.running_jobs[]);
end;
$$;

-- Ends the lease of one job and answers its running row. All null if the token already ended an
-- attempt in one of these ways: the call is a repeat whose first answer was lost.
--
-- Raises: DR001 lease_lost.
create function private.end_lease(
  p_job_id uuid, p_token bigint, p_outcomes text[]
) returns private.running_jobs
language plpgsql set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
declare
  v_job private.running_jobs := (private.end_leases(array[p_job_id], array[p_token]))[1];
begin
  if v_job.job_id is null and not exists (
    select from private.attempts as a
    where a.generation_id = p_job_id and a.token = p_token and a.outcome = any (p_outcomes)
  ) then
    perform private.refuse_lost_lease(p_job_id);
  end if;
  return v_job;
end;
$$;

-- Writes ended claims into the operators' history, with what each cost at the provider where that
-- is known. Whether it bills what failed or was stopped is said by is_billed.
create function private.record_attempts(
  p_jobs private.running_jobs[], p_outcome text, p_metrics jsonb[], p_code text, p_detail text
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  insert into private.attempts (
    generation_id, token, model_id, attempt, worker_id, started_at, outcome,
    error_code, error_detail, provider_job_id, provider_seconds, provider_images, cost_usd
  )
  select
    j.job_id, j.token, j.model_id, j.attempt, j.worker_id, j.claimed_at, p_outcome,
    p_code, left(p_detail, 2000), j.provider_job_id,
    t.seconds, t.images,
    case
      when p_metrics[j.ordinality] @@ '$.is_asked == false || $.is_billed == false' then 0
      when m.cost_unit = 'image' then m.cost_usd * t.images
      when m.cost_unit = 'second' then m.cost_usd * t.seconds
    end
  from unnest(p_jobs) with ordinality as j
  -- Within bounds: what a provider says of itself keeps no job from ending.
  cross join lateral (select
    case when jsonb_typeof(p_metrics[j.ordinality] -> 'provider_seconds') = 'number' then
      greatest(0, least(1000000, (p_metrics[j.ordinality] ->> 'provider_seconds')::numeric))
    end as seconds,
    case when jsonb_typeof(p_metrics[j.ordinality] -> 'images') = 'number' then
      greatest(0, least(1000000, (p_metrics[j.ordinality] ->> 'images')::numeric))
    end as images
  ) as t
  left join public.models as m on m.id = j.model_id
  where j.token is not null;
end;
$$;

-- What goes back of the price of a job that has ended: all of it, but for what was stored, and of a
-- canceled one this percentage, rounded up. Each image costs a whole number.
create function private.refund_due(
  p_status text, p_price integer, p_charged integer, p_stored integer, p_percent integer
) returns integer
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  return case p_status
    when 'completed' then p_price / p_charged * (p_charged - p_stored)
    when 'canceled' then ceil(p_price::numeric * p_percent / 100)
    else p_price
  end;
end;
$$;

-- Ends jobs for good, the one place where that is done: the generations say how, what is due goes
-- back, and the claims that ended go into history. p_metrics and p_stored, the number of images
-- that are there, are in the order of the jobs. A job that was queued has no token.
--
-- What a user cancels is burned if it was running and the provider may bill us: only the share of
-- settings.running_cancel_refund_percent goes back then, for nobody gets anything because the user
-- did not want it any more. That counts, for else it could be had without end: see check_limits
-- (30). What failed by itself was not stopped by its user, and our failures are nobody's to pay.
--
-- Locks: generations, then entitlements in order of id.
-- Raises: 22023 if of a completed job there is no image or more than were charged.
create function private.end_jobs(
  p_jobs private.running_jobs[], p_status text, p_metrics jsonb[] default '{}',
  p_stored integer[] default '{}', p_code text default null, p_detail text default null
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_ids uuid[] := array(select j.job_id from unnest(p_jobs) as j);
  v_ended record;
  v_percent integer;
begin
  for v_ended in
    with ended as (
      update public.generations as g set
        status = p_status, finished_at = now(), updated_at = now(),
        error_code = case p_status when 'failed' then p_code end,
        error_message = case p_status when 'failed' then (
          select e.message from private.error_codes as e where e.code = p_code
        ) end
      where g.id = any (v_ids)
      returning
        g.id, g.user_id, g.price_credits, g.image_count, array_position(v_ids, g.id) as place
    )
    select e.*, p_stored[e.place] as stored from ended as e
    where p_stored[e.place] is distinct from e.image_count
    order by e.user_id
  loop
    if v_ended.stored not between 1 and v_ended.image_count then
      raise exception '% images stored, % charged', v_ended.stored, v_ended.image_count using
        errcode = 'invalid_parameter_value', detail = format('job %s', v_ended.id);
    end if;
    v_percent := 100;
    if p_status = 'canceled' and p_code is null and (p_jobs[v_ended.place]).token is not null
      and p_metrics[v_ended.place] @@ '$.is_asked == false || $.is_billed == false' is not true then
      select s.running_cancel_refund_percent into v_percent from private.settings as s;
      update public.entitlements set day_burned = day_burned + 1
      where user_id = v_ended.user_id;
    end if;
    perform private.refund_generation(v_ended.user_id, v_ended.id, private.refund_due(
      p_status, v_ended.price_credits, v_ended.image_count, v_ended.stored, v_percent
    ));
  end loop;
  perform private.record_attempts(p_jobs, p_status, p_metrics, p_code, p_detail);
end;
$$;

-- Puts a job whose lease has ended back into the queue, next in line, at once or after a delay.
create function private.requeue_job(
  p_job private.running_jobs, p_outcome text, p_attempts_used integer, p_delay interval,
  p_resumes boolean, p_metrics jsonb default '{}', p_code text default null,
  p_detail text default null
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  insert into private.ready_jobs (
    job_id, user_id, model_id, fair_key, attempt, run_at,
    provider_job_id, create_started_at, input_sha256
  )
  select
    p_job.job_id, p_job.user_id, p_job.model_id, c.last_value, p_attempts_used,
    case when p_delay > interval '0' then now() + p_delay end,
    case when p_resumes then p_job.provider_job_id end,
    case when p_resumes then p_job.create_started_at end,
    case when p_resumes then p_job.input_sha256 end
  from private.virtual_clock as c;
  update public.generations set status = 'queued', updated_at = now() where id = p_job.job_id;
  perform private.record_attempts(array[p_job], p_outcome, array[p_metrics], p_code, p_detail);
  if p_delay <= interval '0' then
    perform private.wake_workers();
  end if;
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
  v_jobs private.running_jobs[] := private.end_leases(p_job_ids, p_tokens);
  v_metrics jsonb[];
  v_stored integer[];
begin
  if cardinality(v_jobs) < cardinality(p_tokens) then
    return query select a.token, 'repeated' from private.attempts as a
    where a.generation_id = any (p_job_ids) and a.token = any (p_tokens)
      and a.outcome = 'completed';
  end if;
  with ended as (
    select j.*, array_position(p_tokens, j.token) as place
    from unnest(v_jobs) with ordinality as j
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
    array_agg(p_metrics[e.place] order by e.ordinality),
    array_agg(coalesce(jsonb_array_length(p_images[e.place]), 0) order by e.ordinality)
  into v_metrics, v_stored
  from ended as e;
  perform private.end_jobs(v_jobs, 'completed', v_metrics, v_stored);
  if exists (
    select from private.breakers as b where b.failures > 0 or b.times_opened > 0
  ) then
    perform private.note_successes(v_jobs);
  end if;
  return query select j.token, 'completed' from unnest(v_jobs) as j;
end;
$$;

comment on function private.complete_jobs is
  'Ends jobs well: stores what was made and settles on it, for images that were charged but not '
  'made are given back. p_images, of each job: [{position, storage_path, preview_path, '
  'content_type, width, height, bytes, blurhash}]; p_metrics: {provider_seconds, images (as many '
  'as the provider made), is_billed (false: the provider asks nothing for it)}. Answers each job '
  'whose lease held: completed, or repeated (the call was made before). Errors, which change '
  'nothing for any of the jobs: 22023 bad images, and what breaks a constraint.';

-- How long to wait where somebody else asks for it: not less than we would by ourselves, and not
-- more than they may ask for, whatever a number they write (negative, infinite, NaN).
create function private.asked_delay(
  p_own interval, p_asked_seconds double precision, p_most_seconds integer
) returns interval
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select greatest(
    p_own, greatest(0, least(coalesce(p_asked_seconds, 0), p_most_seconds)) * interval '1 second'
  )
$$;

-- How long to wait before the next attempt: exponential backoff with full jitter, so that jobs that
-- failed together do not come back together, or longer if the provider asks for it. One that asks
-- for no pause has its way once.
create function private.retry_delay(
  p_failures_before integer, p_retry_after_seconds double precision
) returns interval
language sql set search_path = pg_catalog, pg_temp as $$
  select private.asked_delay(
    case
      when p_failures_before = 0 and p_retry_after_seconds is not null then interval '0'
      else random() * least(s.retry_cap, s.retry_base * power(2, least(p_failures_before, 20)))
    end,
    p_retry_after_seconds, 3600
  )
  from private.settings as s
$$;

-- Retries a failed attempt while it may, or fails the job for good, or cancels it if the user wants
-- that. Answers 'retried', 'failed' or 'canceled'.
create function private.end_failed_attempt(
  p_job private.running_jobs, p_code text, p_detail text,
  p_retry_after_seconds double precision default null, p_metrics jsonb default '{}'
) returns text
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_error private.error_codes;
  v_settings private.settings;
  v_attempts_used integer;
  v_detail text;
begin
  if p_job.cancel_requested then
    perform private.end_jobs(
      array[p_job], 'canceled', array[p_metrics], p_code => p_code, p_detail => p_detail
    );
    return 'canceled';
  end if;
  select * into strict v_settings from private.settings;
  -- A code that is not ours becomes internal; what came is kept in the detail.
  select * into strict v_error from private.error_codes
  where code in (p_code, 'internal') order by code = p_code desc limit 1;
  v_detail := concat_ws(': ', nullif(p_code, v_error.code), p_detail);
  v_attempts_used := p_job.attempt - case when v_error.uses_attempt then 0 else 1 end;
  if v_error.is_retryable and v_attempts_used < v_settings.max_attempts and exists (
    select from public.generations
    where id = p_job.job_id and created_at > now() - v_settings.give_up_after
  ) then
    perform private.requeue_job(
      p_job, 'retried', v_attempts_used,
      private.retry_delay(
        (select count(*)::integer from private.attempts where generation_id = p_job.job_id),
        p_retry_after_seconds
      ),
      v_error.resumes and not p_metrics @> '{"is_asked": false}',
      -- What the next attempt resumes is paid once: it will be booked there.
      case when v_error.resumes then '{}' else p_metrics end, v_error.code, v_detail
    );
    return 'retried';
  end if;
  perform private.end_jobs(
    array[p_job], 'failed', array[p_metrics], p_code => v_error.code, p_detail => v_detail
  );
  return 'failed';
end;
$$;

-- Users in order of id, so that two calls lock entitlements in the same order; and all of them
-- before any breaker.
create function private.fail_jobs(
  p_job_ids uuid[], p_tokens bigint[], p_codes text[], p_details text[],
  p_retry_after_seconds double precision[], p_metrics jsonb[]
) returns table (token bigint, verdict text)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
declare
  v_jobs private.running_jobs[] := private.end_leases(p_job_ids, p_tokens);
  v_job private.running_jobs;
  v_at integer;
begin
  if cardinality(v_jobs) < cardinality(p_tokens) then
    return query select a.token, 'repeated' from private.attempts as a
    where a.generation_id = any (p_job_ids) and a.token = any (p_tokens)
      and a.outcome in ('retried', 'failed', 'canceled');
  end if;
  foreach v_job in array array(select j from unnest(v_jobs) as j order by j.user_id, j.job_id) loop
    v_at := array_position(p_tokens, v_job.token);
    token := v_job.token;
    verdict := private.end_failed_attempt(
      v_job, p_codes[v_at], p_details[v_at], p_retry_after_seconds[v_at],
      coalesce(p_metrics[v_at], '{}')
    );
    return next;
  end loop;
  perform private.note_failures(v_jobs, array(
    select p_codes[array_position(p_tokens, j.token)]
    from unnest(v_jobs) with ordinality as j order by j.ordinality
  ));
end;
$$;

comment on function private.fail_jobs is
  'Ends attempts, each with a code of error_codes: retried while attempts remain, else failed and '
  'refunded. p_details are for operators only; p_retry_after_seconds is the provider''s own wish '
  'or null; p_metrics as complete_jobs takes them, and is_asked (false: the provider never was, so '
  'nothing can have been bought). Answers each job whose lease held: retried, '
  'failed, canceled (the user had asked for it), or repeated (the call was made before).';

create function private.release_job(
  p_job_id uuid, p_token bigint, p_resumes boolean default true
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_job private.running_jobs := private.end_lease(
    p_job_id, p_token, '{released,canceled,failed}'
  );
begin
  if v_job.cancel_requested then
    perform private.end_jobs(
      array[v_job], 'canceled',
      array[case when p_resumes then '{}'::jsonb else '{"is_asked": false}' end]
    );
  elsif exists (
    select from public.generations as g cross join private.settings as s
    where g.id = v_job.job_id and g.created_at < now() - s.give_up_after
      and s.max_attempts <= (
        select count(*) from private.attempts as a where a.generation_id = g.id
      )
  ) then
    perform private.end_jobs(array[v_job], 'failed', p_code => 'internal');
  elsif v_job.job_id is not null then
    perform private.requeue_job(v_job, 'released', v_job.attempt - 1, interval '0', p_resumes);
  end if;
end;
$$;

comment on function private.release_job is
  'Gives a job back unfinished (graceful stop, refused account): next in line, the attempt does '
  'not count, the checkpoint is kept; or canceled, if the user asked for that; or failed, if it is '
  'older than give_up_after and has been claimed more than max_attempts times. p_resumes false: '
  'nothing was bought at the provider. Errors: DR001 lease_lost.';

create function private.cancel_job(
  p_job_id uuid, p_token bigint, p_metrics jsonb default null
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_job private.running_jobs := private.end_lease(p_job_id, p_token, '{canceled}');
begin
  if v_job.cancel_requested then
    perform private.end_jobs(array[v_job], 'canceled', array[p_metrics]);
  elsif v_job.job_id is not null then
    raise exception 'nobody asked to cancel job %', p_job_id
      using errcode = 'invalid_parameter_value';
  end if;
end;
$$;

comment on function private.cancel_job is
  'Ends a job whose cancel the heartbeat told of; p_metrics as fail_jobs takes them. Repeating it '
  'changes nothing. Errors: DR001 lease_lost, 22023 nobody asked for it.';
-- Cancel: a queued job at once, a running one through its worker.
--
-- A queued job's ready row is deleted, and whoever deleted it settles. A running job is only
-- marked: its worker is told by NOTIFY and asks the heartbeat, stops the provider, and ends the
-- job with cancel_job (75). Whatever ends the attempt otherwise honours the mark too; only a
-- result that is already stored wins over it. The refund rule is in end_jobs (75).
--
-- All rows of the queue are taken before the first entitlement is, or two calls could wait for one
-- another.

-- Takes these jobs of a user out of the queue or marks them, and settles those taken out.
--
-- Locks: ready and running rows in order of id, the generations, the entitlement row.
create function private.cancel_jobs(p_user_id uuid, p_job_ids uuid[]) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_job_id uuid;
  v_worker_id bigint;
  v_job private.running_jobs;  -- without a lease
  v_taken private.running_jobs[] := array[]::private.running_jobs[];
begin
  foreach v_job_id in array array(select j.id from unnest(p_job_ids) as j (id) order by j.id) loop
    -- A job may go from ready to running, or back, between two looks.
    for v_look in 1 .. 5 loop
      delete from private.ready_jobs where job_id = v_job_id and user_id = p_user_id
      returning job_id, user_id into v_job.job_id, v_job.user_id;
      if found then
        v_taken := v_taken || v_job;
        exit;
      end if;
      update private.running_jobs set cancel_requested = true
      where job_id = v_job_id and user_id = p_user_id and not cancel_requested
      returning worker_id into v_worker_id;
      if found then
        perform pg_notify('darkroom_worker_' || v_worker_id, 'cancel');
        exit;
      end if;
    end loop;
  end loop;
  -- No attempt is under way. If an earlier one was billed, it was we who broke it off.
  perform private.end_jobs(v_taken, 'canceled');
end;
$$;

-- Raises: see the comment on public.cancel_generation.
create function private.cancel_generation(p_job_id uuid) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_user_id(p_writes => true);
  v_generation public.generations;
begin
  perform private.cancel_jobs(v_user_id, array[p_job_id]);
  v_generation := private.require_generation(p_job_id, v_user_id);
  if v_generation.status in ('completed', 'failed') then
    perform private.refuse(
      'already_finished', format('the job is %s', v_generation.status),
      'Read it with get_job_status.'
    );
  end if;
  return private.job_json(v_generation);
end;
$$;

-- Raises: PT401 not_authenticated, PT404 not_found.
create function private.cancel_batch(p_batch_id uuid) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_user_id(p_writes => true);
begin
  perform private.cancel_jobs(v_user_id, array(
    select j.job_id
    from public.batches as b inner join private.live_jobs as j on j.job_id = any (b.job_ids)
    where b.id = p_batch_id and b.user_id = v_user_id and j.user_id = v_user_id
  ));
  return private.batch_json(private.require_batch(p_batch_id, v_user_id));
end;
$$;
-- Recovery: what a dead worker left.
--
-- Two clocks end an attempt from outside. The lease runs out when the worker is silent: the job
-- goes to another worker, which resumes the checkpointed provider job. The deadline runs out when
-- the job is stuck, beats or not: it fails with timeout. pg_cron calls recover_stale_jobs every
-- minute and every worker calls it too; both may run at once.

-- Renews what plans say of the queue, at most once in ten seconds, whoever asks.
create function private.refresh_queue_state() returns void
language sql set search_path = pg_catalog, pg_temp as $$
  with due as (
    select p.name from private.plans as p
    where p.looked_at < now() - interval '10 seconds' order by p.name for update skip locked
  )
  update private.plans set
    oldest_ready_at = (
      select min(r.queued_at) from private.ready_jobs as r
      where r.run_at is null and not r.model_id = any (array(
        select p.id from private.paused_models as p where p.paused_until is not null
      ))
    ),
    looked_at = now()
  where name in (select d.name from due as d)
$$;

-- Ends the attempts of jobs that are locked, in the order given.
create function private.end_stale_jobs(p_ids uuid[]) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_id uuid;
  v_job private.running_jobs;
begin
  foreach v_id in array p_ids loop
    delete from private.running_jobs where job_id = v_id returning * into strict v_job;
    -- The lease first: after an outage both have passed, and the result may be there to fetch.
    if v_job.lease_until < now() then
      perform private.end_failed_attempt(
        v_job, 'internal', format('lease of worker %s ran out', v_job.worker_id)
      );
    else
      perform private.end_failed_attempt(v_job, 'timeout', 'deadline passed');
    end if;
  end loop;
  return cardinality(p_ids);
end;
$$;

-- Users in order of id, so that two runs lock entitlements in the same order; and all of them
-- before any breaker, those in order too.
create function private.recover_stale_jobs(p_at_most integer default 100) returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms' as $$
declare
  v_began timestamptz := clock_timestamp();
  v_stale private.running_jobs[] := '{}'::private.running_jobs[];
  v_recovered integer;
begin
  -- Reads all of running_jobs, for an index on what each heartbeat changes would cost more.
  if private.is_due('private.recovery_due') then
    v_stale := array(
      select r from private.running_jobs as r
      where r.lease_until < now() or r.deadline_at < now()
      -- Those that were skipped before take no places of others.
      order by r.user_id limit p_at_most + (select count(*) from private.skipped_rows)
      for update skip locked
    );
    perform private.put_off('private.recovery_due', v_began);
  end if;
  v_recovered := private.skip_failing(
    'select private.end_stale_jobs($1)', array(select j.job_id from unnest(v_stale) as j)
  );
  perform private.skip_failing('select private.refresh_model_stats()', array['*']);
  perform private.skip_failing(
    'select private.note_failures($1, array_fill(''timeout''::text, array[cardinality($1)]))',
    array(
      select j from unnest(v_stale) as j
      where j.lease_until >= now()
        and not exists (select from private.running_jobs as r where r.job_id = j.job_id)
    )
  );
  perform private.refresh_queue_state();
  return v_recovered;
end;
$$;

comment on function private.recover_stale_jobs is
  'Requeues or finally fails up to p_at_most jobs whose lease or deadline has passed, and renews '
  'model_stats and the state of the queue in plans. Answers how many. What cannot be done is '
  'passed over: see private.skipped_rows. Looks less often, once in ten seconds at least, while a '
  'long transaction makes each look dear.';

-- Forgets worker processes and cron runs of more than a week ago.
create function private.trim_history() returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  delete from private.workers where seen_at < now() - interval '7 days';
  delete from private.skipped_rows where last_at < now() - interval '7 days';
  if to_regclass('cron.job_run_details') is not null then
    delete from cron.job_run_details where end_time < now() - interval '7 days';
  end if;
end;
$$;

comment on function private.trim_history is
  'Housekeeping, nightly by pg_cron, which never trims its own run history.';
-- Erasure: what a user deletes, files that wait to be deleted, and what goes with a deleted user.
--
-- Deleting a generation hides it: row and files stay until they are erased (85), and until then it
-- may be restored. Rows go by SQL, files only through the Storage API, which the worker calls. So
-- each file to be deleted becomes a row of expired_files. The worker lists them, deletes the files
-- and forgets the rows, and with the last file of a generation goes the generation. All of it may
-- be repeated: whoever is killed half-way has lost nothing, for the rows say what is left to do.
--
-- Deleting a row of auth.users erases the user: a trigger takes the entitlement, whose trigger
-- marks the files and takes all rows; the ledger goes as keep_ledger_of_deleted_users says. Every
-- path that is marked lies in the user's own folder, a rule of the table. What is uploaded for a
-- user who is gone is found as an orphan (85).

create table private.expired_files (
  bucket text,
  path text,
  user_id uuid not null,
  generation_id uuid,
  marked_at timestamptz not null default now(),
  try_at timestamptz not null default now(),
  primary key (bucket, path),
  constraint expired_files_bucket_is_ours check (bucket in ('generations', 'inputs')),
  -- Also a file with the name of the folder, which Storage did not refuse once.
  constraint expired_files_path_is_the_users check (
    starts_with(concat(path, '/'), concat(user_id, '/'))
  )
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05);

comment on table private.expired_files is
  'Files the worker has to delete from Storage. Empty most of the time.';
comment on column private.expired_files.user_id is
  'Whose folder it is in; the user may be gone already.';
comment on column private.expired_files.generation_id is
  'Erased together with its last file; null: nothing waits for this file.';
comment on column private.expired_files.try_at is
  'Not before this time: a worker is at it, or was and failed.';

create index expired_files_try_at_idx on private.expired_files (try_at);
-- Read by health.
create index expired_files_marked_at_idx on private.expired_files (marked_at);
create index expired_files_generation_id_idx
on private.expired_files (generation_id) where generation_id is not null;

-- For users: delete and restore.

-- A generation of the caller's, locked against every other change.
--
-- Locks: the generation.
-- Raises: PT401 not_authenticated, PT404 not_found.
create function private.lock_own_generation(
  p_job_id uuid, p_may_be_deleted boolean default false
) returns public.generations
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_user_id(p_writes => true);
  v_generation public.generations;
begin
  select * into v_generation from public.generations
  where id = p_job_id and user_id = v_user_id and (deleted_at is null or p_may_be_deleted)
  for no key update;
  if not found then
    perform private.refuse_unknown_job();
  end if;
  return v_generation;
end;
$$;

-- Locks: the generation.
-- Raises: PT401 not_authenticated, PT404 not_found, PT409 not_finished.
create function private.delete_generation(p_job_id uuid) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_generation public.generations := private.lock_own_generation(p_job_id, true);
  v_deleted_at timestamptz := coalesce(v_generation.deleted_at, now());
begin
  if v_generation.finished_at is null then
    perform private.refuse(
      'not_finished', 'job_id: the job is ' || v_generation.status,
      'Cancel it first, with cancel_generation.'
    );
  end if;
  update public.generations set deleted_at = v_deleted_at
  where id = p_job_id and deleted_at is null;
  return json_build_object('job_id', p_job_id, 'deleted_at', v_deleted_at);
end;
$$;

-- What is being erased cannot come back: some of its files may be gone.
--
-- Locks: the generation.
-- Raises: PT401 not_authenticated, PT404 not_found.
create function private.restore_generation(p_job_id uuid) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_generation public.generations := private.lock_own_generation(p_job_id, true);
begin
  if v_generation.deleted_at is not null
    and exists (select from private.expired_files where generation_id = p_job_id) then
    perform private.refuse_unknown_job();
  end if;
  update public.generations set deleted_at = null
  where id = p_job_id and deleted_at is not null;
  return private.get_job_status(p_job_id);
end;
$$;

-- What a file is.

-- The id that is the n-th part of a path; null if that part is none.
create function private.path_id(p_path text, p_part integer) returns uuid
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select case
    when split_part(p_path, '/', p_part) ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
      then split_part(p_path, '/', p_part)::uuid
  end
$$;

-- Whether a file of bucket generations is one that a job has stored, or may still write.
create function private.is_output(p_path text) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select exists (
    select from public.images as i
    where i.generation_id = private.path_id(p_path, 2)
      and p_path in (i.storage_path, i.preview_path)
  ) or exists (select from private.live_jobs as j where j.job_id = private.path_id(p_path, 2))
$$;

-- When a file was last written, as Storage has on record; null if it is not there, or there is no
-- such record here.
create function private.file_changed_at(p_bucket text, p_path text) returns timestamptz
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  if to_regclass('storage.objects') is null then
    return null;
  end if;
  return (
    select coalesce(o.updated_at, o.created_at, '-infinity') from storage.objects as o
    where o.bucket_id = p_bucket and o.name = p_path
  );
end;
$$;

-- Marks files, each as bucket/path, and answers how many were not marked yet. In order: of two that
-- mark the same files, one waits for the other, and not each for the other.
create function private.mark_files(p_files text[]) returns integer
language sql set search_path = pg_catalog, pg_temp as $$
  with marked as (
    insert into private.expired_files (bucket, path, user_id)
    select f.bucket, f.path, private.path_id(f.path, 1)
    from unnest(p_files) as gone (name)
    cross join lateral (
      select split_part(gone.name, '/', 1), substr(gone.name, strpos(gone.name, '/') + 1)
    ) as f (bucket, path)
    order by f.path, f.bucket
    on conflict (bucket, path) do nothing
    returning 1
  )
  select count(*)::integer from marked
$$;

-- For workers.

-- What has come to be needed again since it was marked is kept: its generation was restored or its
-- job is live, or a user who is here has uploaded it anew.
create function private.list_expired_files(p_at_most integer default 100)
returns table (bucket text, path text)
language sql security definer set search_path = pg_catalog, pg_temp as $$
  with due as (
    select f.ctid, case
      when f.bucket = 'inputs' then (
        select private.file_changed_at(f.bucket, f.path) > f.marked_at
        from public.entitlements as e where e.user_id = f.user_id
      )
      when f.generation_id is null then private.is_output(f.path)
      else (select g.deleted_at is null from public.generations as g where g.id = f.generation_id)
    end as is_needed
    from private.expired_files as f
    where f.try_at <= now() order by f.try_at limit p_at_most for update skip locked
  ),
  kept as (
    delete from private.expired_files as f
    where f.ctid = any (array(select d.ctid from due as d where d.is_needed))
  )
  update private.expired_files as f
  set try_at = now() + (select s.lease from private.settings as s)
  where f.ctid = any (array(select d.ctid from due as d where d.is_needed is not true))
  returning f.bucket, f.path
$$;

comment on function private.list_expired_files is
  'Up to p_at_most files to delete from Storage. They are the caller''s for the time of a lease '
  '(settings.lease); what is not forgotten by then is listed again.';

-- Erases generations none of whose files are left, and batches none of whose generations are.
create function private.erase_generations(p_ids uuid[]) returns integer
language sql set search_path = pg_catalog, pg_temp as $$
  with erased as (
    delete from public.generations as g
    where g.id = any (p_ids) and g.finished_at is not null and g.deleted_at is not null
      and not exists (select from private.expired_files as f where f.generation_id = g.id)
    returning g.id, g.batch_id
  ),
  emptied as (
    delete from public.batches as b
    where b.id = any (array(select e.batch_id from erased as e)) and not exists (
      select from unnest(b.job_ids) as j (id) inner join public.generations as g on g.id = j.id
      where g.id <> all (array(select e.id from erased as e))
    )
  )
  select count(*)::integer from erased
$$;

-- Forgets files, each as bucket/path, that Storage has no record of, and erases generations whose
-- last ones they were. Generations are locked before files, as expire_generations (85) does.
create function private.forget(p_files text[]) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_ids uuid[] := array(
    select g.id from public.generations as g
    where g.id = any (array(
      select f.generation_id
      from unnest(p_files) as gone (name)
      inner join private.expired_files as f
        on f.bucket = split_part(gone.name, '/', 1)
        and f.path = substr(gone.name, strpos(gone.name, '/') + 1)
    ))
    order by g.id for update
  );
begin
  delete from private.expired_files as f
  using unnest(p_files) as gone (name)
  where f.bucket = split_part(gone.name, '/', 1)
    and f.path = substr(gone.name, strpos(gone.name, '/') + 1)
    and private.file_changed_at(f.bucket, f.path) is null;
  return private.erase_generations(v_ids);
end;
$$;

create function private.forget_files(p_buckets text[], p_paths text[]) returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms' as $$
begin
  perform private.skip_failing('select private.forget($1)', array(
    select concat(gone.bucket, '/', gone.path)
    from unnest(p_buckets, p_paths) as gone (bucket, path)
    inner join private.expired_files as f on f.bucket = gone.bucket and f.path = gone.path
    order by f.generation_id, gone.path
  ));
  return (
    select count(*)
    from unnest(p_buckets, p_paths) as kept (bucket, path)
    inner join private.expired_files as f on f.bucket = kept.bucket and f.path = kept.path
  );
end;
$$;

comment on function private.forget_files is
  'Says that these files are gone from Storage. A generation whose last one it was is erased with '
  'all its rows. What Storage still has on record, or cannot be erased here, is not forgotten: '
  'answers how many. Repeating it changes nothing.';

-- What goes with a generation, and with a user.

create function private.erase_images_of_generation() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  delete from public.images where generation_id = old.id;
  delete from private.retries where retry_of = old.id;
  return null;
end;
$$;

create trigger generations_erase_images after delete on public.generations
for each row execute function private.erase_images_of_generation();

-- Locks the live jobs of a user who is being deleted and then the entitlement, in the order that
-- all endings of jobs do: else those two could wait for each other. Changes nothing: whether the
-- user really goes is for other triggers to say.
--
-- Jobs in order of id, ready or running, as cancel_jobs (77) does. A job moves between the tables,
-- or is enqueued, until we hold them all. Then we let go of the entitlement and look again.
create function private.lock_jobs_of_deleted_user() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_id uuid;
  v_locked integer;
begin
  for v_look in 1 .. 20 loop
    v_locked := 0;
    for v_id in
      select j.job_id from private.live_jobs as j where j.user_id = old.id order by j.job_id
    loop
      while exists (select from private.live_jobs as j where j.job_id = v_id) loop
        perform from private.ready_jobs where job_id = v_id for update;
        if not found then
          perform from private.running_jobs where job_id = v_id for update;
        end if;
        if found then
          v_locked := v_locked + 1;
          exit;
        end if;
      end loop;
    end loop;
    begin
      perform from public.entitlements where user_id = old.id for update;
      exit when v_locked = (
        select count(*) from private.live_jobs as j where j.user_id = old.id
      );
      raise sqlstate 'DR003' using message = 'jobs_moved';
    exception when sqlstate 'DR003' then
      null;
    end;
  end loop;
  return old;
end;
$$;

create trigger darkroom_lock_jobs
before delete on auth.users
for each row execute function private.lock_jobs_of_deleted_user();

create function private.delete_entitlement_of_deleted_user() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  delete from public.entitlements where user_id = old.id;
  return null;
end;
$$;

create trigger darkroom_delete_entitlement
after delete on auth.users
for each row execute function private.delete_entitlement_of_deleted_user();

-- Erases what a user who is gone has here. First every file is marked: those of images, then what
-- else Storage has on record in the user's folder. The generations are locked before, as
-- expire_generations (85) does. Live jobs, whose rows are locked, are taken out of the queue; their
-- workers stop them at the provider.
create function private.erase_deleted_user() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_files text[];
  v_worker_id bigint;
begin
  perform from public.generations where user_id = old.user_id order by id for update;
  v_files := array(
    select concat('generations/', f.path)
    from public.images as i
    cross join lateral (values (i.storage_path), (i.preview_path)) as f (path)
    where i.user_id = old.user_id and f.path is not null
    order by f.path
  );
  if to_regclass('storage.objects') is not null then
    -- From <id>/ up to <id>0, the next character: operators that the index of names serves.
    v_files := v_files || array(
      select concat(o.bucket_id, '/', o.name)
      from storage.objects as o
      where o.name ~>=~ concat(old.user_id, '/') and o.name ~<~ concat(old.user_id, '0')
        and o.bucket_id in ('generations', 'inputs')
      order by o.name
    );
  end if;
  perform private.skip_failing('select private.mark_files($1)', v_files);
  delete from private.ready_jobs where user_id = old.user_id;
  for v_worker_id in
    delete from private.running_jobs where user_id = old.user_id returning worker_id
  loop
    perform pg_notify('darkroom_worker_' || v_worker_id, 'cancel');
  end loop;
  delete from public.generations where user_id = old.user_id;
  delete from public.batches where user_id = old.user_id;
  perform private.erase_ledgers(array[old.user_id]);
  return null;
end;
$$;

create trigger entitlements_erase_rows
after delete on public.entitlements
for each row execute function private.erase_deleted_user();
-- Retention: how long things are kept, and what has been kept long enough, found a few rows at a
-- time.
--
-- apply_retention is called every minute by pg_cron and by each worker. It takes each step that
-- retention_walks names: a function of this schema that is given its place and how many rows it may
-- look at, and answers how many it marked or erased and where it has come. A part adds its own as a
-- row. The row's lock lets one session walk at a time.
--
-- No step scans history. It goes a few rows further through an index at every call. Where it meets
-- what is too young, or the end, it starts anew: what was passed over may be due by then.

alter table private.settings
add column keep_generations interval,
add column keep_deleted interval not null default '30 days',
add column keep_inputs interval default '30 days',
add column max_input_files integer not null default 100,
add column keep_attempts interval not null default '90 days',
add column keep_ledger_of_deleted_users interval not null default '0',
add constraint settings_keep_generations_outlives_a_day check (keep_generations >= '1 day'),
add constraint settings_keep_deleted_is_not_negative check (keep_deleted >= '0'),
add constraint settings_keep_inputs_outlives_a_day check (keep_inputs >= '1 day'),
add constraint settings_keep_attempts_outlives_a_day check (keep_attempts >= '1 day'),
add constraint settings_keep_ledger_of_deleted_users_is_not_negative check (
  keep_ledger_of_deleted_users >= '0'
),
add constraint settings_max_input_files_is_not_negative check (max_input_files >= 0),
-- What is longer has no time it began at: for ever is null, where it may be said.
add constraint settings_times_are_in_reach check (
  greatest(
    keep_generations, keep_deleted, keep_inputs, keep_attempts, keep_ledger_of_deleted_users,
    lease, heartbeat, retry_base, retry_cap, give_up_after, breaker_window, breaker_pause,
    breaker_pause_cap
  ) <= '1000 years'
);

comment on column private.settings.keep_generations is
  'How long after its end a generation is kept, unless it is a favorite; null: for ever.';
comment on column private.settings.keep_deleted is
  'How long a generation that its user deleted is kept, hidden, before it is erased.';
comment on column private.settings.keep_inputs is
  'How long source images are kept after their last change; null: for ever.';
comment on column private.settings.max_input_files is
  'How many source images a user may keep in bucket inputs.';
comment on column private.settings.keep_attempts is
  'How long the attempts of finished generations are kept, with provider''s words, times and cost.';
comment on column private.settings.keep_ledger_of_deleted_users is
  'How long after it was written an entry outlives its user; 0: all go with the user.';

create table private.retention_walks (
  name text primary key,
  place text not null default '00000000-0000-0000-0000-000000000000'
);

comment on table private.retention_walks is
  'The steps of retention: functions of this schema, and how far each has come.';
comment on column private.retention_walks.place is
  'Key last looked at. The least of all ids is the beginning, of paths in our buckets too.';

-- Read by expire_deleted. The one index on a column that changes: it changes once, by the user's
-- hand, and all other updates of generations stay HOT.
create index generations_deleted_at_idx
on public.generations (deleted_at) where deleted_at is not null;

-- Takes one step, unless another session does.
create function private.take_step(p_name text, p_at_most integer) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_place text;
  v_done integer;
begin
  select w.place into v_place from private.retention_walks as w
  where w.name = p_name for update skip locked;
  if not found then
    return 0;
  end if;
  execute format('select * from private.%I($1, $2)', p_name) into v_place, v_done
  using v_place, p_at_most;
  update private.retention_walks
  set place = coalesce(v_place, '00000000-0000-0000-0000-000000000000') where name = p_name;
  return v_done;
end;
$$;

create function private.apply_retention(p_at_most integer default 500) returns integer
language sql security definer set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms' as $$
  select private.skip_failing(
    format('select sum(private.take_step(step, %s)) from unnest($1) as step', p_at_most),
    array(select w.name from private.retention_walks as w order by w.name)
  )
$$;

comment on function private.apply_retention is
  'Looks at up to p_at_most rows of each kind: marks the files of what has been kept long enough '
  'and erases what has none. Answers how many rows it marked or erased; safe from several places '
  'at once. What cannot be done is passed over: see private.skipped_rows.';

-- Which generations have been kept long enough: those that their users deleted, and old ones but
-- for favorites. Hides these of them and marks their files; those without files go at once. Answers
-- how many files and generations.
create function private.expire_generations(p_ids uuid[]) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_settings private.settings := (select s from private.settings as s);
  v_files integer;
  v_ids uuid[] := array(
    select g.id from public.generations as g
    where g.id = any (p_ids) and g.finished_at is not null and (
      g.deleted_at <= now() - v_settings.keep_deleted
      or g.finished_at <= now() - v_settings.keep_generations and not g.is_favorite
    )
    order by g.id for update skip locked
  );
begin
  update public.generations set deleted_at = now()
  where id = any (v_ids) and deleted_at is null;
  insert into private.expired_files (bucket, path, user_id, generation_id)
  select 'generations', f.path, i.user_id, i.generation_id
  from public.images as i
  cross join lateral (values (i.storage_path), (i.preview_path)) as f (path)
  where i.generation_id = any (v_ids) and f.path is not null
  order by f.path
  on conflict (bucket, path) do nothing;
  get diagnostics v_files = row_count;
  return v_files + private.erase_generations(v_ids);
end;
$$;

-- Generations their users deleted, longest ago first. Those whose files wait to be deleted, and
-- those that were skipped before, take no places of others.
create function private.expire_deleted(
  p_place text, p_at_most integer, out place text, out done integer
)
language sql set search_path = pg_catalog, pg_temp as $$
  select null, private.skip_failing('select private.expire_generations($1)', array(
    select g.id from public.generations as g
    where g.deleted_at <= now() - (select s.keep_deleted from private.settings as s)
      and g.finished_at is not null
      and not exists (select from private.expired_files as f where f.generation_id = g.id)
    order by g.deleted_at limit p_at_most + (select count(*) from private.skipped_rows)
  ))
$$;

-- Generations in order of id, which is that of time.
create function private.expire_old(
  p_place text, p_at_most integer, out place text, out done integer
)
language sql set search_path = pg_catalog, pg_temp as $$
  select
    case when count(*) = p_at_most and not bool_or(w.is_young) then max(w.id::text collate "C") end,
    private.skip_failing('select private.expire_generations($1)', array_agg(w.id))
  from (
    select g.id, g.created_at between now() - s.keep_generations and now() as is_young
    from private.settings as s
    inner join public.generations as g on g.id > p_place::uuid
    where s.keep_generations is not null order by g.id limit p_at_most
  ) as w
$$;

-- Attempts that ended longer ago than keep_attempts, of generations that are finished.
create function private.trim_attempts(
  p_place text, p_at_most integer, out place text, out done integer
)
language sql set search_path = pg_catalog, pg_temp as $$
  select
    case when count(*) = p_at_most and not bool_or(w.created_at between w.before and now())
      then max(w.generation_id::text collate "C") end,
    private.skip_failing(
      'with gone as (delete from private.attempts as a using private.settings as s'
      ' where a.generation_id = any ($1) and a.ended_at <= now() - s.keep_attempts returning 1)'
      ' select count(*) from gone',
      array_agg(distinct w.generation_id) filter (
        where w.ended_at <= w.before and w.finished_at is not null
      )
    )
  from (
    select
      a.generation_id, a.ended_at, g.created_at, g.finished_at, now() - s.keep_attempts as before
    from private.settings as s
    cross join (
      select * from private.attempts
      where generation_id > p_place::uuid order by generation_id, token limit p_at_most
    ) as a
    cross join lateral (
      select created_at, finished_at from public.generations where id = a.generation_id limit 1
    ) as g
  ) as w
$$;

-- Erases the entries of users who are gone, but for those that are to be kept longer. By the clock:
-- some may be of transactions that began after this one.
create function private.erase_ledgers(p_user_ids uuid[]) returns integer
language sql set search_path = pg_catalog, pg_temp as $$
  with erased as (
    delete from public.credit_ledger as l
    using private.settings as s
    where l.user_id = any (p_user_ids)
      and l.created_at <= clock_timestamp() - s.keep_ledger_of_deleted_users
    returning l.id
  )
  select count(*)::integer from erased
$$;

-- The ledgers of the next users, from one to the next through the index.
create function private.trim_ledger(
  p_place text, p_at_most integer, out place text, out done integer
)
language sql set search_path = pg_catalog, pg_temp as $$
  with recursive walk (user_id, step) as (
    select p_place::uuid, 0
    union all
    select (
      select l.user_id from public.credit_ledger as l
      where l.user_id > w.user_id order by l.user_id limit 1
    ), w.step + 1
    from walk as w where w.user_id is not null and w.step < p_at_most
  )
  select
    case when count(w.user_id) > p_at_most then max(w.user_id::text collate "C") end,
    private.skip_failing('select private.erase_ledgers($1)', array_agg(w.user_id) filter (
      where not exists (select from public.entitlements as e where e.user_id = w.user_id)
    ))
  from walk as w
$$;

-- Files of Storage that nothing speaks of any more, in the order of the index that serves prefixes:
-- an output without a row whose job has ended; a source image whose user is gone, or has no active
-- job and has not touched it for keep_inputs. What does not look like a file of ours is left alone.
-- Everything is given a day: an upload precedes its row, and tokens outlive their user.
create function private.expire_orphans(
  p_place text, p_at_most integer, out place text, out done integer
)
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_files text[];
begin
  if to_regclass('storage.objects') is not null then
    select
      case when count(*) >= p_at_most then max(o.name collate "C") end,
      array_agg(concat(o.bucket_id, '/', o.name)) filter (
        where o.changed_at < now() - interval '1 day' and private.path_id(o.name, 1) is not null
          and case o.bucket_id
            when 'generations' then
              private.path_id(o.name, 2) is not null and split_part(o.name, '/', 3) <> ''
              and not private.is_output(o.name)
            when 'inputs' then not exists (
              select from public.entitlements as e cross join private.settings as s
              where e.user_id = private.path_id(o.name, 1) and (
                coalesce(o.changed_at >= now() - s.keep_inputs, true)
                or exists (select from private.live_jobs as j where j.user_id = e.user_id)
              )
            )
          end
      )
    into place, v_files
    from (
      select bucket_id, name, coalesce(updated_at, created_at) as changed_at from storage.objects
      where name ~>~ p_place order by name using ~<~ fetch first p_at_most rows with ties
    ) as o;
  end if;
  done := private.skip_failing('select private.mark_files($1)', v_files);
end;
$$;
-- The books: do money and places add up?
--
-- broken_books names whatever breaks one of five rules; it is empty at every moment between
-- transactions. Read in full it reads all history. So check_books does that nightly and keeps what
-- it found, and queue_health() (88) shows that and reads the view only for what moved lately.

create view private.broken_books with (security_invoker = true) as
select
  'balance' as rule, e.user_id, null::uuid as generation_id,
  format('credits are %s, the ledger ends at %s', e.credits, coalesce(l.balance_after, 0)) as detail
from public.entitlements as e
-- Not c.user_id = e.user_id: the planner may then walk the ids of all users down to this one's.
left join lateral (
  select c.user_id, c.balance_after
  from public.credit_ledger as c
  where (c.user_id, c.id) <= (e.user_id, 9223372036854775807)
  order by c.user_id desc, c.id desc limit 1
) as l on e.user_id = l.user_id
where e.credits <> coalesce(l.balance_after, 0)
union all
select
  'ledger', l.user_id, l.generation_id,
  format('entry %s: %s and %s are not %s', l.id, l.balance_before, l.amount, l.balance_after)
from (
  select
    c.*, lag(c.balance_after, 1, 0) over (partition by c.user_id order by c.id) as balance_before
  from public.credit_ledger as c
  -- Of a user who is gone the oldest entries may be, too.
  inner join public.entitlements as e on c.user_id = e.user_id
) as l
-- As bigint: a sum that does not fit is wrong, too.
where l.balance_before::bigint + l.amount <> l.balance_after
union all
select
  'place', g.user_id, g.id,
  format('%s, and %s', g.status, case
    when ready.job_id is not null then 'ready'
    when running.job_id is not null then 'running'
    else 'neither ready nor running'
  end)
from public.generations as g
left join private.ready_jobs as ready on g.id = ready.job_id
left join private.running_jobs as running on g.id = running.job_id
where (g.status = 'queued', g.status = 'processing')
  <> (ready.job_id is not null, running.job_id is not null)
union all
select 'place', j.user_id, j.job_id, 'queued or running, and no generation of its user'
from private.live_jobs as j
left join public.generations as g on j.job_id = g.id and j.user_id = g.user_id
where g.id is null
union all
select
  'charge', g.user_id, g.id,
  format('the price is %s, charged were %s', g.price_credits, coalesce(-l.amount, 0))
from public.generations as g
left join (
  select c.generation_id, sum(c.amount) as amount
  from public.credit_ledger as c where c.kind = 'charge' group by c.generation_id
) as l on g.id = l.generation_id
where coalesce(-l.amount, 0) <> g.price_credits
union all
-- By the rule by which jobs end (75). Of a canceled one the share was a setting of that day: any
-- is right, but one there is.
select
  'refund', g.user_id, g.id,
  format('%s at the price of %s, refunded were %s', g.status, g.price_credits, l.amount)
from public.generations as g
left join public.credit_ledger as l on g.id = l.generation_id and l.kind = 'refund'
where case
  when g.status in ('queued', 'processing') then l.amount is not null
  when g.status = 'canceled'
    then coalesce(l.amount > g.price_credits, g.price_credits > 0)
  else coalesce(l.amount, 0) <> private.refund_due(
    g.status, g.price_credits, g.image_count,
    (select count(*) from public.images as i where i.generation_id = g.id)::integer, 100
  )
end;

comment on view private.broken_books is
  'Are the books right? One row for each broken rule: balance and ledger (each entry follows from '
  'the one before, the balance is the last), place (queued is ready, processing is running, and '
  'nothing else is), charge (the price, once), refund (what was charged but not made).';

-- What is broken among the users and generations that moved last.
--
-- Whatever the planner thinks: a few hundred rows, each reached by its key.
create function private.recent_broken_books(
  p_at_most integer default 200
) returns setof private.broken_books
language plpgsql stable set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off as $$
declare
  v_ids uuid[] := array(select g.id from public.generations as g order by g.id desc limit p_at_most)
    || array(
      select a.generation_id from private.attempts as a
      where a.ended_at > now() - interval '15 minutes' order by a.ended_at desc limit p_at_most
    );
begin
  return query
  select b.* from private.broken_books as b
  where b.rule = 'balance' and b.user_id = any (array(
    select g.user_id from public.generations as g where g.id = any (v_ids)
  ))
  union all
  select b.* from private.broken_books as b
  where b.rule in ('place', 'refund') and b.generation_id = any (v_ids);
end;
$$;

-- Holds all books against the rules and keeps what is broken. Answers how much that is.
create function private.check_books() returns integer
language sql set search_path = pg_catalog, pg_temp as $$
  insert into private.routines as r (name, result)
  select 'check_books', jsonb_build_object(
    'problems', count(*),
    'examples', coalesce(jsonb_agg(b.problem) filter (where b.place <= 20), '[]')
  )
  from (
    select to_jsonb(broken) as problem, row_number() over () as place
    from private.broken_books as broken
  ) as b
  on conflict (name) do update set last_run_at = excluded.last_run_at, result = excluded.result
  returning (r.result ->> 'problems')::integer
$$;

comment on function private.check_books is
  'Reads all history, nightly by pg_cron, and keeps what broken_books finds in routines.';
-- Health: what moves, held against alert_rules (17). An alert is a row there, and a line here that
-- says what is measured for it: raised while that is above the threshold. Nothing is remembered.
--
-- Each fact stands once, in a view, which is also what an operator reads who looks closer: as the
-- owner (psql, the SQL editor), for nobody is granted anything, and security_invoker keeps row
-- level security in force should somebody ever be. What more there is to ask is in 97.
--
-- Everything health reads is as small as the work in hand or the last fifteen minutes, never as
-- long as history: a monitor may call it every few seconds. It names sessions by pid and
-- application, and never shows a query, a prompt or an input; a monitor is told no ids and nobody's
-- words, which may repeat a prompt in any spelling.

-- The first id that uuid_v7 could have made at this time.
create function private.first_id_of(p_time timestamptz) returns uuid
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select rpad(lpad(to_hex((extract(epoch from p_time) * 1000)::bigint), 12, '0'), 32, '0')::uuid
$$;

create view private.paused_now with (security_invoker = true) as
select
  case when b.name like '%/%' then 'model' else 'provider' end as kind,
  b.name, b.paused_until, b.pause_reason, b.times_opened,
  cardinality(b.failed_users) as failed_users
from private.breakers as b
where b.paused_until > now();

comment on view private.paused_now is
  'Which models and providers are paused, until when, and why? times_opened 0: by an operator. '
  'failed_users: only so many users wait, others are tried; 0: everybody waits.';

-- The queue is passed once: a job costs no more than to be counted.
create view private.queue_by_model with (security_invoker = true) as
select
  n.model_id, m.provider,
  coalesce(case when not p.is_paused then q.waiting - q.delayed end, 0) as ready,
  coalesce(case when not p.is_paused then q.delayed end, 0) as delayed,
  coalesce(case when p.is_paused then q.waiting end, 0) as paused,
  coalesce(r.running, 0) as running,
  case when not p.is_paused and q.waiting > q.delayed then extract(epoch from now() - q.ready_since)
  end as oldest_ready_seconds
from (
  select
    j.model_id, count(*) as waiting, count(*) filter (where j.run_at > now()) as delayed,
    min(coalesce(j.run_at, j.queued_at)) as ready_since
  from private.ready_jobs as j group by j.model_id
) as q
full outer join (
  select j.model_id, count(*) as running from private.running_jobs as j group by j.model_id
) as r on q.model_id = r.model_id
cross join lateral (select coalesce(q.model_id, r.model_id) as model_id) as n
left join public.models as m on n.model_id = m.id
cross join lateral (
  select count(*) > 0 as is_paused
  from private.paused_now as x where x.name in (n.model_id, m.provider)
) as p
order by n.model_id;

comment on view private.queue_by_model is
  'How many jobs of each model wait or run? ready (may be claimed now), delayed (a retry that is '
  'put off), paused, running; oldest_ready_seconds: since the first of the ready may be claimed.';

create view private.running_now with (security_invoker = true) as
select
  r.job_id, r.user_id, r.model_id, r.worker_id, w.host, now() - r.claimed_at as running, r.stage,
  r.progress, r.attempt, r.provider_job_id, r.cancel_requested, r.lease_until - now() as lease_left,
  r.deadline_at - now() as deadline_left,
  greatest(now() - least(r.lease_until, r.deadline_at), '0') as stuck_for
from private.running_jobs as r
left join private.workers as w on r.worker_id = w.id
order by r.claimed_at;

comment on view private.running_now is
  'What runs now, where, for how long, and how far is it? stuck_for: its lease or its deadline has '
  'passed so long ago, and nobody has taken it back.';

create view private.worker_activity with (security_invoker = true) as
select
  w.id as worker_id, w.host, w.version, a.is_alive, w.asleep, w.is_listening, w.slots,
  coalesce(r.jobs, 0) as slots_used,
  case
    when not a.is_alive then 'silent'
    when r.jobs > 0 then 'busy'
    when w.asleep then 'asleep'
    else 'idle'
  end as state,
  round(extract(epoch from now() - w.seen_at), 1) as seen_seconds,
  round(extract(epoch from now() - w.started_at)) as up_seconds
from private.workers as w
cross join lateral (
  select w.seen_at > now() - s.lease as is_alive from private.settings as s
) as a
left join (
  select j.worker_id, count(*) as jobs from private.running_jobs as j group by j.worker_id
) as r on w.id = r.worker_id
order by a.is_alive, w.id;

comment on view private.worker_activity is
  'Which worker lives, and what does it do? First those that went silent without stopping, for as '
  'long as a lease. is_listening false: it finds jobs by polling only.';

create view private.vacuum_holders with (security_invoker = true) as
select
  'session' as kind, a.pid, coalesce(nullif(a.application_name, ''), a.backend_type) as name,
  a.state, greatest(age(a.backend_xid), age(a.backend_xmin)) as age_transactions,
  now() - a.xact_start as since
from pg_stat_activity as a
where (a.backend_xmin is not null or a.backend_xid is not null)
  and (a.datname = current_database() or a.datname is null)
  and a.pid <> pg_backend_pid()
  -- Its own snapshot holds back nothing.
  and a.backend_type <> 'autovacuum worker'
union all
select 'prepared transaction', null, p.gid, 'prepared', age(p.transaction), now() - p.prepared
from pg_prepared_xacts as p
where p.database = current_database()
union all
select
  'replication slot', s.active_pid, s.slot_name,
  case when s.active then 'active' else 'inactive' end, age(s.xmin), null
from pg_replication_slots as s
where s.xmin is not null
order by age_transactions desc;

comment on view private.vacuum_holders is
  'Who holds back vacuum? While one of these is old, no dead row can be cleaned up, and the tables '
  'of the queue grow. Sessions of other roles show only to members of pg_read_all_stats.';

-- Counts by minute. The error rate is that of attempts: while jobs are retried for an hour, none
-- has failed, and still nothing works. Burned is what the provider may bill and its user canceled.
--
-- Read by time alone: the planner may think a scan of all history as good. And not compiled, which
-- would take longer than running it.
create function private.rates_health() returns jsonb
language sql stable set search_path = pg_catalog, pg_temp set enable_seqscan = off set jit = off
as $$
  with moved as (
    select
      a.outcome::text as what, count(*) as jobs,
      count(*) filter (where a.ended_at > now() - interval '1 minute') as new_jobs
    from private.attempts as a
    where a.ended_at > now() - interval '15 minutes' group by a.outcome
    union all
    select 'enqueued', count(*), count(*) filter (where g.created_at > now() - interval '1 minute')
    from public.generations as g
    where g.id >= private.first_id_of(now() - interval '15 minutes')
      and g.created_at > now() - interval '15 minutes'
  )
  select jsonb_build_object(
    'last_minute', jsonb_object_agg(m.what, m.new_jobs),
    'per_minute_of_15', jsonb_object_agg(m.what, round(m.jobs / 15.0, 2)),
    'attempts_of_15_minutes', coalesce(sum(m.jobs) filter (where m.what <> 'enqueued'), 0),
    'error_rate', round(
      sum(m.jobs) filter (where m.what in ('failed', 'retried'))
      / nullif(sum(m.jobs) filter (where m.what <> 'enqueued'), 0), 4
    )
  ) || (
    -- No join, which might be made by reading all generations.
    select jsonb_build_object(
      'burned_of_15_minutes', count(*), 'burned_by_users', count(distinct (
        select g.user_id from public.generations as g where g.id = a.generation_id
      ))
    )
    from private.attempts as a
    where a.ended_at > now() - interval '15 minutes' and a.outcome = 'canceled'
      and a.error_code is null and a.cost_usd is distinct from 0
  )
  from (
    select k.what, coalesce(c.jobs, 0) as jobs, coalesce(c.new_jobs, 0) as new_jobs
    from unnest('{enqueued,completed,failed,retried}'::text[]) as k (what)
    left join moved as c on c.what = k.what
  ) as m
$$;

-- Every rule with what is measured, and whether its alert is raised: if that is above the
-- threshold, and rests on enough cases.
create function private.alert_states(h jsonb) returns table (
  alert text, severity text, is_raised boolean, value numeric, threshold numeric, detail text,
  hint text
)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select
    rule.alert, rule.severity,
    coalesce(m.value::numeric > rule.threshold and (m.cases >= rule.min_cases) is not false, false),
    m.value::numeric, rule.threshold, m.detail, rule.hint
  from private.alert_rules as rule
  cross join jsonb_to_record(h) as x (
    depth jsonb, running jsonb, rates jsonb, workers jsonb, routines jsonb, paused jsonb,
    vacuum jsonb, outbox jsonb, books jsonb, skipped jsonb
  )
  cross join lateral (
    select (x.workers ->> 'alive')::integer as alive, (x.workers ->> 'listening')::integer as listen
  ) as w
  left join lateral (
    select s.* from jsonb_each(x.routines) as s
    order by (s.value ->> 'runs_missed')::numeric desc nulls last limit 1
  ) as r on true
  left join lateral (values
    ('depth', x.depth ->> 'ready', null::bigint, (x.depth ->> 'ready') || ' jobs are ready'),
    ('oldest_age', x.depth ->> 'oldest_ready_seconds', null,
      format('a job has waited for %s s', round((x.depth ->> 'oldest_ready_seconds')::numeric))),
    ('error_rate', x.rates ->> 'error_rate', (x.rates ->> 'attempts_of_15_minutes')::bigint,
      format('of %s attempts in 15 minutes, %s %% ended in an error',
        x.rates ->> 'attempts_of_15_minutes', round(100 * (x.rates ->> 'error_rate')::numeric))),
    ('burned', x.rates ->> 'burned_of_15_minutes', null,
      format('%s running jobs canceled in 15 minutes, by %s users: the provider may bill them',
        x.rates ->> 'burned_of_15_minutes', x.rates ->> 'burned_by_users')),
    ('stuck', x.running ->> 'stale_seconds', null,
      format('%s running jobs are past lease or deadline, one for %s s',
        x.running ->> 'stale', round((x.running ->> 'stale_seconds')::numeric))),
    ('no_worker', case when w.alive = 0 then x.depth ->> 'ready' end, null,
      (x.depth ->> 'ready') || ' jobs are ready and no worker is alive'),
    ('not_listening', (w.alive - w.listen)::text, null,
      format('%s of %s workers', w.alive - w.listen, w.alive)),
    ('cron_silent', r.value ->> 'runs_missed', null,
      concat(r.key, ' last ran at ', r.value ->> 'last_run_at')),
    ('paused', jsonb_array_length(x.paused)::text, null, (
      select string_agg(concat(
        p.kind, ' ', p.name, ' until ' || p.paused_until, ': ' || p.pause_reason
      ), '; ' order by p.name)
      from jsonb_to_recordset(x.paused)
        as p (kind text, name text, paused_until text, pause_reason text)
    )),
    ('vacuum_held_back', x.vacuum ->> 'oldest_transactions', null, (
      select concat_ws(
        ' ', v.kind, v.pid, quote_ident(v.name), v.state,
        'since ' || date_trunc('second', v.since), format('(%s transactions)', v.age_transactions)
      )
      from private.vacuum_holders as v order by v.age_transactions desc nulls last limit 1
    )),
    ('dead_deliveries', x.outbox ->> 'dead', null,
      (x.outbox ->> 'dead') || ' deliveries to webhooks were given up'),
    ('skipped_rows', x.skipped ->> 'rows', null,
      format('%s rows since %s: %s', x.skipped ->> 'rows', x.skipped ->> 'since', (
        select string_agg(concat(s.key, ' ', s.value), ', ' order by s.key)
        from jsonb_each_text(x.skipped -> 'steps') as s
      ))),
    ('books', ((x.books ->> 'recent_problems')::integer
      + coalesce((x.books ->> 'problems')::integer, 0))::text, null,
      format('%s problems among what moved last, %s at the check of %s',
        x.books ->> 'recent_problems', coalesce(x.books ->> 'problems', 'none'),
        coalesce(x.books ->> 'checked_at', 'never')))
  ) as m (alert, value, cases, detail) on m.alert = rule.alert
$$;

-- All of it, given the queue by model, which is dear to count: status and alerts, the worst first,
-- then what was measured.
create function private.health_of(p_models jsonb) returns json
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  -- More than a monitor: who asks may pause what the reasons are about.
  v_is_operator boolean := has_function_privilege(
    coalesce(nullif(current_setting('role', true), 'none'), session_user),
    'public.pause_model(text, timestamptz, text)', 'execute'
  );
  v_health jsonb;
  v_alerts jsonb;
begin
  v_health := jsonb_build_object(
    'depth', (
      select jsonb_build_object(
        'ready', coalesce(sum(m.ready), 0), 'delayed', coalesce(sum(m.delayed), 0),
        'paused', coalesce(sum(m.paused), 0), 'oldest_ready_seconds', max(m.oldest_ready_seconds)
      )
      from jsonb_populate_recordset(null::private.queue_by_model, p_models) as m
    ),
    'running', (
      select jsonb_build_object(
        'jobs', count(*), 'stale', count(*) filter (where r.stuck_for > '0'),
        'stale_seconds', extract(epoch from max(r.stuck_for) filter (where r.stuck_for > '0'))
      )
      from private.running_now as r
    ),
    'rates', private.rates_health(),
    'workers', (
      select jsonb_build_object(
        'alive', count(*), 'asleep', count(*) filter (where w.asleep),
        'listening', count(*) filter (where w.is_listening),
        'slots', coalesce(sum(w.slots), 0), 'slots_used', coalesce(sum(w.slots_used), 0)
      )
      from private.worker_activity as w where w.is_alive
    ),
    'routines', (
      select coalesce(jsonb_object_agg(r.name, jsonb_build_object(
        'last_run_at', r.last_run_at, 'every_seconds', extract(epoch from r.every),
        'runs_missed',
        trunc(extract(epoch from now() - r.last_run_at) / extract(epoch from r.every))
      )), '{}')
      from private.routines as r where r.every is not null
    ),
    'paused', (
      select coalesce(jsonb_agg(to_jsonb(p) ||
        case when v_is_operator then '{}' else '{"pause_reason": null}'::jsonb end
      ), '[]')
      from private.paused_now as p
    ),
    'vacuum', (
      select jsonb_build_object(
        'oldest_transactions', coalesce(max(h.age_transactions), 0),
        'sees_all_sessions', pg_has_role(current_user, 'pg_read_all_stats', 'usage')
      )
      from private.vacuum_holders as h
    ),
    'outbox', private.outbox_health(),
    'books', (
      select jsonb_build_object(
        'recent_problems', (select count(*) from private.recent_broken_books()),
        'checked_at', max(r.last_run_at), 'problems', (max(r.result ->> 'problems'))::integer,
        'examples', coalesce(
          jsonb_agg(r.result -> 'examples') filter (where v_is_operator) -> 0, '[]'
        )
      )
      from private.routines as r where r.name = 'check_books' and r.result is not null
    ),
    -- What routines passed over within a day; who was only locked counts from the third time. And
    -- files that Storage would not delete for a day.
    'skipped', (
      select jsonb_build_object(
        'rows', coalesce(sum(s.rows), 0), 'since', min(s.first_at),
        'steps', coalesce(jsonb_object_agg(s.step, s.rows), '{}')
      )
      from (
        select r.step, count(*) as rows, min(r.first_at) as first_at
        from private.skipped_rows as r
        where r.last_at > now() - interval '1 day'
          and (r.times > 2 or r.code not in ('40P01', '55P03'))
        group by r.step
        union all
        select 'storage', count(*), min(o.marked_at)
        from (
          select f.marked_at from private.expired_files as f
          where f.marked_at < now() - interval '1 day' order by f.marked_at limit 1000
        ) as o
        having count(*) > 0
      ) as s
    )
  );
  select coalesce(jsonb_agg(jsonb_build_object(
    'alert', s.alert, 'severity', s.severity, 'detail', s.detail, 'hint', s.hint
  ) order by s.severity, s.alert), '[]') into v_alerts
  from private.alert_states(v_health) as s where s.is_raised;
  return (
    select json_object_agg(p.key, p.value order by p.key <> 'status', p.key <> 'alerts')
    from jsonb_each(v_health || jsonb_build_object(
      'status', coalesce(v_alerts #>> '{0,severity}', 'ok'), 'alerts', v_alerts
    )) as p
  );
end;
$$;

create function public.queue_health() returns json
language sql stable security definer set search_path = pg_catalog, pg_temp set jit = off
set max_parallel_workers_per_gather = 0 as $$
  select private.health_of((select jsonb_agg(q) from private.queue_by_model as q))
$$;

comment on function public.queue_health is
  'How the queue is, for monitors: {status (ok | warning | critical), alerts [{alert, severity, '
  'detail, hint}], depth {ready, delayed, paused, oldest_ready_seconds}, running {jobs, stale, '
  'stale_seconds}, rates {last_minute, per_minute_of_15, attempts_of_15_minutes, error_rate, '
  'burned_of_15_minutes, burned_by_users}, workers {alive, asleep, listening, slots, slots_used}, '
  'routines {name: {last_run_at, every_seconds, runs_missed}}, paused, vacuum '
  '{oldest_transactions, sees_all_sessions}, outbox {pending, oldest_pending_seconds, dead}, books '
  '{recent_problems, checked_at, problems, examples}, skipped {rows, since, steps}}. A monitor is '
  'shown no reasons and no examples. Thresholds are rows of private.alert_rules.';
-- What `worker.py check` asks: may this role do a worker's work, does pg_cron do its own, is
-- Storage as Darkroom made it, and does every request of a user end? It looks at catalogs and at
-- routines, never at jobs or users.

create function private.check_setup(p_functions text[])
returns table (part text, verdict text, detail text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_faults text;
begin
  return query
  select
    'database',
    case when r.rolsuper or r.rolbypassrls or f.missing is not null then 'wrong' else 'ok' end,
    case
      when r.rolsuper or r.rolbypassrls
        then format('DATABASE_URL: role %s may do everything; use darkroom_worker', r.rolname)
      when f.missing is not null
        then format('role %s may not call %s: apply supabase/migrations', r.rolname, f.missing)
      else format(
        'PostgreSQL %s; role %s may call all it needs',
        split_part(current_setting('server_version'), ' ', 1), r.rolname
      )
    end
  from pg_roles as r
  cross join (
    select string_agg('private.' || name, ', ' order by name) as missing
    from unnest(p_functions) as name
    where not exists (
      select from pg_proc as p
      where p.proname = name and p.pronamespace = to_regnamespace('private')
        and has_function_privilege(session_user, p.oid, 'execute')
    ) and (
      to_regclass('private.deliveries') is not null  -- without webhooks (96) nothing is told
      or name <> all ('{claim_deliveries,finish_delivery,finish_receipts}')
    )
  ) as f
  where r.rolname = session_user;

  -- What keeps each routine that pg_cron is to run from running.
  if not exists (select from private.routines as r where r.every is not null) then
    return query select
      'cron', 'note', 'no pg_cron for this database: workers do its work on their own';
  else
    if to_regclass('cron.job') is null then
      v_faults := 'pg_cron is not installed any more';
    else
      select string_agg(format('job darkroom_%s is %s', r.name, case
        when j.jobid is null then 'missing'
        when not j.active then 'switched off'
        else format('silent: it last ran at %s', r.last_run_at)
      end), '; ' order by r.name) into v_faults
      from private.routines as r
      left join cron.job as j on j.jobname = 'darkroom_' || r.name
      where r.every is not null
        and (j.active is not true or now() - r.last_run_at > r.every * (1 + (
          select coalesce(rule.threshold, 3) from private.alert_rules as rule
          where rule.alert = 'cron_silent'
        )::double precision));
    end if;
    return query
    select
      'cron', case when v_faults is null then 'ok' else 'wrong' end,
      coalesce(v_faults || '; see cron.job_run_details', format(
        '%s jobs, the last ran at %s', count(*), date_trunc('second', max(r.last_run_at))
      ))
    from private.routines as r where r.every is not null;
  end if;

  -- What differs in Storage from what the installation made.
  if to_regclass('storage.objects') is null then
    return query select
      'policies', 'note', 'no schema storage here: PostgreSQL does not know who may read files';
  else
    select string_agg(f.fault, '; ') into v_faults
    from (
      select
        format('bucket %s is %s', b.id, case when s.id is null then 'missing' else 'public' end)
      from unnest(array['generations', 'inputs']) as b (id)
      left join storage.buckets as s on s.id = b.id
      where s.id is null or s.public
      union all
      select 'row level security is off on storage.objects'
      from pg_class as c
      where c.oid = to_regclass('storage.objects') and not c.relrowsecurity
      union all
      select format('policy "%s" is missing on storage.objects', wanted.name)
      from unnest(array[
        'Users read their own generated images', 'Everybody reads shared images',
        'Users read their own input images', 'Users add their own input images',
        'Users replace their own input images', 'Users delete their own input images'
      ]) as wanted (name)
      where (wanted.name !~ '^Everybody' or to_regclass('private.shared_paths') is not null)
        and not exists (
          select from pg_policies as p
          where p.schemaname = 'storage' and p.tablename = 'objects'
            and p.policyname = wanted.name
        )
    ) as f (fault);
    return query select
      'policies', case when v_faults is null then 'ok' else 'wrong' end,
      coalesce(
        v_faults || ': see sql/20_access.sql, sql/90_schedule.sql and sql/95_gallery.sql',
        'both buckets are private, and users reach their own folders'
      );
  end if;

  -- A role of PostgREST's whose requests nothing ends: no setting of its own, of the login, or of
  -- the database. No row where all have one.
  return query
  select 'timeouts', 'wrong', format(
    'one request may hold a connection for ever: alter role %s set statement_timeout = ''8s''',
    r.rolname
  )
  from pg_roles as r
  where r.rolname in ('anon', 'authenticated') and not exists (
    select from pg_db_role_setting as s cross join unnest(s.setconfig) as c (setting)
    where c.setting ~ '^statement_timeout=[^0]' and (
      s.setdatabase = 0 and s.setrole in (r.oid, coalesce(to_regrole('authenticator'), 0))
      or s.setrole = 0 and s.setdatabase = (
        select d.oid from pg_database as d where d.datname = current_database()
      )
    )
  )
  order by r.rolname limit 1;
end;
$$;

comment on function private.check_setup is
  'For `worker.py check`: whether its role may call these functions of schema private, whether '
  'pg_cron runs its jobs, whether buckets and policies of Storage are there, and, where they do '
  'not, whether requests of the API end. Answers part, verdict (ok | note (works, but know it) | '
  'wrong) and detail, in words for people.';
-- Rows and schedules of the core. Running it again changes nothing that an
-- operator has set. What is not installed here is skipped with a notice.

-- How many credits the users get who are there, and those who come, can be said beforehand.
insert into private.settings default values on conflict do nothing;
update private.settings
set welcome_credits = current_setting('darkroom.welcome_credits', true)::integer
where current_setting('darkroom.welcome_credits', true) <> ''
  and not exists (select from public.entitlements);

insert into private.retention_walks (name) values
('expire_deleted'), ('expire_old'), ('expire_orphans'), ('trim_attempts'), ('trim_ledger')
on conflict do nothing;

insert into private.plans (
  name, max_active, max_per_minute, full_minutes_per_day, max_burned_per_day, max_batch, weight,
  busy_after
) values
('free', 3, 10, 30, 5, 3, 1, '10 minutes'),
('paid', 20, 60, 100, 50, 100, 4, '30 minutes')
on conflict do nothing;

insert into private.error_codes (
  code, message, is_retryable, uses_attempt, resumes, trips_breaker
) values
('moderated', 'The safety filter refused this picture. Try another prompt.',
  false, true, false, false),
('invalid_input', 'The model did not accept this request.', false, true, false, false),
('provider_busy', 'The image service is busy. Try again later.', true, false, false, false),
('provider_timeout', 'The image service did not answer in time.', true, true, true, true),
('provider_error', 'The image service failed to make this picture.', true, true, false, true),
('result_lost', 'The finished picture could not be fetched in time.', true, true, false, true),
('timeout', 'The picture took too long.', false, true, false, true),
('provider_refused', 'The image service refused to make this picture.',
  true, true, true, true),
('worker_full', 'We have no room for your picture. Try again later.', true, false, true, false),
('storage_unavailable', 'Your picture could not be kept. Try again later.',
  true, false, true, false),
('internal', 'Something went wrong on our side.', true, true, true, false)
on conflict do nothing;

-- docs/RUNBOOK.md has a section on each.
insert into private.alert_rules (alert, threshold, unit, min_cases, severity, hint) values
('depth', 10000, 'ready jobs', 0, 'warning',
  'Start more workers, or give them more slots. Which model: private.queue_by_model.'),
('oldest_age', 300, 'seconds', 0, 'warning',
  'Start more workers, or give them more slots. Which model: private.queue_by_model.'),
('error_rate', 0.25, 'share of attempts', 20, 'critical',
  'private.attempts says of which model and in which words; is_active = false takes one off.'),
('burned', 20, 'purchases', 0, 'warning',
  'Users cancel what the provider bills: lower plans.max_burned_per_day.'),
('stuck', 120, 'seconds', 0, 'critical',
  'Nobody recovers them, see private.running_now: start a worker or pg_cron.'),
('no_worker', 0, 'ready jobs', 0, 'critical',
  'Start a worker, or look into the log of the one that stopped.'),
('not_listening', 0, 'workers', 0, 'warning',
  'They only poll: LISTEN does not work through a transaction pooler. Connect them directly.'),
('cron_silent', 3, 'runs missed', 0, 'warning',
  'See cron.job_run_details. Where a routine is no longer to run, set routines.every to null.'),
('paused', 0, 'pauses', 0, 'warning',
  'Jobs of private.paused_now wait. If the provider refused, see its billing and key.'),
('vacuum_held_back', 1000000, 'transactions', 0, 'warning',
  'Dead rows pile up in the queue. End what private.vacuum_holders names.'),
('skipped_rows', 0, 'rows', 0, 'warning',
  'Mend what private.skipped_rows names: it is tried again. storage: see the worker''s log.'),
('books', 0, 'problems', 0, 'critical',
  'See private.broken_books. Once it is mended, select private.check_books() to check anew.')
on conflict do nothing;

-- Users from before the installation.
do $$
begin
  perform private.skip_failing(
    'select count(private.create_entitlement(u)) from unnest($1) as u',
    array(
      select u.id from auth.users as u
      where not exists (select from public.entitlements as e where e.user_id = u.id)
    )
  );
end;
$$;

do $$
begin
  if to_regclass('storage.buckets') is null then
    raise notice 'Darkroom: no storage.buckets here; create the private buckets yourself';
    return;
  elsif not has_table_privilege('storage.buckets', 'select, insert') then
    raise notice 'Darkroom: no right to make buckets; create the private buckets yourself';
    return;
  end if;
  insert into storage.buckets (id, name, public, file_size_limit, allowed_mime_types) values
  -- octet-stream: what SVGs are stored as, so that no browser runs one.
  (
    'generations', 'generations', false, 33554432,
    '{image/png,image/jpeg,image/webp,image/avif,image/gif,application/octet-stream}'
  ),
  ('inputs', 'inputs', false, 10485760, '{image/png,image/jpeg,image/webp}')
  on conflict do nothing;
  if exists (select from storage.buckets where id in ('generations', 'inputs') and public) then
    raise warning 'Darkroom: a bucket of its own is public: everybody who knows a path reads it'
      using errcode = '01000';
  end if;
end;
$$;

-- Each leaves its time in routines when it has run to its end.
do $$
declare
  v_job record;
begin
  if current_database() is distinct from current_setting('cron.database_name', true) then
    raise notice 'Darkroom: no pg_cron for this database; workers do its work on their own';
    return;
  end if;
  create extension if not exists pg_cron with schema pg_catalog;
  for v_job in
    select * from (values
      ('recover_stale_jobs', '* * * * *', interval '1 minute'),
      ('apply_retention', '* * * * *', interval '1 minute'),
      ('trim_history', '17 3 * * *', interval '1 day'),
      ('check_books', '47 3 * * *', interval '1 day')
    ) as job (name, schedule, every)
  loop
    perform cron.schedule(
      'darkroom_' || v_job.name, v_job.schedule,
      format('select private.%1$s(), private.note_run(%1$L)', v_job.name)
    );
    insert into private.routines (name, every) values (v_job.name, v_job.every)
    on conflict (name) do update set every = coalesce(routines.every, excluded.every);
  end loop;
end;
$$;

notify pgrst, 'reload schema';
notify pgrst, 'reload config';
-- The API: each function is a door to the definer of the same name in schema private, so that
-- nothing that users call in the exposed schema runs with more rights than theirs. Doors have no
-- code. What only operators call stands where its noun is.
--
-- What is called most is plpgsql, whose plans last for a session.

create function public.enqueue_generation(
  model text, prompt text, params jsonb default '{}', idempotency_key text default null
) returns json
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  return private.enqueue_generation(model, prompt, params, idempotency_key);
end;
$$;

comment on function public.enqueue_generation is
  'Asks for a picture: checks, charges and queues in one transaction. Answers {job_id, status, '
  'reused, credits_left, queue_position and eta_seconds (null here: get_job_status tells them), '
  'poll_after_ms}. The same idempotency_key and payload answer with the same job and charge '
  'nothing. With params.reuse = true and a seed, a finished generation of the same input is '
  'answered, free, if it is among your last 200. Errors: PT400 invalid_input, PT401 '
  'not_authenticated, PT402 insufficient_credits, PT403 requires_paid_plan, PT404 not_found (also '
  'where the job of the key is deleted), PT409 idempotency_conflict, PT429 too_many_active | '
  'rate_limited, PT503 busy | model_paused | unavailable.';

create function public.enqueue_batch(
  model text, prompts text[], params jsonb default '{}', idempotency_key text default null
) returns json
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  return private.enqueue_batch(model, prompts, params, idempotency_key);
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

create function public.retry_generation(job_id uuid) returns json
language sql set search_path = pg_catalog, pg_temp
return private.retry_generation(job_id);

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
  'Your plan, balance, limits and what is used of them: {user_id, plan (free | paid), paid_until,'
  ' credits, active_jobs, max_active, minute_jobs, max_per_minute, max_batch, is_busy (requests are'
  ' refused as busy now)}. Errors: PT401 not_authenticated.';

create function public.list_models() returns json
language sql stable set search_path = pg_catalog, pg_temp
return private.list_models();

comment on function public.list_models is
  'The catalogue: [{id, title, price_credits and paid_price_credits (per image), requires_paid, '
  'paused_until (null unless it is; may be infinity), max_images, inputs {name: JSON schema of a '
  'param}, image_inputs [those that take a path in bucket inputs]}].';

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
-- Who may call what: the whole matrix, and the last word. What is not named here nobody may call.
--
-- Names without arguments: no function has two forms. In schema public only our own are touched.

revoke all on all functions in schema private from public, anon, authenticated, service_role;
revoke all on all tables in schema private from public, anon, authenticated, service_role;
revoke all on all sequences in schema private from public, anon, authenticated, service_role;

do $$
begin
  execute (
    select string_agg(format('alter table private.%I enable row level security', c.relname), ';')
    from pg_class as c where c.relnamespace = 'private'::regnamespace and c.relkind in ('r', 'p')
  );
end;
$$;

revoke all on function
public.cancel_batch, public.cancel_generation, public.delete_generation, public.enqueue_batch,
public.enqueue_generation, public.get_batch_status, public.get_entitlement, public.get_job_status,
public.grant_credits, public.list_active_jobs, public.list_generations, public.list_models,
public.pause_model, public.ping, public.queue_health, public.redrive_failed,
public.restore_generation, public.resume_model, public.retry_generation, public.set_paid
from public, anon, authenticated, service_role;

-- Everybody, signed in or not.
grant execute on function
private.cancel_batch, private.cancel_generation, private.delete_generation, private.enqueue_batch,
private.enqueue_generation, private.get_batch_status, private.get_entitlement,
private.get_job_status, private.list_active_jobs, private.list_generations, private.list_models,
private.restore_generation, private.retry_generation, public.cancel_batch,
public.cancel_generation, public.delete_generation, public.enqueue_batch,
public.enqueue_generation, public.get_batch_status, public.get_entitlement, public.get_job_status,
public.list_active_jobs, public.list_generations, public.list_models, public.ping,
public.restore_generation, public.retry_generation
to anon, authenticated;

-- Users: the door and the definer behind it.
grant execute on function
private.caller_id, private.may_store_input
to authenticated;

-- The operator's backend.
grant execute on function
private.list_models, public.grant_credits, public.list_models, public.pause_model, public.ping,
public.queue_health, public.redrive_failed, public.resume_model, public.set_paid
to service_role;

-- Workers.
grant execute on function
private.adopt_provider_job, private.apply_retention, private.begin_creates, private.cancel_job,
private.check_setup, private.checkpoint_jobs, private.claim_jobs, private.claim_receipts,
private.complete_jobs, private.due_lanes, private.fail_jobs, private.forget_files,
private.heartbeat, private.list_expired_files, private.pause_provider, private.recall_create,
private.recover_stale_jobs, private.register_worker, private.release_job, private.report_progress,
private.sleep, private.unregister_worker
to darkroom_worker;

-- Who looks on.
grant execute on function public.queue_health to darkroom_monitor;
