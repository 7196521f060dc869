"""sql/65_realtime.sql: a hint where Supabase Realtime is, nothing where it is not."""

import pytest
from actors import Anon, User, refused
from database import SEED
from realtime_stand_in import add_realtime, as_postgres, hints, install, readable, sent

SKIPPED = "Darkroom: no %s here; broadcasts are skipped, clients poll"
PARTS = "realtime.send, realtime.topic or realtime.messages"
NO_POLICY = "Darkroom: no right to make policies on realtime.messages"
NO_PUBLICATION = "Darkroom: no right to change publication supabase_realtime"
PUBLISHED = (
    "select tablename from pg_publication_tables where pubname = 'supabase_realtime'"
    " and schemaname in ('public', 'private') order by 1"
)


@pytest.fixture(scope="module")
def template(server, supabase_template):
    """Name of a database with Realtime, in which its postgres has installed Darkroom."""
    database = server.create(supabase_template)
    add_realtime(database)
    assert "no right" not in install(database)
    database.close()
    return database.name


@pytest.fixture
def warnings(alice):
    """What the server says to alice besides its answers."""
    said: list[str] = []
    alice.connection.add_notice_handler(lambda notice: said.append(notice.message_primary))
    return said


def test_each_new_state_is_broadcast_to_its_user_and_nothing_else(db, alice, bob, worker):
    with alice.connection.transaction(force_rollback=True):
        alice.enqueue()
    first = alice.enqueued("a secret garden", idempotency_key="k")
    worker.release_job(worker.claimed())
    job = worker.claimed()
    worker.heartbeat(job, progress=[50])
    worker.report_progress(job, "storing", 90)
    db.execute("update public.generations set updated_at = now(), status = status")
    worker.complete_job(job)
    alice.set_favorite(first)
    alice.delete_generation(first)
    second = alice.enqueued()
    worker.fail_job(worker.claimed(), "moderated", "secret detail")
    (third,) = bob.enqueue_batch(["a harbour"])["job_ids"]
    job = worker.claimed()
    bob.cancel_generation(third)
    worker.cancel_job(job)

    told = [(alice, first, state) for state in ("queued", "processing", "queued")]
    told += [(alice, first, state) for state in ("processing", "completed")]
    told += [(alice, second, state) for state in ("queued", "processing", "failed")]
    told += [(bob, third, state) for state in ("queued", "processing", "canceled")]
    assert hints(db) == [(f"user:{user.id}", *each) for user, *each in told]
    message = sent(db)[0]
    assert (message["event"], message["private"]) == ("generation", True)
    assert message["payload"] == {"job_id": first, "status": "queued", "id": message["id"]}


def test_without_a_partition_for_today_hints_are_lost_and_jobs_go_on(db, alice, worker, warnings):
    db.execute("drop table realtime.messages_now")

    job_id = alice.enqueued()
    worker.complete_job(worker.claimed())

    assert alice.get_job_status(job_id)["status"] == "completed"
    assert len(warnings) == 1
    assert 'no partition of relation "messages" found for row' in warnings[0]
    db.execute("update private.settings set broadcasts = false")  # where nobody ever listens
    alice.enqueue()
    assert len(warnings) == 1


def test_while_realtime_locks_its_table_hints_are_lost_and_jobs_go_on(db, alice, warnings):
    alice.connection.execute("set statement_timeout = '5s'")
    changing = db.connect()
    with changing.transaction():
        changing.execute("lock table realtime.messages in access exclusive mode")
        job_id = alice.enqueued()

    assert alice.get_job_status(job_id)["status"] == "queued"
    assert warnings == ["WarnSendingBroadcastMessage: canceling statement due to lock timeout"]
    assert sent(db) == []


@pytest.mark.parametrize(
    "change",
    [
        "drop schema realtime cascade",
        "drop function realtime.send",
        "revoke usage on schema realtime from anon, authenticated, service_role, supabase_postgres",
    ],
)
def test_when_realtime_goes_or_closes_jobs_go_on(db, alice, bob, warnings, change):
    bob.enqueue()
    db.execute(change)

    bob.enqueue()
    job_id = alice.enqueued()

    assert alice.get_job_status(job_id)["status"] == "queued"
    assert [text.split(":")[:2] for text in warnings] == [["Darkroom", " not broadcast"]]


def test_users_join_their_own_topic_and_no_other(alice, bob, anon, db):
    nameless = Anon(db)
    nameless.role = "authenticated"

    assert readable(alice, f"user:{alice.id}") == {"broadcast"}
    for caller in (bob, anon, nameless):
        assert readable(caller, f"user:{alice.id}") == readable(caller, "user:") == set()
    for topic in ("user:", "user:%", "", f"user:{alice.id}:more", f"USER:{alice.id}"):
        assert readable(alice, topic) == set()


def test_clients_neither_send_nor_change_what_was_sent(db, alice, anon):
    topic = f"user:{alice.id}"
    alice.enqueue()
    before = sent(db)

    for caller in (alice, anon):
        with refused("42501"), caller.acting() as connection:
            connection.execute("select set_config('realtime.topic', %s, true)", [topic])
            query = "insert into realtime.messages (topic, extension) values (%s, 'broadcast')"
            connection.execute(query, [topic])
    alice.query("select realtime.send('{\"status\": \"completed\"}', 'generation', %s)", topic)
    alice.query("select set_config('realtime.topic', %s, false)", topic)
    alice.query("update realtime.messages set payload = '{}'")

    assert sent(db) == before


@pytest.mark.parametrize("missing", ["policies", "publication"])
def test_the_migration_needs_no_right_on_what_is_supabases(supabase_db, missing):
    if missing == "policies":
        add_realtime(supabase_db)
        notices = as_postgres(supabase_db).install(SEED)
    else:
        add_realtime(supabase_db, "alter publication supabase_realtime owner to postgres;")
        notices = install(supabase_db)
    alice = User(supabase_db)
    alice.enqueue()

    may_join, published = missing == "publication", missing == "policies"
    assert notices.count("no right") == 1
    assert (NO_PUBLICATION if may_join else NO_POLICY) in notices
    assert len(sent(supabase_db)) == 1
    assert readable(alice, f"user:{alice.id}") == ({"broadcast"} if may_join else set())
    assert supabase_db.execute(PUBLISHED) == [{"tablename": "generations"}] * published


@pytest.mark.parametrize("kind", ["for all tables", None])
def test_a_publication_that_has_all_tables_is_left_alone_and_none_is_made(supabase_db, kind):
    create = f"create publication supabase_realtime {kind};" if kind else ""
    add_realtime(supabase_db, f"drop publication supabase_realtime; {create}")

    notices = install(supabase_db)

    assert "no right" not in notices
    assert supabase_db.value("select count(*) from pg_publication") == bool(kind)
    assert not supabase_db.execute("select from pg_publication_rel")


@pytest.mark.parametrize("part", ["schema", "function send", "function topic", "table messages"])
def test_where_realtime_or_a_part_of_it_is_not_all_is_skipped_with_a_notice(supabase_db, part):
    kind, _, name = part.partition(" ")
    if name:
        add_realtime(supabase_db, f"drop {kind} realtime.{name};")

    notices = install(supabase_db) if name else supabase_db.install()

    assert SKIPPED % (PARTS if name else "schema realtime") in notices
    assert not supabase_db.execute("select from pg_trigger where tgname ~ 'broadcast'")
    assert not supabase_db.execute("select from pg_policies where schemaname = 'realtime'")
    assert not supabase_db.execute(PUBLISHED)
