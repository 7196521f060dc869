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


def test_each_new_state_is_broadcast_to_its_user(db, alice, worker):
    job_id = alice.enqueued()
    worker.release_job(worker.claimed())
    worker.complete_job(worker.claimed())

    states = ["queued", "processing", "queued", "processing", "completed"]
    assert hints(db) == [(f"user:{alice.id}", job_id, state) for state in states]


def test_where_nobody_listens_nothing_is_sent_and_nothing_warned_of(db, alice, warnings):
    db.execute("drop function realtime.send(jsonb, text, text, boolean)")
    alice.enqueue()
    assert len(warnings) == 1

    db.execute("update private.settings set broadcasts = false")
    alice.enqueue()

    assert len(warnings) == 1


def test_a_failure_is_broadcast_whether_or_not_it_is_tried_again(db, alice, worker):
    job_id = alice.enqueued()
    worker.fail_job(worker.claimed(), "provider_error", "secret detail")
    db.pass_time("1 hour")
    worker.fail_job(worker.claimed(), "moderated", "secret detail")

    states = ["queued", "processing", "queued", "processing", "failed"]
    assert hints(db) == [(f"user:{alice.id}", job_id, state) for state in states]


def test_a_cancel_is_broadcast_when_it_has_happened(db, alice, worker):
    waiting, running = alice.enqueued(), alice.enqueued()
    alice.cancel_generation(waiting)
    job = worker.claimed()
    alice.cancel_generation(running)
    worker.cancel_job(job)

    assert [hint[1:] for hint in hints(db)[2:]] == [
        (waiting, "canceled"),
        (running, "processing"),
        (running, "canceled"),
    ]


def test_a_retry_and_a_recovery_are_broadcast(db, alice, worker):
    alice.cancel_generation(alice.enqueued())
    again = alice.retry_generation(alice.list_generations()["generations"][0]["job_id"])["job_id"]
    worker.claimed()
    db.pass_time("2 minutes")
    worker.recover_stale_jobs()

    states = ["queued", "processing", "queued"]
    assert hints(db)[2:] == [(f"user:{alice.id}", again, state) for state in states]


def test_a_batch_is_broadcast_job_by_job(db, alice):
    batch = alice.enqueue_batch(["a lighthouse", "a harbour", "a gull"])
    alice.cancel_batch(batch["batch_id"])

    jobs = [row["id"] for row in db.execute("select id::text from public.generations")]
    states = [(job_id, state) for job_id in jobs for state in ("queued", "canceled")]
    assert len(jobs) == 3
    assert sorted(hints(db)) == sorted((f"user:{alice.id}", *state) for state in states)


def test_a_hint_is_private_and_tells_which_job_and_its_state_only(db, alice):
    job_id = alice.enqueued("a secret garden", idempotency_key="k")

    (message,) = sent(db)

    assert message == {
        "topic": f"user:{alice.id}",
        "event": "generation",
        "payload": {"job_id": job_id, "status": "queued", "id": message["id"]},
        "private": True,
        "id": message["id"],
    }


def test_users_are_told_of_their_own_jobs(db, alice, bob):
    jobs = {f"user:{user.id}": user.enqueued() for user in (alice, bob)}

    assert {topic: job_id for topic, job_id, _ in hints(db)} == jobs


def test_what_is_rolled_back_is_not_broadcast(db, alice, bob):
    with alice.connection.transaction(force_rollback=True):
        alice.enqueue()
    with refused("PT402", "insufficient_credits"):
        bob.has(credits=0).enqueue()

    assert sent(db) == []


def test_what_is_not_a_new_state_is_not_broadcast(db, alice, worker):
    alice.enqueue()
    job = worker.claimed()
    before = sent(db)

    worker.heartbeat(job, progress=[50])
    worker.report_progress(job, "storing", 90)
    db.execute("update public.generations set updated_at = now(), status = status")

    assert sent(db) == before


def test_what_a_user_does_with_a_finished_generation_is_not_broadcast(db, alice, worker):
    job_id = alice.enqueued()
    worker.complete_job(worker.claimed())
    before = sent(db)

    alice.set_favorite(job_id)
    alice.set_tags(job_id, "sea")
    alice.share_image(job_id)
    alice.delete_generation(job_id)
    alice.restore_generation(job_id)

    assert sent(db) == before


def test_without_a_partition_for_today_hints_are_lost_and_jobs_go_on(db, alice, worker, warnings):
    db.execute("drop table realtime.messages_now")

    job_id = alice.enqueued()
    worker.complete_job(worker.claimed())

    assert alice.get_job_status(job_id)["status"] == "completed"
    assert warnings == [
        'WarnSendingBroadcastMessage: no partition of relation "messages" found for row'
    ]


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
        "revoke execute on function realtime.send from public",
    ],
)
def test_when_realtime_goes_or_closes_jobs_go_on(db, alice, bob, warnings, change):
    bob.enqueue()
    db.execute(change)

    bob.enqueue()
    job_id = alice.enqueued()

    assert alice.get_job_status(job_id)["status"] == "queued"
    assert [text.split(":")[:2] for text in warnings] == [["Darkroom", " not broadcast"]]


