"""sql/84_erasure.sql and sql/85_retention.sql: what is kept, what is erased, and what never is."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psycopg
import pytest
from actors import Job, Service, User, Worker, outcome, refused, together
from database import Database, assert_books_balance, unchanged


def keep(db: Database, **settings: str | None) -> None:
    """Set how long things are kept, without the floors that protect operators."""
    for name, interval in settings.items():
        db.execute(f"update private.settings set {name} = %s", interval)


def completed(user: User, worker: Worker, *, preview: bool = False) -> Job:
    """Have a generation finished, with one image and perhaps its preview."""
    user.enqueue()
    job = worker.claimed()
    path = f"{user.id}/{job.id}/0.preview.webp" if preview else None
    worker.complete_job(job, images=[job.image(preview_path=path)])
    return job


def files_of(job: Job, *, preview: bool = False) -> list[tuple[str, str]]:
    """Return the files of a generation as the list names them."""
    names = ["0.png", "0.preview.webp"] if preview else ["0.png"]
    return [("generations", f"{job.user_id}/{job.id}/{name}") for name in names]


def deleted_by_user(db: Database, job: Job) -> None:
    db.execute("update public.generations set deleted_at = now() where id = %s", job.job_id)


def deleted(db: Database, user: User) -> None:
    """Delete a user as the auth server does, on a connection of its own."""
    db.connect().execute("delete from auth.users where id = %s", [user.id])


def stored(db: Database, path: str, bucket: str = "generations") -> tuple[str, str]:
    """Have a file in Storage."""
    db.execute("insert into storage.objects (bucket_id, name) values (%s, %s)", bucket, path)
    return bucket, path


def removed(db: Database, *files: tuple[str, str]) -> None:
    """Have files deleted by Storage."""
    for bucket, path in files:
        db.execute("delete from storage.objects where (bucket_id, name) = (%s, %s)", bucket, path)


def age_files(db: Database, interval: str) -> None:
    """Let files be older by this."""
    db.execute("update storage.objects set updated_at = updated_at - %s::interval", interval)


def generations(db: Database) -> set[str]:
    return {str(row["id"]) for row in db.execute("select id from public.generations")}


def expired(db: Database) -> set[tuple[str, str]]:
    rows = db.execute("select bucket, path from private.expired_files")
    return {(row["bucket"], row["path"]) for row in rows}


def rows_that_mention(db: Database, text: str) -> list[str]:
    return [name for name, rows in db.snapshot().items() for row in rows if text in row]


# --- generations ---


def test_generations_are_kept_for_ever_by_default(db, alice, worker):
    completed(alice, worker)
    db.pass_time("89 days")

    with unchanged(db):
        assert worker.apply_retention() == 0


def test_an_old_generation_is_hidden_at_once_and_erased_with_its_last_file(db, alice, worker):
    old, keep_days = completed(alice, worker, preview=True), "30 days"
    keep(db, keep_generations=keep_days)
    db.pass_time("31 days")
    young = completed(alice, worker)

    assert worker.apply_retention() == 2
    hidden = "select id from public.generations where deleted_at is not null"
    assert db.value(hidden) == old.job_id

    image, preview = files_of(old, preview=True)
    assert set(worker.list_expired_files()) == {image, preview}
    worker.forget_files(image)
    assert generations(db) == {old.id, young.id}
    worker.forget_files(preview)
    assert generations(db) == {young.id}
    assert rows_that_mention(db, old.id) == ["public.credit_ledger"]  # the books stay


@pytest.mark.parametrize("code", ["moderated", "internal"])
def test_what_has_no_file_is_erased_at_once(db, alice, worker, code):
    db.execute("update private.settings set max_attempts = 1")
    job_id = alice.enqueued()
    worker.fail_job(worker.claimed(), code)
    keep(db, keep_generations="1 day")
    db.pass_time("2 days")

    assert worker.apply_retention() == 1

    assert job_id not in generations(db)
    assert_books_balance(db)


def test_favorites_and_live_jobs_are_never_too_old(db, alice, worker):
    favorite = completed(alice, worker)
    db.execute("update public.generations set is_favorite = true")
    alice.enqueue()
    running = worker.claimed()
    queued = alice.enqueued()
    keep(db, keep_generations="1 day")
    db.pass_time("100 days")

    worker.apply_retention()

    assert generations(db) == {favorite.id, running.id, queued}
    assert expired(db) == set()
    assert_books_balance(db)


def test_what_became_a_favorite_since_it_was_chosen_is_kept(db, alice, worker):
    job = completed(alice, worker)
    keep(db, keep_generations="1 day")
    db.pass_time("2 days")

    db.execute("update public.generations set is_favorite = true")
    assert db.value("select private.expire_generations(%s)", [job.job_id]) == 0

    assert generations(db) == {job.id}
    assert expired(db) == set()


def test_what_its_user_deleted_is_erased_after_a_while(db, alice, worker):
    job, other = completed(alice, worker), completed(alice, worker)
    deleted_by_user(db, job)

    db.pass_time("29 days")
    assert worker.apply_retention() == 0
    db.pass_time("2 days")
    worker.apply_retention()

    assert expired(db) == set(files_of(job))
    assert generations(db) == {job.id, other.id}


def test_a_generation_restored_after_it_was_marked_keeps_its_files(db, alice, worker):
    keep(db, keep_deleted="0")
    job = completed(alice, worker)
    deleted_by_user(db, job)
    worker.apply_retention()

    db.execute("update public.generations set deleted_at = null")

    assert worker.list_expired_files() == []
    assert expired(db) == set()
    assert generations(db) == {job.id}


def test_a_batch_goes_with_its_last_generation(db, alice, worker):
    keep(db, keep_deleted="0")
    jobs = [completed(alice, worker), completed(alice, worker)]
    db.execute(
        "with batch as (insert into public.batches (user_id, request_hash, job_count)"
        " values (%s, '', 2) returning id)"
        " update public.generations set batch_id = (select id from batch), deleted_at = now()",
        alice.id,
    )
    worker.apply_retention()

    worker.forget_files(*files_of(jobs[0]))
    assert db.value("select count(*) from public.batches") == 1
    worker.forget_files(*files_of(jobs[1]))
    assert db.value("select count(*) from public.batches") == 0


def test_each_call_looks_at_a_few_rows_and_all_are_met(db, alice, worker):
    db.lift_limits()
    alice.has(credits=100)
    jobs = [completed(alice, worker) for _ in range(10)]
    db.execute(
        "update public.generations set is_favorite = true where id = any(%s)",
        [job.job_id for job in jobs[:5]],
    )
    keep(db, keep_generations="1 day")
    db.pass_time("2 days")

    marked = [worker.apply_retention(at_most=2) for _ in range(6)]

    assert marked == [0, 0, 1, 2, 2, 0]
    assert expired(db) == {file for job in jobs[5:] for file in files_of(job)}


def test_two_sessions_at_once_do_the_work_once(db, alice, worker):
    db.lift_limits()
    alice.has(credits=100)
    for _ in range(20):
        completed(alice, worker)
    keep(db, keep_generations="1 day")
    db.pass_time("2 days")
    others = [Worker(db) for _ in range(4)]

    counts = together([other.apply_retention for other in others])

    assert sum(counts) == 20
    lists = together([partial(other.list_expired_files, 10) for other in others])
    files = [file for each in lists for file in each]
    assert len(files) == len(set(files)) == 20


# --- the list of files ---


def test_a_listed_file_is_the_callers_for_a_lease_and_then_listed_again(db, alice, worker):
    keep(db, keep_deleted="0")
    job = completed(alice, worker)
    deleted_by_user(db, job)
    worker.apply_retention()

    assert worker.list_expired_files() == files_of(job)
    assert Worker(db).list_expired_files() == []
    db.pass_time("61 seconds")
    assert Worker(db).list_expired_files() == files_of(job)


def test_forgetting_twice_or_what_was_never_listed_changes_nothing(db, alice, worker):
    keep(db, keep_deleted="0")
    job, other = completed(alice, worker), completed(alice, worker)
    deleted_by_user(db, job)
    worker.apply_retention()
    worker.forget_files(*files_of(job))

    with unchanged(db):
        worker.forget_files(*files_of(job))
        worker.forget_files(*files_of(other), ("inputs", "nobody"))


def test_what_storage_still_has_is_not_forgotten(db, alice, worker):
    keep(db, keep_deleted="0")
    job = completed(alice, worker, preview=True)
    image, preview = files_of(job, preview=True)
    stored(db, image[1])
    deleted_by_user(db, job)
    worker.apply_retention()

    assert worker.forget_files(image, preview) == 1  # Storage said yes and did nothing
    assert expired(db) == {image}
    assert generations(db) == {job.id}
    removed(db, image)
    assert worker.forget_files(image, preview) == 0
    assert generations(db) == set()


def test_a_source_that_storage_does_not_know_is_listed(db, alice, worker):
    path = f"{alice.id}/cat.jpg"
    db.execute(
        "insert into private.expired_files (bucket, path, user_id) values ('inputs', %s, %s)",
        path,
        alice.id,
    )

    assert worker.list_expired_files() == [("inputs", path)]


def test_a_source_uploaded_again_after_it_was_marked_is_not_listed(db, alice, worker):
    keep(db, keep_inputs="30 days")
    again, once = (stored(db, f"{alice.id}/{name}.jpg", "inputs") for name in ("cat", "dog"))
    age_files(db, "31 days")
    worker.apply_retention()
    assert expired(db) == {again, once}

    db.execute("update storage.objects set updated_at = now() where name = %s", again[1])

    assert worker.list_expired_files() == [once]
    assert expired(db) == {once}


# --- attempts ---


def test_old_attempts_of_finished_generations_are_trimmed(db, alice, worker):
    db.execute("update private.plans set busy_after = null")
    completed(alice, worker)
    alice.enqueue()
    worker.release_job(worker.claimed())  # not finished: it may be claimed again
    db.pass_time("91 days")
    completed(alice, worker)  # the released one comes first
    alice.enqueue()
    worker.release_job(worker.claimed())
    before = db.value("select count(*) from private.attempts")

    worker.apply_retention()

    ages = db.execute("select now() - ended_at < '1 day' as is_young from private.attempts")
    assert before == 4
    assert [row["is_young"] for row in ages] == [True, True]


def test_an_old_attempt_stays_while_its_job_is_live(db, alice, worker):
    alice.enqueue()
    worker.release_job(worker.claimed())
    db.pass_time("91 days")

    assert worker.apply_retention() == 0


# --- the ledger ---


def test_the_ledger_is_kept_for_ever_by_default(db, alice, worker):
    completed(alice, worker)
    db.pass_time("10 years")

    worker.apply_retention()

    assert alice.ledger() == [("grant", 10), ("charge", -1)]


def test_nobody_deletes_the_entries_of_a_user_who_is_here(db, alice):
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        db.execute("delete from public.credit_ledger")

    assert alice.ledger() == [("grant", 10)]


# --- deleting a user ---


def test_deleting_a_user_leaves_nothing_but_the_list_of_files(db, alice, bob, worker):
    db.lift_limits()
    completed(bob, worker)
    job = completed(alice, worker, preview=True)
    alice.enqueue()
    worker.fail_job(worker.claimed(), "moderated")
    alice.enqueue()
    worker.claimed()
    alice.enqueue()
    source = stored(db, f"{alice.id}/cat.jpg", "inputs")
    lost = stored(db, f"{alice.id}/{uuid.uuid4()}/0.png")
    before = rows_that_mention(db, bob.id)

    deleted(db, alice)

    assert set(rows_that_mention(db, alice.id)) == {"private.expired_files"}
    assert expired(db) == {*files_of(job, preview=True), source, lost}
    assert rows_that_mention(db, bob.id) == before
    removed(db, source, lost)
    worker.forget_files(*expired(db))
    assert rows_that_mention(db, alice.id) == []
    assert_books_balance(db)


def test_nobody_elses_file_is_ever_marked(db, alice, bob, worker):
    job = completed(bob, worker)
    near = str(uuid.UUID(int=uuid.UUID(alice.id).int ^ 1))
    for path in (f"{near}/a.png", f"{alice.id}0/a.png", f"{alice.id}", f"x/{alice.id}/a.png"):
        stored(db, path, "inputs")
    stored(db, f"{bob.id}/{alice.id}/0.png")
    stored(db, files_of(job)[0][1])
    db.execute("insert into storage.buckets (id, name) values ('avatars', 'avatars')")
    stored(db, f"{alice.id}/me.png", "avatars")  # another application's bucket

    deleted(db, alice)

    assert expired(db) == set()


def test_a_path_of_another_user_cannot_get_onto_the_list(db, alice, bob):
    mark = "insert into private.expired_files (bucket, path, user_id) values ('inputs', %s, %s)"
    with pytest.raises(psycopg.errors.CheckViolation):
        db.execute(mark, f"{bob.id}/a.png", alice.id)


@pytest.mark.parametrize("keep_books", ["0", "10 years"])
def test_the_books_of_deleted_users_are_kept_as_long_as_the_operator_says(
    db, alice, bob, worker, keep_books
):
    keep(db, keep_ledger_of_deleted_users=keep_books)
    alice.enqueue()

    deleted(db, alice)
    entries = [("grant", 10), ("charge", -1)] if keep_books != "0" else []
    assert alice.ledger() == entries
    db.pass_time("9 years")
    worker.apply_retention()
    assert alice.ledger() == entries
    db.pass_time("2 years")
    worker.apply_retention()
    assert alice.ledger() == []
    assert bob.ledger() == [("grant", 10)]


def test_a_user_whose_deletion_is_refused_keeps_everything(db, alice, worker):
    completed(alice, worker)
    alice.enqueue()
    db.execute(
        "create function private.soft() returns trigger language plpgsql as"
        " 'begin return null; end';"
        "create trigger zz_soft before delete on auth.users"
        " for each row execute function private.soft()"
    )

    with unchanged(db):
        deleted(db, alice)


def test_deleting_a_user_is_no_deadlock_with_a_job_that_ends(db, alice, worker):
    finished = completed(alice, worker)
    alice.enqueue()
    job = worker.claimed()
    bystander = db.connect()
    bystander.autocommit = False
    bystander.execute("select from public.generations where id = %s for update", [finished.job_id])
    auth = db.connect()

    with ThreadPoolExecutor(2) as pool:
        deleting = pool.submit(auth.execute, "delete from auth.users where id = %s", [alice.id])
        db.wait_for_lock(auth)
        completing = pool.submit(outcome, lambda: worker.complete_job(job))
        db.wait_for_lock(worker.connection)
        bystander.rollback()
        deleting.result()

        assert completing.result().code == "DR001"
    assert rows_that_mention(db, job.id) == []


def test_deleting_a_user_waits_for_a_job_that_is_ending(db, alice, worker):
    alice.enqueue()
    job = worker.claimed()
    worker.connection.autocommit = False
    worker.complete_job(job)
    auth = db.connect()

    with ThreadPoolExecutor(1) as pool:
        deleting = pool.submit(auth.execute, "delete from auth.users where id = %s", [alice.id])
        db.wait_for_lock(auth)
        worker.connection.commit()
        deleting.result()

    assert expired(db) == set(files_of(job))


@pytest.mark.parametrize("seed", range(3))
def test_users_are_deleted_while_everything_goes_on(db, seed):
    db.lift_limits()
    users = [User(db).has(credits=50) for _ in range(6)]
    jobs = {user: [user.enqueued() for _ in range(10)] for user in users}
    answers: list[object] = []

    def work(worker: Worker) -> None:
        for _ in range(20):
            for job in worker.claim_jobs(2):
                ending = [worker.complete_job, worker.release_job][(job.token + seed) % 2]
                answers.append(outcome(partial(ending, job)))

    def cancel(user: User) -> None:
        for job_id in jobs[user]:
            answers.append(outcome(partial(user.call, "public.cancel_generation", job_id=job_id)))

    def enqueue(user: User) -> None:
        device = user.on_another_device()
        for _ in range(10):
            answers.append(outcome(device.enqueue))

    def delete(user: User) -> None:
        answers.append(outcome(partial(deleted, db, user)))

    together(
        [
            *(partial(work, Worker(db)) for _ in range(3)),
            *(partial(cancel, user) for user in users),
            *(partial(enqueue, user) for user in users),
            *(partial(delete, user) for user in users[:4]),
        ]
    )

    codes = {getattr(answer, "code", None) for answer in answers}
    assert codes <= {None, "DR001", "PT401", "PT404", "PT409"}
    for user in users[:4]:
        assert set(rows_that_mention(db, user.id)) <= {"private.expired_files"}
    assert_books_balance(db)


@pytest.mark.parametrize("count", [1000, 10000])
def test_how_long_deleting_a_user_takes(db, alice, bob, count):
    alice.has_history(count)
    bob.has_history(1000)

    started = time.perf_counter()
    deleted(db, alice)
    seconds = time.perf_counter() - started

    print(f"deleting a user with {count} generations: {seconds:.2f} s")
    assert len(expired(db)) == 2 * count
    assert db.value("select count(*) from public.generations") == 1000
    assert seconds < count / 100  # GoTrue and its proxies give up after some ten seconds


# --- orphans ---


def test_an_output_without_a_row_is_found_after_a_day(db, alice, worker):
    job = completed(alice, worker, preview=True)
    for _, path in files_of(job, preview=True):
        stored(db, path)
    orphan = stored(db, f"{alice.id}/{job.id}/1.png")
    ghost = stored(db, f"{uuid.uuid4()}/{uuid.uuid4()}/0.png")  # of a user who is gone
    worker.apply_retention()
    assert expired(db) == set()

    age_files(db, "25 hours")
    worker.apply_retention()

    assert expired(db) == {orphan, ghost}
    assert set(worker.list_expired_files()) == {orphan, ghost}
    removed(db, orphan, ghost)
    assert worker.forget_files(orphan, ghost) == 0
    assert expired(db) == set()
    assert generations(db) == {job.id}


def test_files_of_live_jobs_are_no_orphans(db, alice, worker):
    alice.enqueue()
    running = stored(db, files_of(worker.claimed())[0][1])
    queued = stored(db, f"{alice.id}/{alice.enqueued()}/0.png")
    age_files(db, "10 days")

    worker.apply_retention()

    assert expired(db) == set(), (running, queued)


def test_a_file_that_came_to_be_an_image_after_all_is_not_listed(db, alice, worker):
    alice.enqueue()
    job = worker.claimed()
    (file,) = files_of(job)
    db.execute(
        "insert into private.expired_files (bucket, path, user_id) values (%s, %s, %s)",
        *file,
        alice.id,
    )
    worker.complete_job(job)

    assert worker.list_expired_files() == []
    assert expired(db) == set()


@pytest.mark.parametrize("path", ["logo.png", "{id}/logo.png", "x/{id}/0.png", "{id}/{id}"])
def test_what_does_not_look_like_an_output_is_left_alone(db, alice, worker, path):
    stored(db, path.format(id=alice.id))
    age_files(db, "10 years")

    worker.apply_retention()

    assert expired(db) == set()


def test_sources_are_kept_for_ever_or_as_long_as_the_operator_says(db, alice, bob, worker):
    old = stored(db, f"{alice.id}/cat.jpg", "inputs")
    stored(db, f"{bob.id}/dog.jpg", "inputs")
    bob.enqueue()  # it may need its source
    age_files(db, "31 days")
    stored(db, f"{alice.id}/new.jpg", "inputs")

    keep(db, keep_inputs=None)
    worker.apply_retention()
    assert expired(db) == set()
    db.execute("update private.settings set keep_inputs = default")
    worker.apply_retention()
    assert expired(db) == {old}


def test_what_a_user_uploaded_after_being_deleted_is_swept_too(db, alice, worker):
    deleted(db, alice)
    late = stored(db, f"{alice.id}/late.jpg", "inputs")  # the token is good for another hour
    worker.apply_retention()
    assert expired(db) == set()
    age_files(db, "25 hours")

    worker.apply_retention()

    assert expired(db) == {late}
    assert worker.list_expired_files() == [late]


def test_the_walk_through_storage_passes_every_file(db, alice, worker):
    paths = [f"{alice.id}/{uuid.UUID(int=1)}/{n}.png" for n in range(9)]
    for path in paths:
        stored(db, path, "inputs")  # the same name twice, and pages that end between the two
    orphans = {stored(db, path) for path in paths}
    age_files(db, "2 days")

    for _ in range(9):
        worker.apply_retention(at_most=3)

    assert expired(db) == orphans


# --- one bad row ---


def poison(db: Database, table: str, row: str, event: str) -> None:
    """Have whatever happens to a row fail."""
    db.execute(
        "create function private.poison() returns trigger language plpgsql as"
        " $$ begin raise 'poisoned'; end $$;"
        f"create trigger zz_poison before {event} on {table}"
        f" for each row when (old.{row}) execute function private.poison()"
    )


def skipped(db: Database) -> dict[str, int]:
    """What health says was passed over, and where."""
    return dict(Service(db).queue_health()["skipped"]["steps"])


@pytest.mark.parametrize(
    "name", ["{id}", "{id}/", "{id}//a", "{id}/../b", "{id}/%00\\\n\u202e?#", "{id}/" + "x" * 987]
)
@pytest.mark.parametrize("change", ["name", "owner", "updated_at", "created_at"])
def test_whatever_is_stored_others_files_are_found_and_erased(db, worker, name, change):
    alice, bob = User(db), User(db)
    bad = stored(db, name.format(id=alice.id), "inputs")
    old = stored(db, f"{bob.id}/dog.jpg", "inputs")
    age_files(db, "31 days")
    if change != "name":
        db.execute(f"update storage.objects set {change} = null where name = %s", bad[1])

    worker.apply_retention()
    deleted(db, alice)
    deleted(db, bob)

    assert old in expired(db)
    assert expired(db) <= {bad, old}
    assert skipped(db) == {}


def test_a_file_with_the_name_of_its_folder_is_erased_like_any_other(db, alice, worker):
    bare = stored(db, alice.id, "inputs")
    deleted(db, alice)
    age_files(db, "25 hours")

    worker.apply_retention()

    assert worker.list_expired_files() == [bare]
    removed(db, bare)
    assert worker.forget_files(bare) == 0


@pytest.mark.parametrize(
    "case",
    [
        ("expire_generations", "public.generations", "id = '{job}'", "update"),
        ("expire_generations", "public.generations", "id = '{job}'", "delete"),
        ("attempts", "private.attempts", "generation_id = '{job}'", "delete"),
        ("erase_ledgers", "public.credit_ledger", "user_id = '{user}'", "delete"),
        ("mark_files", "private.expired_files", "path = '{user}/cat.jpg'", "insert"),
    ],
)
def test_a_bad_row_is_passed_over_and_named_and_all_others_are_done(db, worker, case):
    step, table, row, event = case
    jobs = []
    for user in [User(db) for _ in range(4)]:
        user.enqueue()
        jobs.append(worker.claimed())
        worker.fail_job(jobs[-1], "moderated")  # no file: erased at once
        user.has(credits=20)
        stored(db, f"{user.id}/cat.jpg", "inputs")
    bad = jobs[1]
    row = row.format(job=bad.id, user=bad.user_id)
    if event == "insert":
        db.execute(f"alter table {table} add check (not {row}) no inherit not valid")
    else:
        poison(db, table, row, event)
    keep(db, keep_generations="100 days", keep_attempts="90 days")
    if step == "erase_ledgers":  # of users who are gone
        keep(db, keep_ledger_of_deleted_users="100 days")
        db.execute("delete from auth.users")
    db.pass_time("101 days")
    age_files(db, "101 days")

    worker.apply_retention()

    left = db.execute("select user_id from public.generations")
    if step == "erase_ledgers":
        left += db.execute("select user_id from public.credit_ledger")
    unmarked = {str(job.user_id) for job in jobs} - {path.split("/")[0] for _, path in expired(db)}
    assert unmarked | {str(row["user_id"]) for row in left} <= {str(bad.user_id)}
    assert skipped(db)[step] == 1
    note = db.row("select key from private.skipped_rows where step = %s", step)
    assert str(bad.id) in note["key"] or str(bad.user_id) in note["key"]
    (alert,) = [a for a in Service(db).queue_health()["alerts"] if a["alert"] == "skipped_rows"]
    assert step in alert["detail"] and str(bad.user_id) not in str(alert)


def test_what_is_mended_is_done_and_no_longer_named(db, alice, worker):
    keep(db, keep_deleted="0")
    jobs = [completed(alice, worker) for _ in range(3)]
    for job in jobs:
        deleted_by_user(db, job)
    poison(db, "public.generations", f"id = '{jobs[0].id}'", "delete")
    worker.apply_retention()
    files = [file for job in jobs for file in files_of(job)]

    assert worker.forget_files(*files) == 1  # which goes with its generation, later
    assert generations(db) == {jobs[0].id}
    assert skipped(db) == {"forget": 1}
    assert worker.apply_retention() == 0  # nothing new to do: whoever waits for that goes on
    db.execute("drop trigger zz_poison on public.generations")
    db.pass_time("2 minutes")
    worker.forget_files(*worker.list_expired_files())

    assert generations(db) == set()
    assert skipped(db) == {}


def test_more_bad_rows_than_are_looked_at_hold_up_nobody(db, alice, bob, worker):
    keep(db, keep_deleted="0")
    db.lift_limits()
    bad, good = [completed(alice, worker) for _ in range(4)], completed(bob, worker)
    for job in (*bad, good):
        deleted_by_user(db, job)
        db.pass_time("1 minute")
    poison(db, "public.generations", "user_id = '" + alice.id + "'", "update")
    db.execute("update private.retention_walks set place = 'ffffffff-ffff-ffff-ffff-ffffffffffff'")
    db.execute(
        "create trigger zz_poison before insert on private.expired_files for each row"
        f" when (new.user_id = '{alice.id}') execute function private.poison()"
    )

    for _ in range(3):
        worker.apply_retention(at_most=2)

    assert expired(db) == set(files_of(good))
    assert skipped(db) == {"expire_generations": 4}


def test_files_that_storage_keeps_for_a_day_are_told(db, alice):
    stored(db, f"{alice.id}/cat.jpg", "inputs")
    deleted(db, alice)
    assert skipped(db) == {}

    db.pass_time("25 hours")

    assert skipped(db) == {"storage": 1}


def test_a_row_that_somebody_has_locked_for_ever_holds_up_no_other(db, alice, bob, worker):
    keep(db, keep_deleted="0")
    jobs = [completed(user, worker) for user in (alice, bob)]
    files = [file for job in jobs for file in files_of(job)]
    for job in jobs:
        deleted_by_user(db, job)
    worker.apply_retention()

    with db.connect().transaction() as forgotten:
        query = "select from public.images where generation_id = %s for update"
        forgotten.connection.execute(query, [jobs[0].id])
        assert worker.forget_files(*files) == 1

    assert generations(db) == {jobs[0].id}
    assert skipped(db) == {}  # once or twice is nothing to tell
    assert worker.forget_files(*files) == 0
    assert db.execute("select * from private.skipped_rows") == []


@pytest.mark.parametrize("setting", ["keep_inputs", "keep_deleted", "lease", "keep_deliveries"])
def test_a_time_out_of_reach_is_refused_where_it_is_set(db, setting):
    with pytest.raises(psycopg.errors.CheckViolation, match="times_are_in_reach"):
        keep(db, **{setting: "300000 years"})


# --- deadlocks ---


def wait_in_order(db: Database, held: str, *calls: Callable[[], object]) -> list[object]:
    """Have calls come up against a row somebody holds, one after the other; then let go."""
    waiting = (
        "select count(*) from pg_stat_activity where datname = current_database()"
        " and wait_event_type = 'Lock'"
    )
    holder = db.connect()
    with ThreadPoolExecutor(len(calls)) as pool:
        with holder.transaction():
            holder.execute(f"select from {held} for update".encode())
            futures = []
            for call in calls:
                futures.append(pool.submit(outcome, call))
                deadline = time.monotonic() + 10
                while db.value(waiting) < sum(not future.done() for future in futures):
                    assert time.monotonic() < deadline
        return [future.result() for future in futures]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_forgetting_files_is_no_deadlock_with_retention(db, alice, worker, order):
    keep(db, keep_deleted="0")
    job = completed(alice, worker)
    deleted_by_user(db, job)
    worker.apply_retention()
    calls = (Worker(db).apply_retention, partial(Worker(db).forget_files, *files_of(job)))

    row = f"public.generations where id = '{job.id}'"
    answers = wait_in_order(db, row, *(calls[n] for n in order))

    # Retention would pass over a row at which it is the victim.
    assert "40P01" not in str([answers, db.execute("select code from private.skipped_rows")])
    worker.apply_retention()
    worker.forget_files(*files_of(job))
    assert generations(db) == set()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("row", ["images where generation_id", "generations where id"])
def test_deleting_a_user_is_no_deadlock_with_retention(db, alice, worker, row, order):
    keep(db, keep_generations="1 day")
    db.execute("alter function private.apply_retention(integer) set lock_timeout = 0")
    job = completed(alice, worker)
    alice.share_image(job.id)
    db.pass_time("2 days")
    calls = (Worker(db).apply_retention, partial(deleted, db, alice))

    answers = wait_in_order(db, f"public.{row} = '{job.id}'", *(calls[n] for n in order))

    # Retention would pass over a row at which it is the victim.
    assert "40P01" not in str([answers, db.execute("select code from private.skipped_rows")])
    assert generations(db) == set()
    assert expired(db) == set(files_of(job))


# --- plans ---


@pytest.mark.parametrize(
    ("query", "index"),
    [
        (
            "select name from storage.objects where name ~>~ 'a' order by name using ~<~"
            " fetch first 500 rows with ties",
            "storage_objects_name_pattern_search",
        ),
        (
            "select name from storage.objects where name ~>=~ 'a/' and name ~<~ 'a0'",
            "storage_objects_name_pattern_search",
        ),
        (
            "select count(*) filter (where bucket_id = 'inputs' and name <> 'a/b')"  # 20_access
            " from storage.objects where name ~>=~ 'a/' and name ~<~ 'a0'",
            "storage_objects_name_pattern_search",
        ),
        (
            "select id from public.generations where deleted_at <= now()"
            " and finished_at is not null order by deleted_at limit 500",
            "generations_deleted_at_idx",
        ),
    ],
)
def test_what_runs_every_minute_goes_by_an_index(db, alice, query, index):
    alice.has_history(5000)
    db.execute(
        "insert into storage.objects (bucket_id, name)"
        " select 'generations', storage_path from public.images"
    )
    db.execute("analyze")

    plan = "\n".join(row["QUERY PLAN"] for row in db.execute(f"explain {query}"))

    assert index in plan, plan


def test_only_workers_call_these(db, alice, anon, service):
    for caller in (alice, anon, service):
        for call in ("apply_retention()", "list_expired_files()", "forget_files('{}', '{}')"):
            with refused("42501"):
                caller.query(f"select private.{call}")
