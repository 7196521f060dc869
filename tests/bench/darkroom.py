"""A Darkroom database for the bench: users with credits and no limits, jobs, and history."""

from __future__ import annotations

import json
from urllib.parse import urlsplit

from database import SEED, Database
from history import HISTORY
from lab import Lab
from psycopg import sql

ROLE = "darkroom_worker"
FIRST_USER, USERS, CREDITS = 1000, 1000, 1_000_000
PROMPT = "a lighthouse at dusk, seen from a small boat in the rain"
USER_ID = "00000000-0000-4000-8000-00000000"  # and four digits
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
SETUP = f"""
update private.plans set
  max_active = 1000000000, max_per_minute = 1000000000, max_batch = 100, busy_after = null;
insert into auth.users (id)
select ('{USER_ID}' || n)::uuid
from generate_series({FIRST_USER}, {FIRST_USER + USERS - 1}) as n;
select public.grant_credits(u.id, {CREDITS} - e.credits, 'adjust', u.id::text)
from auth.users as u inner join public.entitlements as e on e.user_id = u.id;
"""
# Ready jobs as enqueue_generation leaves them, of users {first} to {last} in turn.
FILL = """
set session_replication_role = replica;
create temporary table made as
select
  private.uuid_v7() as id, e.user_id, row_number() over (partition by e.user_id order by n) as nth,
  e.credits, greatest(c.last_value, e.last_fair_key) as fair_key
from generate_series(0, {count} - 1) as n
inner join public.entitlements as e
on e.user_id = ('{user_id}' || {first} + n % ({last} - {first} + 1))::uuid
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
  ), 1, 1, m.nth * 1000
from made as m;
insert into private.ready_jobs (job_id, user_id, model_id, fair_key)
select m.id, m.user_id, 'darkroom/preview', m.fair_key + m.nth * 1000
from made as m;
insert into public.credit_ledger (user_id, generation_id, kind, amount, balance_after)
select m.user_id, m.id, 'charge', -1, m.credits - m.nth
from made as m;
update public.entitlements as e set
  credits = e.credits - m.jobs, active_jobs = e.active_jobs + m.jobs,
  last_fair_key = m.fair_key + m.jobs * 1000
from (select user_id, fair_key, count(*) as jobs from made group by user_id, fair_key) as m
where e.user_id = m.user_id;
drop table made;
set session_replication_role = default;
"""
# One user of all, drawn anew each time, asks as through PostgREST.
ENQUEUE = f"""\\set u random({FIRST_USER}, {FIRST_USER + USERS - 1})
select
  set_config(
    'request.jwt.claims', '{{"sub": "{USER_ID}' || :u || '", "role": "authenticated"}}', false
  ),
  public.enqueue_generation('darkroom/preview', '{PROMPT}', '{{"width": 512}}', null)
"""
AS_USER = {"PGOPTIONS": "-c role=authenticated"}


def base(lab: Lab) -> str:
    """Return the template of an empty queue."""
    return lab.template("darkroom", install)


def install(db: Database) -> None:
    """Build Darkroom, and let the worker's role log in."""
    done = db.psql(script=AUTH)
    assert done.returncode == 0, done.stderr
    db.install(SEED)
    run_script(db, SETUP)
    password = urlsplit(db.url).password
    query = sql.SQL("alter role {} password {}").format(sql.Identifier(ROLE), sql.Literal(password))
    db.connect().execute(query)


def fill(db: Database, count: int, first: int = FIRST_USER, users: int = USERS) -> None:
    """Add ready jobs of these users in turn."""
    last = first + users - 1
    run_script(db, FILL.format(count=count, user_id=USER_ID, first=first, last=last))


def add_history(db: Database, count: int) -> None:
    """Add finished generations."""
    run_script(db, HISTORY.format(count=count))


def run_script(db: Database, script: str) -> None:
    """Run statements one by one, however long they take."""
    with db.connect() as connection:
        connection.execute("set statement_timeout = 0")
        for statement in filter(str.strip, script.split(";\n")):
            connection.execute(statement.encode())


def worker_url(db: Database) -> str:
    """Return the database as the worker's role."""
    parts = urlsplit(db.url)
    return parts._replace(netloc=f"{ROLE}:{parts.password}@{parts.hostname}:{parts.port}").geturl()


def finished(db: Database) -> int:
    """Count the jobs that are completed, with their image."""
    return int(db.value("select count(*) from public.images"))


def claims(number: int) -> str:
    """Return what PostgREST says of one of the users."""
    return json.dumps({"sub": f"{USER_ID}{number}", "role": "authenticated"})
