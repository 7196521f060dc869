-- The tables of schema private: the queue, its workers, and what operators set.
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

-- No index on what heartbeats change, and half-empty pages: beats are HOT updates.
-- Domains, like job_status (10): a list of words is read once in a session, not in each statement.
create domain private.job_stage as text constraint job_stage_is_known check (
  value in ('generating', 'storing')
);

create domain private.attempt_outcome as text constraint attempt_outcome_is_known check (
  value in ('completed', 'retried', 'failed', 'released', 'canceled')
);

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
comment on column private.running_jobs.attempt is 'Number of this attempt, from 1.';
comment on column private.running_jobs.lease_until is
  'When the worker counts as dead unless it beats.';
comment on column private.running_jobs.deadline_at is
  'When the attempt fails with timeout, beats or not.';
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
comment on column private.attempts.provider_seconds is 'Compute seconds the provider reported.';
comment on column private.attempts.cost_usd is 'US dollars the attempt cost at the provider.';
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
