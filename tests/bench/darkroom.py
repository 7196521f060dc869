"""A Darkroom database for the bench: users with credits and no limits, jobs, and history."""

from __future__ import annotations

import json
import sys
import time
from typing import Any
from urllib.parse import urlsplit

import psycopg
from database import SEED, Database
from lab import Lab
from psycopg import sql
from run_bare import Bare, complete

ROLE = "darkroom_worker"
# On the paid plan with the live jobs that it allows, 20: users are so many that none of them comes
# near that, though a cell enqueues some 25,000 jobs. One of them asks far more often than a person.
FIRST_USER, USERS, CREDITS = 10_000, 10_000, 1_000_000
LIMITS = "update private.plans set max_per_minute = 1000000, busy_after = null"
HISTORY_AT_ONCE = 250_000  # generations
QUEUE, BEFORE = 600, 500  # jobs in an aged database; those before each of the last
PROMPT = "a lighthouse at dusk, seen from a small boat in the rain"
USER_ID = "00000000-0000-4000-8000-0000000"  # and five digits
# What Darkroom needs of Supabase.
AUTH = """
create schema auth;
create table auth.users (id uuid primary key);
create function auth.uid() returns uuid language sql stable as $$
  select coalesce(
    nullif(current_setting('request.jwt.claim.sub', true), ''),
    nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'
  )::uuid
$$;
grant usage on schema auth to public;
"""
# No attempt is due: else a worker would erase those of the history while it is measured.
SETUP = f"""{LIMITS};
update private.settings set keep_attempts = '10 years';
insert into auth.users (id)
select ('{USER_ID}' || n)::uuid
from generate_series({FIRST_USER}, {FIRST_USER + USERS - 1}) as n;
select public.set_paid(e.user_id, 'infinity'),
  public.grant_credits(e.user_id, {CREDITS} - e.credits, 'adjust', e.user_id::text)
from public.entitlements as e where e.user_id::text like '{USER_ID}%';
"""
# Ready jobs as enqueue_generation leaves them, of so many users in turn.
FILL = """
begin;
set session_replication_role = replica;
create temporary table made as
select
  private.uuid_v7() as id, e.user_id, row_number() over (partition by e.user_id order by n) as nth,
  e.credits, greatest(c.last_value, e.last_fair_key) as fair_key
from generate_series(0, {count} - 1) as n
inner join public.entitlements as e
on e.user_id = ('{user_id}' || {first} + n % {users})::uuid
cross join private.virtual_clock as c
order by n;
insert into public.generations (
  id, user_id, model_id, prompt, input, provider_input, price_credits, image_count, queue_distance
)
select
  m.id, m.user_id, 'darkroom/preview', 'a lighthouse at dusk, seen from a small boat',
  '{{"width": 512}}',
  jsonb_build_object(
    'prompt', 'a lighthouse at dusk, seen from a small boat', 'width', 512, 'height', 1024,
    'num_outputs', 1, 'seed', m.nth
  ), 1, 1, m.nth * 250
from made as m;
insert into private.ready_jobs (job_id, user_id, model_id, fair_key)
select m.id, m.user_id, 'darkroom/preview', m.fair_key + m.nth * 250
from made as m;
insert into public.credit_ledger (user_id, generation_id, kind, amount, balance_after)
select m.user_id, m.id, 'charge', -1, m.credits - m.nth
from made as m;
update public.entitlements as e set
  credits = e.credits - m.jobs, last_fair_key = m.fair_key + m.jobs * 250
from (select user_id, fair_key, count(*) as jobs from made group by user_id, fair_key) as m
where e.user_id = m.user_id;
drop table made;
commit;
"""
# A part of a year of it, the oldest first: one in ten failed or canceled; each claimed once.
HISTORY = """
set session_replication_role = replica;
set synchronous_commit = off;
create temporary table made as
select
  (lpad(to_hex((extract(epoch from at) * 1000)::bigint), 12, '0') || '7' || substr(hash, 1, 3)
    || '8' || substr(hash, 4, 15))::uuid as id,
  users.ids[1 + n % cardinality(users.ids)] as user_id, at, hash,
  case n % 20 when 0 then 'failed' when 1 then 'canceled' else 'completed' end as status
from generate_series({first}, {last}) as n
cross join (select array_agg(id order by id) as ids from auth.users) as users
cross join lateral (
  select now() - interval '1 year' * (1 - n / {count}.0) as at, md5(n::text) as hash
) as drawn;
insert into public.generations (
  id, user_id, model_id, prompt, input, provider_input, status, error_code, error_message,
  price_credits, image_count, created_at, started_at, finished_at, updated_at
)
select
  id, user_id, 'darkroom/preview', 'a lighthouse at dusk, ' || hash,
  case when hash < '2' then jsonb_build_object('seed', hash) else '{{}}' end,
  jsonb_build_object('prompt', hash, 'seed', hash, 'width', 1024, 'height', 1024), status,
  case status when 'failed' then 'moderated' end, case status when 'failed' then 'No.' end,
  1, 1, at, at + interval '1 second', at + interval '9 seconds', at + interval '9 seconds'
from made;
insert into public.images (
  generation_id, position, user_id, storage_path, preview_path, content_type, width, height, bytes,
  blurhash, created_at
)
select
  id, 0, user_id, concat(user_id, '/', id, '/0.png'), concat(user_id, '/', id, '/0.preview.webp'),
  'image/png', 1024, 1024, 1500000, 'LEHV6nWB2yk8pyo0adR*.7kCMdnj', at
from made where status = 'completed';
insert into private.attempts (
  generation_id, token, model_id, attempt, worker_id, started_at, ended_at, outcome, error_code,
  provider_job_id, provider_seconds, cost_usd
)
select
  id, nextval('private.lease_tokens'), 'darkroom/preview', 1, 1,
  at + interval '1 second', at + interval '9 seconds',
  status, case status when 'failed' then 'moderated' end, hash, 7, 0.003
from made;
insert into public.credit_ledger (user_id, generation_id, kind, amount, balance_after, created_at)
select made.user_id, made.id, entry.kind, entry.amount, 10 + entry.amount, made.at
from made cross join lateral (
  values ('charge', -1), (case when made.status <> 'completed' then 'refund' end, 1)
) as entry (kind, amount)
where entry.kind is not null;
drop table made;
"""
# One user of all, drawn anew each time, asks as through PostgREST.
ENQUEUE = f"""\\set u random({FIRST_USER}, {FIRST_USER + USERS - 1})
select
  set_config(
    'request.jwt.claims', '{{"sub": "{USER_ID}' || :u || '", "role": "authenticated"}}', false
  ),
  public.enqueue_generation('darkroom/preview', '{PROMPT}', '{{"width": 512}}', null)
"""
# Jobs to look at, numbered, each with the claims of its user.
SAMPLES = """
create schema bench;
grant usage on schema bench to authenticated;
create table bench.queued (n bigint primary key, job_id uuid, claims text);
create table bench.finished (n bigint primary key, job_id uuid, claims text);
grant select on bench.queued, bench.finished to authenticated;
insert into bench.finished
select
  row_number() over (), id, json_build_object('sub', user_id, 'role', 'authenticated')
from (
  select id, user_id from public.generations where finished_at is not null
  order by md5(id::text) limit 10000
) as drawn;
"""
# The last jobs of the queue.
LAST_QUEUED = f"""
truncate bench.queued;
insert into bench.queued
select
  row_number() over (), job_id, json_build_object('sub', user_id, 'role', 'authenticated')
from (
  select job_id, user_id from private.ready_jobs order by fair_key, seq offset {BEFORE}
) as last;
vacuum analyze bench.queued;
"""
# Of whoever makes the pictures: the answer of the create has them. See run_worker.py.
RECIPE = """{
  "create": {"method": "POST", "url": "{{base}}", "body": "{{input}}", "outputs": "$.outputs[*]"},
  "find": {"url": "{{base}}", "shows_all": true}
}"""
AS_USER = {"PGOPTIONS": "-c role=authenticated"}