def test_users_join_their_own_topic_to_listen(alice, bob, anon):
    assert readable(alice, f"user:{alice.id}") == {"broadcast"}
    assert readable(bob, f"user:{alice.id}") == set()
    assert readable(anon, f"user:{alice.id}") == set()


@pytest.mark.parametrize("topic", ["user:", "user:%", "room:1", "", "user:{id}:more", "USER:{id}"])
def test_users_join_no_other_topic(alice, topic):
    assert readable(alice, topic.format(id=alice.id)) == set()


def test_nobody_joins_without_a_user_in_the_token(db):
    nameless = Anon(db)
    nameless.role = "authenticated"

    assert readable(nameless, "user:") == set()


def test_only_a_topic_that_was_joined_shows_its_own_messages(alice, bob):
    alice.enqueue()
    bob.enqueue()
    query = "select topic from realtime.messages"

    with alice.acting() as connection:
        before = connection.execute(query).fetchall()
        connection.execute("select set_config('realtime.topic', %s, true)", [f"user:{alice.id}"])
        joined = connection.execute(query).fetchall()

    assert (before, joined) == ([], [(f"user:{alice.id}",)])


def test_one_policy_lets_the_signed_in_read_and_none_lets_anybody_write(db):
    policies = db.execute("select cmd, roles::text from pg_policies where schemaname = 'realtime'")

    assert policies == [{"cmd": "SELECT", "roles": "{authenticated}"}]


@pytest.mark.parametrize("extension", ["broadcast", "presence"])
def test_clients_send_nothing(db, alice, anon, extension):
    topic = f"user:{alice.id}"
    for caller in (alice, anon):
        with refused("42501"), caller.acting() as connection:
            connection.execute("select set_config('realtime.topic', %s, true)", [topic])
            connection.execute(
                "insert into realtime.messages (topic, extension) values (%s, %s)",
                [topic, extension],
            )

    assert sent(db) == []


def test_clients_neither_send_by_function_nor_change_what_was_sent(db, alice):
    topic = f"user:{alice.id}"
    alice.enqueue()
    before = sent(db)

    alice.query("select realtime.send('{\"status\": \"completed\"}', 'generation', %s)", topic)
    alice.query("select set_config('realtime.topic', %s, false)", topic)
    alice.query("update realtime.messages set payload = '{}'")

    assert sent(db) == before


def test_generations_are_published_and_nothing_else(db):
    assert db.execute(PUBLISHED) == [{"tablename": "generations"}]


def test_the_migration_needs_no_right_to_make_policies(supabase_db):
    add_realtime(supabase_db)

    notices = as_postgres(supabase_db).install(SEED)
    alice = User(supabase_db)
    alice.enqueue()

    assert notices.count("no right") == 1
    assert NO_POLICY in notices
    assert readable(alice, f"user:{alice.id}") == set()
    assert len(sent(supabase_db)) == 1
    assert supabase_db.execute(PUBLISHED) == [{"tablename": "generations"}]


def test_the_migration_needs_no_right_to_change_the_publication(supabase_db):
    add_realtime(supabase_db, "alter publication supabase_realtime owner to postgres;")

    notices = install(supabase_db)
    alice = User(supabase_db)

    assert notices.count("no right") == 1
    assert NO_PUBLICATION in notices
    assert readable(alice, f"user:{alice.id}") == {"broadcast"}
    assert supabase_db.execute(PUBLISHED) == []


@pytest.mark.parametrize("kind", ["for all tables", "for tables in schema public"])
def test_a_publication_that_has_all_tables_is_left_alone(supabase_db, kind):
    create = f"create publication supabase_realtime {kind};"
    add_realtime(supabase_db, f"drop publication supabase_realtime; {create}")

    notices = install(supabase_db)

    assert "no right" not in notices
    assert {"tablename": "generations"} in supabase_db.execute(PUBLISHED)
    assert not supabase_db.execute("select from pg_publication_rel")


def test_no_publication_is_made(supabase_db):
    add_realtime(supabase_db, "drop publication supabase_realtime;")

    assert "no right" not in install(supabase_db)
    assert not supabase_db.execute("select from pg_publication")


def test_where_realtime_is_not_it_is_skipped_with_a_notice(supabase_db):
    notices = supabase_db.install()

    assert SKIPPED % "schema realtime" in notices
    assert not supabase_db.execute("select from pg_trigger where tgname ~ 'broadcast'")


@pytest.mark.parametrize(
    "part", ["function realtime.send", "function realtime.topic", "table realtime.messages"]
)
def test_where_a_part_of_realtime_is_not_all_is_skipped_with_a_notice(supabase_db, part):
    add_realtime(supabase_db, f"drop {part};")

    notices = install(supabase_db)

    assert SKIPPED % PARTS in notices
    assert not supabase_db.execute("select from pg_trigger where tgname ~ 'broadcast'")
    assert not supabase_db.execute("select from pg_policies where schemaname = 'realtime'")
    assert not supabase_db.execute(PUBLISHED)
