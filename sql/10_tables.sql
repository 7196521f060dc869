-- The tables of schema public: what users own and may read.
--
-- An entitlement says what a user may do; the credit ledger says how the balance came to be; a
-- generation is one request of a user and its permanent record; an image is one stored output. The
-- catalogue of models is in 11. The queue is elsewhere (12): a generation is written when it is
-- enqueued and when its state changes, never by heartbeats or progress.
--
-- Always true: entitlements.credits is the sum of the user's ledger amounts and never negative;
-- debt is the sum of the entries' debts; and who has a debt has no credits.

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
  value in ('grant', 'charge', 'refund', 'adjust', 'expire', 'carry')
);

create domain public.credits as integer constraint credits_are_not_negative check (value >= 0);
create domain public.image_count as smallint
constraint image_count_is_positive check (value > 0);
create domain public.params as jsonb
constraint params_are_an_object check (jsonb_typeof(value) = 'object');

-- A function, for the same reason, where a rule holds several columns together.
create function private.fits_kind(
  p_kind text, p_amount integer, p_generation_id uuid, p_debt integer
) returns boolean
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  return (p_generation_id is not null) = (p_kind = 'refund')
    and case p_kind
      when 'expire' then p_amount < 0 and p_debt = 0
      -- What it gives or takes, and in which direction each part goes.
      when 'adjust' then p_amount - p_debt <> 0
        and (p_amount >= 0 and p_debt <= 0 or p_amount <= 0 and p_debt >= 0)
      else p_amount >= 0 and p_debt <= 0
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
  is_guest boolean not null default false,
  paid_until timestamptz,
  blocked_until timestamptz,
  ledger_after bigint not null default 0,
  credits public.credits not null default 0,
  debt public.credits not null default 0,
  credits_end_at timestamptz,
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
comment on column public.entitlements.is_guest is 'Signed in anonymously, as Auth says; see 42.';
comment on column public.entitlements.paid_until is
  'End of the paid plan; infinity for one without end, null for none.';
comment on column public.entitlements.blocked_until is
  'Until then nothing new is taken in: a ban, or infinity for a user whom Auth deleted softly or '
  'who was merged into another; null: never blocked.';
comment on column public.entitlements.ledger_after is
  'Entries up to this id are of an earlier user with this id, whose books were kept. 0: none was.';
comment on column public.entitlements.credits is
  'Balance in credits: the sum of the user''s ledger amounts.';
comment on column public.entitlements.debt is
  'Credits taken back when they were spent already: what comes in pays it first.';
comment on column public.entitlements.credits_end_at is
  'When the first of the credits end; infinity: those in buckets never do; null: none is in one.';
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
  debt integer not null default 0,
  bucket_id bigint,
  primary key (user_id, id),
  constraint credit_ledger_amount_and_generation_match_kind check (
    case
      when kind = 'charge' then amount <= 0  -- the most there are, without a call
      else private.fits_kind(kind, amount, generation_id, debt)
    end
  )
);

comment on table public.credit_ledger is
  'Append-only entries that explain every balance. No row is ever updated, and none of a user who '
  'is here is deleted.';
comment on column public.credit_ledger.kind is
  'grant, charge (of a generation), refund (of one), adjust, expire (their time was over), or '
  'carry: the sum of older entries, as the first edition made it.';
comment on column public.credit_ledger.amount is
  'What the balance moved by, in credits: negative for a charge, positive for a grant or refund.';
comment on column public.credit_ledger.debt is
  'What the debt moved by. The entry gives, or takes if negative, amount - debt.';
comment on column public.credit_ledger.bucket_id is
  'Which of the user''s buckets the amount went into or came from; null: into none. A charge or '
  'refund has an entry for each.';
comment on column public.credit_ledger.external_id is
  'The caller''s id of a grant (a payment''s, say): the same id is applied once.';

-- A generation is given back at most once: to each bucket it was paid from. Its charge needs no
-- index, if it came from none: enqueue writes it together with the generation's new id.
create unique index credit_ledger_refund_once_idx
on public.credit_ledger (generation_id, bucket_id) nulls not distinct where kind = 'refund';
create index credit_ledger_charged_buckets_idx
on public.credit_ledger (generation_id) where bucket_id is not null;
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

create table private.credit_buckets (
  id bigint generated always as identity primary key,
  user_id uuid not null,
  external_id text,
  priority smallint not null default 0,
  expires_at timestamptz not null default 'infinity',
  is_extended boolean not null default false,
  credits public.credits not null,
  created_at timestamptz not null default now(),
  constraint credit_buckets_differ_from_what_is_in_none check (
    priority <> 0 or expires_at < 'infinity'
  )
) with (fillfactor = 70);

comment on table private.credit_buckets is
  'Credits granted together that end, or are spent before or after others. All that is in no '
  'bucket never ends and has priority 0.';
comment on column private.credit_buckets.external_id is 'That of the grant.';
comment on column private.credit_buckets.priority is
  'The smallest is spent first; of equal ones what ends first; then the oldest.';
comment on column private.credit_buckets.expires_at is 'From then on they cannot be spent.';
comment on column private.credit_buckets.is_extended is
  'Something was given back after the end, for settings.refund_grace: that happens once.';
comment on column private.credit_buckets.credits is 'What is left: the sum of its entries.';

create index credit_buckets_user_id_idx on private.credit_buckets (user_id);
create index credit_buckets_expires_at_idx
on private.credit_buckets (expires_at) where credits > 0;

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
  refund_percent smallint,
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
comment on column public.generations.refund_percent is
  'How much of the price of one that failed or was canceled was given back; null: all.';
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

create table private.sources (
  source_id uuid,
  generation_id uuid,
  primary key (source_id, generation_id)
);

comment on table private.sources is
  'Which generations were made from the pictures of another, to be found by that one.';

create table public.images (
  generation_id uuid not null,
  position smallint not null,
  user_id uuid not null,
  merged_from uuid,
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
    starts_with(
      storage_path,
      concat(coalesce(merged_from, user_id), '/', generation_id, '/', position, '.')
    )
  ),
  constraint images_preview_path_is_the_owners check (
    starts_with(
      preview_path,
      concat(coalesce(merged_from, user_id), '/', generation_id, '/', position, '.')
    )
  ),
  constraint images_prompt_has_a_share check (not shows_prompt or share_id is not null),
  constraint images_content_type_is_an_image check (content_type like 'image/%'),
  constraint images_size_is_positive check (bytes > 0 and width > 0 and height > 0)
);

comment on table public.images is 'One stored output of a generation.';
comment on column public.images.merged_from is
  'The user it was made for, whose folder it stays in, where merge_user gave it to another.';
comment on column public.images.storage_path is
  'Path in bucket generations: <user_id>/<generation_id>/<position>.<ext>. Never changes: a good '
  'cache key.';
comment on column public.images.preview_path is
  'Path of a smaller WebP for galleries; null where none was made.';
comment on column public.images.share_id is
  'Given when the owner shares it, in the order of time; null: private.';

-- Read by the policy on images.
create index images_user_id_idx on public.images (user_id);