def base(lab: Lab) -> str:
    return lab.template("darkroom", install)


def install(db: Database) -> None:
    done = db.psql(script=AUTH)
    assert done.returncode == 0, done.stderr
    db.install(SEED)
    run_script(db, SETUP)
    db.buys_previews(base_url="http://127.0.0.1:9", recipe=RECIPE)
    let_workers_in(db)


def let_workers_in(db: Database) -> None:
    """Let the worker's role log in with the password of the database's owner."""
    password = urlsplit(db.url).password
    query = sql.SQL("alter role {} password {}").format(sql.Identifier(ROLE), sql.Literal(password))
    db.connect().execute(query)


def aged(lab: Lab, generations: int) -> Database:
    """Return the database of this run with so many finished generations and QUEUE waiting jobs.

    It is built once, and shared. Who adds jobs works them off.
    """

    def fill_it(db: Database) -> None:
        add_history(db, generations)
        fill(db, 2 * QUEUE)
        work_off(db, QUEUE)
        run_script(db, SAMPLES)

    return lab.shared(f"darkroom {generations} finished", fill_it, base=base(lab))


def fill(db: Database, count: int, users: int = USERS) -> None:
    """Add ready jobs of these users in turn; of few, more than their plan allows."""
    run_script(db, FILL.format(count=count, user_id=USER_ID, first=FIRST_USER, users=users))


def add_history(db: Database, count: int) -> None:
    """Add finished generations of the last year, the oldest first, and tell how far it is."""
    began = time.monotonic()
    for done in range(0, count, HISTORY_AT_ONCE):
        last = min(done + HISTORY_AT_ONCE, count)
        run_script(db, HISTORY.format(first=done + 1, last=last, count=count))
        seconds = time.monotonic() - began
        print(f"  {last:,} of {count:,} generations, {seconds:.0f} s", file=sys.stderr, flush=True)


def work_off(db: Database, leave: int = 0) -> None:
    """Complete jobs, the first ones first, until no more than so many are queued."""
    worker = Bare(worker_url(db), 200)
    with worker.connection:
        while (more := int(db.value("select count(*) from private.ready_jobs")) - leave) > 0:
            worker.slots = min(more, 200)
            complete(worker.connection, worker.claim())
        worker.connection.execute("select private.unregister_worker(%s)", [worker.id])


def run_script(db: Database, script: str) -> None:
    with db.connect() as connection:
        connection.execute("set statement_timeout = 0")
        for statement in filter(str.strip, script.split(";\n")):
            connection.execute(statement.encode())


def as_user(db: Database) -> psycopg.Connection[Any]:
    return psycopg.connect(db.url, autocommit=True, options=AS_USER["PGOPTIONS"])


def worker_url(db: Database) -> str:
    parts = urlsplit(db.url)
    return parts._replace(netloc=f"{ROLE}:{parts.password}@{parts.hostname}:{parts.port}").geturl()


def finished(db: Database) -> int:
    return int(db.value("select count(*) from public.images"))


def claims(number: int) -> str:
    """Return what PostgREST says of one of the users, counted from 0."""
    sub = f"{USER_ID}{FIRST_USER + number % USERS}"
    return json.dumps({"sub": sub, "role": "authenticated"})
