"""What is kept, what is erased with its files, and what never is."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from actors import Job, Service, User, Worker, outcome
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


def deleted_by_user(db: Database, *jobs: Job) -> None:
    for job in jobs:
        User(db, str(job.user_id)).delete_generation(job.id)


def files_of(*jobs: Job, preview: bool = False) -> list[tuple[str, str]]:
    """Return the files of generations as the list names them."""
    names = ["0.png", "0.preview.webp"] if preview else ["0.png"]
    return [("generations", f"{j.user_id}/{j.id}/{name}") for j in jobs for name in names]


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


def test_an_old_generation_is_hidden_at_once_and_erased_with_its_last_file(db, alice, worker):
    old = completed(alice, worker, preview=True)
    db.pass_time("31 days")
    young = completed(alice, worker)
    with unchanged(db):
        assert worker.apply_retention() == 0, "by default it is kept for ever"
    keep(db, keep_generations="30 days")

    assert worker.apply_retention() == 2

    assert [row["job_id"] for row in alice.list_generations()["generations"]] == [young.id]
    image, preview = files_of(old, preview=True)
    assert set(worker.list_expired_files()) == {image, preview}
    worker.forget_files(image)
    assert generations(db) == {old.id, young.id}
    worker.forget_files(preview)
    assert generations(db) == {young.id}
    assert rows_that_mention(db, old.id) == ["public.credit_ledger"], "the books stay"


def test_favorites_and_live_jobs_are_never_too_old(db, alice, worker):
    favorite = completed(alice, worker)
    alice.set_favorite(favorite.id)
    alice.enqueue()
    running = worker.claimed()
    queued = alice.enqueued()
    keep(db, keep_generations="1 day")
    db.pass_time("100 days")

    worker.apply_retention()

    assert generations(db) == {favorite.id, running.id, queued}
    assert expired(db) == set()
    assert_books_balance(db)


def test_what_its_user_deleted_is_erased_after_a_while_unless_it_is_restored(db, alice, worker):
    job, restored = completed(alice, worker), completed(alice, worker)
    deleted_by_user(db, job, restored)

    db.pass_time("29 days")
    assert worker.apply_retention() == 0
    db.pass_time("2 days")
    worker.apply_retention()
    assert expired(db) == set(files_of(job, restored))
    db.execute("update public.generations set deleted_at = null where id = %s", restored.id)

    assert worker.list_expired_files() == files_of(job)
    assert expired(db) == set(files_of(job))
    assert generations(db) == {job.id, restored.id}


def test_what_storage_still_has_is_not_forgotten_and_the_rest_is_once(db, alice, worker):
    keep(db, keep_deleted="0")
    job, other = completed(alice, worker, preview=True), completed(alice, worker)
    deleted_by_user(db, job)
    worker.apply_retention()
    image, preview = files_of(job, preview=True)
    stored(db, image[1])

    assert worker.forget_files(image, preview) == 1  # Storage said yes and did nothing
    assert expired(db) == {image}
    assert generations(db) == {job.id, other.id}
    removed(db, image)
    assert worker.forget_files(image, preview) == 0
    assert generations(db) == {other.id}
    with unchanged(db):
        worker.forget_files(image, preview, *files_of(other), ("inputs", "nobody"))


def test_a_source_uploaded_again_after_it_was_marked_is_not_listed_and_a_lost_one_is(
    db, alice, worker
):
    keep(db, keep_inputs="30 days")
    files = [stored(db, f"{alice.id}/{name}.jpg", "inputs") for name in ("cat", "dog", "emu")]
    age_files(db, "31 days")
    worker.apply_retention()
    assert expired(db) == set(files)

    db.execute("update storage.objects set updated_at = now() where name = %s", files[0][1])
    removed(db, files[1])

    assert set(worker.list_expired_files()) == set(files[1:]) == expired(db)


def test_old_attempts_of_finished_generations_are_trimmed(db, alice, worker):
    completed(alice, worker)
    alice.enqueue()
    worker.release_job(worker.claimed())  # not finished: it may be claimed again
    db.pass_time("91 days")

    worker.apply_retention()

    assert db.value("select array_agg(outcome::text) from private.attempts") == ["released"]


def test_deleting_a_user_leaves_nothing_but_the_list_of_files(db, alice, bob, worker):
    db.lift_limits()
    completed(bob, worker)
    job = completed(alice, worker, preview=True)
    alice.share_image(job.id)
    alice.like_image(job.id)
    alice.set_tags(job.id, "sea")
    alice.save_prompt_template("Sea", "the sea")
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


@pytest.mark.parametrize("keep_books", ["0", "10 years"])
def test_the_books_of_deleted_users_are_kept_as_long_as_the_operator_says(
    db, alice, bob, worker, keep_books
):
    keep(db, keep_ledger_of_deleted_users=keep_books)
    alice.enqueue()

    deleted(db, alice)

    entries = [("grant", 10), ("charge", -1)] if keep_books != "0" else []
    for passed, left in (("0", entries), ("9 years", entries), ("2 years", [])):
        db.pass_time(passed)
        worker.apply_retention()
        assert alice.ledger() == left
    assert bob.ledger() == [("grant", 10)]


def test_an_output_without_a_row_is_found_after_a_day_and_nothing_else(db, alice, worker):
    job = completed(alice, worker, preview=True)
    for _, path in files_of(job, preview=True):
        stored(db, path)
    alice.enqueue()
    stored(db, files_of(worker.claimed())[0][1])
    stored(db, f"{alice.id}/{alice.enqueued()}/0.png")
    for path in ("logo.png", "{id}/logo.png", "x/{id}/0.png", "{id}/{id}"):
        stored(db, path.format(id=alice.id))
    orphan = stored(db, f"{alice.id}/{job.id}/1.png")
    ghost = stored(db, f"{uuid.uuid4()}/{uuid.uuid4()}/0.png")  # of a user who is gone
    worker.apply_retention()
    assert expired(db) == set()

    age_files(db, "25 hours")
    worker.apply_retention()

    assert expired(db) == {orphan, ghost} == set(worker.list_expired_files())
    removed(db, orphan, ghost)
    assert worker.forget_files(orphan, ghost) == 0
    assert expired(db) == set()
    assert job.id in generations(db)


def test_a_folder_of_another_database_is_left_alone(db, alice, bob):
    (of_alice, _) = [stored(db, f"{u.id}/{uuid.uuid4()}/0.png") for u in (alice, bob)]
    age_files(db, "25 hours")
    db.execute(
        "create or replace function private.has_folder(p_folder uuid) returns boolean"
        f" language sql return p_folder <> '{bob.id}'"
    )

    db.execute("select private.apply_retention()")

    assert expired(db) == {of_alice}


def test_a_file_that_came_to_be_an_image_after_all_is_not_listed(db, alice, worker):
    alice.enqueue()
    job = worker.claimed()
    mark = "insert into private.expired_files (bucket, path, user_id) values (%s, %s, %s)"
    db.execute(mark, *files_of(job)[0], alice.id)
    worker.complete_job(job)

    assert worker.list_expired_files() == []
    assert expired(db) == set()


@pytest.fixture
def edits(db, alice) -> Callable[..., str]:
    """Ask for a picture to be made of others."""
    db.execute("update public.models set is_active = true, requires_paid = false")
    db.lift_limits()

    def edit(*paths: str) -> str:
        params = {"image_input": list(paths)}
        return alice.has(50).enqueued(model="bytedance/seedream-4", params=params)

    return edit


@pytest.mark.parametrize("why", ["old", "deleted"])
def test_pictures_that_a_live_job_is_made_from_outlive_their_time_and_no_others(
    db, alice, worker, edits, why
):
    sources, other = [completed(alice, worker) for _ in range(2)], completed(alice, worker)
    job_id = edits(*(f"generations/{path}" for _, path in files_of(*sources)))
    if why == "old":
        keep(db, keep_generations="1 day")
    else:
        deleted_by_user(db, *sources, other)
        keep(db, keep_deleted="0")
    db.pass_time("2 days")

    for _ in range(4):
        worker.apply_retention(at_most=1)
    assert expired(db) == set(files_of(other)) == set(worker.list_expired_files())
    assert {job_id, *(each.id for each in sources)} <= generations(db)
    alice.cancel_generation(job_id)
    for _ in range(3):
        worker.apply_retention()

    assert set(files_of(*sources)) <= expired(db)
    worker.forget_files(*files_of(*sources))
    assert generations(db).isdisjoint(each.id for each in sources)
    assert db.value("select count(*) from private.sources") == 0


@pytest.mark.parametrize("bucket", ["generations", "inputs"])
def test_a_source_that_was_marked_before_it_was_needed_is_not_listed(
    db, alice, worker, edits, bucket
):
    keep(db, keep_deleted="0")
    source = completed(alice, worker)
    (file,) = files_of(source) if bucket == "generations" else [stored(db, f"{alice.id}/a", bucket)]
    job_id = edits("/".join(file))
    if bucket == "generations":  # as two do at the same time
        deleted_by_user(db, source)
    query = (
        "insert into private.expired_files (bucket, path, user_id, generation_id)"
        " values (%s, %s, %s, %s)"
    )
    db.execute(query, *file, alice.id, source.id if bucket == "generations" else None)

    assert worker.list_expired_files() == []
    assert expired(db) == set()
    alice.cancel_generation(job_id)
    age_files(db, "31 days")
    worker.apply_retention()

    assert worker.list_expired_files() == [file]


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
    bare = stored(db, alice.id, "inputs")  # one with the name of its folder
    worker.apply_retention()
    assert expired(db) == set()
    age_files(db, "25 hours")

    worker.apply_retention()

    assert set(worker.list_expired_files()) == {late, bare} == expired(db)
    removed(db, bare)
    assert worker.forget_files(bare) == 0


def test_the_walk_through_storage_passes_every_file(db, alice, worker):
    paths = [f"{alice.id}/{uuid.UUID(int=1)}/{n}.png" for n in range(9)]
    for path in paths:
        stored(db, path, "inputs")  # the same name twice, and pages that end between the two
    orphans = {stored(db, path) for path in paths}
    age_files(db, "2 days")

    for _ in range(9):
        worker.apply_retention(at_most=3)

    assert expired(db) == orphans


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


@pytest.mark.parametrize("change", ["name", "owner", "updated_at", "created_at"])
def test_whatever_is_stored_others_files_are_found_and_erased(db, worker, change):
    alice, bob = User(db), User(db)
    names = ["", "/", "//a", "/../b", "/%00\\\n\u202e?#", "/" + "x" * 987]
    bad = {stored(db, f"{alice.id}{name}", "inputs") for name in names}
    old = stored(db, f"{bob.id}/dog.jpg", "inputs")
    age_files(db, "31 days")
    if change != "name":
        db.execute(f"update storage.objects set {change} = null where name <> %s", old[1])

    worker.apply_retention()
    deleted(db, alice)
    deleted(db, bob)

    assert old in expired(db)
    assert expired(db) <= {*bad, old}
    assert skipped(db) == {}


BAD_ROWS = {
    "expire_generations": ("public.generations", "id in {jobs}", "update"),
    "erase": ("public.generations", "id in {jobs}", "delete"),
    "attempts": ("private.attempts", "generation_id in {jobs}", "delete"),
    "mark_files": ("private.expired_files", "user_id in {users}", "insert"),
}


@pytest.mark.parametrize("step", BAD_ROWS)
def test_more_bad_rows_than_are_looked_at_are_passed_over_and_named_and_all_others_done(
    db, worker, step
):
    table, row, event = BAD_ROWS[step]
    jobs = []
    for user in [User(db) for _ in range(5)]:
        user.enqueue()
        jobs.append(worker.claimed())
        worker.fail_job(jobs[-1], "moderated")  # no file: erased at once
        user.has(credits=20)
        stored(db, f"{user.id}/cat.jpg", "inputs")
    bad = jobs[:3]
    users = tuple(str(job.user_id) for job in bad)
    row = row.format(jobs=tuple(job.id for job in bad), users=users)
    if event == "insert":
        db.execute(f"alter table {table} add check (not ({row})) no inherit not valid")
    else:
        poison(db, table, row, event)
    keep(db, keep_attempts="90 days")
    if step == "erase":
        deleted_by_user(db, *jobs)
    else:
        keep(db, keep_generations="100 days")
    db.pass_time("101 days")
    age_files(db, "101 days")

    for _ in range(10):
        worker.apply_retention(at_most=2)

    left = db.execute("select user_id from public.generations")
    unmarked = {str(job.user_id) for job in jobs} - {path.split("/")[0] for _, path in expired(db)}
    assert unmarked | {str(row["user_id"]) for row in left} <= set(users)
    named = "expire_generations" if step == "erase" else step
    assert skipped(db)[named] == len(bad)
    for note in db.execute("select key from private.skipped_rows where step = %s", named):
        assert re.search("|".join([*users, *(job.id for job in bad)]), note["key"])
    (alert,) = [a for a in Service(db).queue_health()["alerts"] if a["alert"] == "skipped_rows"]
    assert named in alert["detail"] and users[0] not in str(alert)


def test_files_that_storage_keeps_for_a_day_are_told(db, alice):
    stored(db, f"{alice.id}/cat.jpg", "inputs")
    deleted(db, alice)
    assert skipped(db) == {}

    db.pass_time("25 hours")

    assert skipped(db) == {"storage": 1}


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
@pytest.mark.parametrize("row", ["images where generation_id", "generations where id"])
def test_deleting_a_user_is_no_deadlock_with_retention(db, alice, worker, row, order):
    keep(db, keep_generations="1 day")
    db.execute("alter function private.apply_retention(integer) set lock_timeout = 0")
    job = completed(alice, worker)
    alice.share_image(job.id)
    db.pass_time("2 days")
    calls = (Worker(db).apply_retention, partial(deleted, db, alice))

    answers = wait_in_order(db, f"public.{row} = '{job.id}'", *(calls[n] for n in order))

    assert "40P01" not in str([answers, db.execute("select code from private.skipped_rows")])
    assert generations(db) == set()
    assert expired(db) == set(files_of(job))
