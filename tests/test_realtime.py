"""sql/65_realtime.sql: a hint where Supabase Realtime is, nothing where it is not."""

import pytest
from actors import User, Worker
from database import SEED

REALTIME = """
create schema realtime;
create table realtime.messages (
  id bigint generated always as identity,
  topic text, extension text, payload jsonb, event text, private boolean
);
alter table realtime.messages enable row level security;
create function realtime.topic() returns text language sql stable
as $$ select current_setting('realtime.topic', true) $$;
create function realtime.send(payload jsonb, event text, topic text, private boolean)
returns void language sql as $$
  insert into realtime.messages (topic, extension, payload, event, private)
  values ($3, 'broadcast', $1, $2, $4)
$$;
create publication supabase_realtime;
"""


@pytest.fixture
def realtime_db(supabase_db):
    """A database with a stand-in for Supabase Realtime that records what is sent."""
    assert supabase_db.psql(script=REALTIME).returncode == 0
    supabase_db.install(SEED)
    return supabase_db


def sent(db) -> list[dict[str, object]]:
    """Return what was broadcast, in order."""
    return db.execute("select topic, event, payload, private from realtime.messages order by id")


def test_each_new_state_is_broadcast_to_its_user(realtime_db):
    alice, worker = User(realtime_db), Worker(realtime_db)

    job_id = alice.enqueued()
    worker.release_job(worker.claimed())
    worker.complete_job(worker.claimed())

    states = ["queued", "processing", "queued", "processing", "completed"]
    assert sent(realtime_db) == [
        {
            "topic": f"user:{alice.id}",
            "event": "generation",
            "payload": {"job_id": job_id, "status": status},
            "private": True,
        }
        for status in states
    ]


def test_what_is_not_a_new_state_is_not_broadcast(realtime_db):
    alice, worker = User(realtime_db), Worker(realtime_db)
    alice.enqueue()
    job = worker.claimed()
    before = sent(realtime_db)

    worker.heartbeat(job, progress=[50])
    worker.report_progress(job, "storing", 90)
    realtime_db.execute("update public.generations set updated_at = now(), status = status")

    assert sent(realtime_db) == before


def test_what_a_user_does_with_a_finished_generation_is_not_broadcast(realtime_db):
    alice, worker = User(realtime_db), Worker(realtime_db)
    job_id = alice.enqueued()
    worker.complete_job(worker.claimed())
    before = sent(realtime_db)

    alice.set_favorite(job_id)
    alice.set_tags(job_id, "sea")
    alice.share_image(job_id)
    alice.delete_generation(job_id)
    alice.restore_generation(job_id)

    assert sent(realtime_db) == before


def test_users_receive_their_own_topic_only(realtime_db):
    alice, bob = User(realtime_db), User(realtime_db)
    alice.enqueue()
    realtime_db.execute("grant usage on schema realtime to authenticated")
    realtime_db.execute("grant select on realtime.messages to authenticated")
    query = f"set local realtime.topic = 'user:{alice.id}'"

    for user, count in ((alice, 1), (bob, 0)):
        with user.acting() as connection:
            connection.execute(query)
            rows = connection.execute("select * from realtime.messages").fetchall()
        assert len(rows) == count


def test_generations_are_published_and_nothing_else(realtime_db):
    published = realtime_db.execute("select tablename from pg_publication_tables")

    assert published == [{"tablename": "generations"}]


def test_where_realtime_is_not_it_is_skipped_with_a_notice(supabase_db):
    notices = supabase_db.install()

    assert "Darkroom: no schema realtime here; broadcasts are skipped, clients poll" in notices
    assert not supabase_db.execute("select from pg_trigger where tgname ~ 'broadcast'")
