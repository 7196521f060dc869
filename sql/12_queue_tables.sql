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
  handles jsonb,
  sent_input jsonb,
  route smallint not null default 0,
  reserved_usd numeric
) with (
  fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500,
  autovacuum_vacuum_insert_threshold = -1, autovacuum_analyze_scale_factor = 0.1,
  autovacuum_vacuum_cost_delay = 0
);

comment on table private.ready_jobs is 'Jobs that wait to be claimed.';
comment on column private.ready_jobs.fair_key is
  'Virtual finish time: greatest(virtual clock, the user''s last) + price / weight. Smallest is '
  'claimed first.';
comment on column private.ready_jobs.attempt is 'Attempts used so far on its route.';
comment on column private.ready_jobs.queued_at is 'Since when it may be claimed.';
comment on column private.ready_jobs.provider_job_id is
  'The provider''s job an earlier attempt began: resume it.';
comment on column private.ready_jobs.create_started_at is
  'An earlier attempt may have asked the provider to create, then or later, and never learned the '
  'outcome: look first.';
comment on column private.ready_jobs.handles is 'This and the next: see running_jobs.';
comment on column private.ready_jobs.route is
  'Place of the route it takes: if that is shut, the claim takes the next, unless it resumes.';
comment on column private.ready_jobs.reserved_usd is 'What it resumes may cost at most.';

-- Delayed jobs are out of the claim's index, so a pile of them costs the claim nothing.
create index ready_jobs_claim_idx on private.ready_jobs (fair_key, seq) where run_at is null;
create index ready_jobs_run_at_idx on private.ready_jobs (run_at) where run_at is not null;
-- A user's live jobs are counted, not kept count of: see live_jobs (30).
create index ready_jobs_user_id_idx on private.ready_jobs (user_id);
-- Claims read it instead of the first where not everything may run.
create index ready_jobs_model_idx on private.ready_jobs (model_id, route, fair_key, seq)
where run_at is null;
-- What a budget (29) counts as taken, and lets go on once it is spent.
create index ready_jobs_reserved_idx on private.ready_jobs (model_id, route, fair_key, seq)
where reserved_usd is not null;

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
  handles jsonb,
  sent_input jsonb,
  route smallint not null default 0,
  cancel_requested boolean not null default false,
  reserved_usd numeric,
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
comment on column private.running_jobs.handles is
  'What else the provider answered with its id, by the names of its recipe: addresses to follow.';
comment on column private.running_jobs.sent_input is
  'What the provider was last asked to create, where that has addresses of sources: they are made '
  'anew each time. null with such a job: nothing was asked for.';
comment on column private.running_jobs.reserved_usd is
  'What it may cost at most, which budgets (29) count as taken; null: nobody knows, or it was '
  'claimed when there was no budget.';

create index running_jobs_user_id_idx on private.running_jobs (user_id);

create table private.workers (
  id bigint generated always as identity primary key,
  host text not null,
  version text not null,
  slots smallint not null,
  keys text[] not null,
  asleep boolean not null default false,
  is_listening boolean not null default true,
  started_at timestamptz not null default now(),
  seen_at timestamptz not null default now(),
  constraint workers_slots_are_positive check (slots > 0)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);

comment on table private.workers is 'Worker processes: liveness and wake-up.';
comment on column private.workers.keys is
  'Names of the keys that it has, as in providers.secret: it takes no jobs that need others.';
comment on column private.workers.asleep is
  'Found no work and waits for NOTIFY on darkroom_worker_<id>.';
comment on column private.workers.is_listening is
  'Whether NOTIFY reaches it, as it says with each beat; false: it finds jobs by polling only.';

create table private.attempts (
  generation_id uuid not null references public.generations (id) on delete cascade,
  token bigint not null,
  model_id text not null,
  provider text,
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
comment on column private.attempts.provider is 'That of the route taken.';
comment on column private.attempts.attempt is
  'Attempt number on its route; a released or throttled claim shares it with the next, so '
  '(generation, token) is the key.';
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
  trips_breaker boolean not null default false,
  pauses_model boolean not null default false,
  refund_percent smallint not null default 100,
  blames_user boolean not null default false,
  constraint error_codes_refund_is_a_percentage check (refund_percent between 0 and 100)
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
comment on column private.error_codes.pauses_model is
  'True: no job of the model can do better until an operator has mended it and calls resume_model. '
  'All of them wait.';
comment on column private.error_codes.refund_percent is
  'Share of the price given back to whose job fails with it from then on. What a push says of that '
  'is a row of push_texts.';
comment on column private.error_codes.blames_user is
  'True: what the user asked for is the cause, so it raises no recent_failures.';

create table private.provider_words (
  place integer primary key,
  provider text references private.providers (name) on delete cascade,
  pattern text not null,
  code text not null references private.error_codes (code),
  constraint provider_words_pattern_is_a_regular_expression check ('' ~* pattern is not null)
);

comment on table private.provider_words is
  'What a provider''s own words about a failed job mean: the first pattern that fits, in the order '
  'of place. A row may be added while all runs.';
comment on column private.provider_words.provider is 'null: of any.';
comment on column private.provider_words.pattern is
  'Regular expression, whatever the case, as PostgreSQL reads it.';

create index provider_words_provider_idx on private.provider_words (provider);
create index provider_words_code_idx on private.provider_words (code);
