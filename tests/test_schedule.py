"""sql/90_schedule.sql: settings, plans, buckets and cron jobs; may be run again."""

import psycopg
from database import PROJECT, unchanged

SCHEDULE = PROJECT / "sql" / "90_schedule.sql"


def test_running_it_again_changes_nothing_an_operator_has_set(db, alice):
    db.execute("update private.settings set welcome_credits = 3")
    db.execute("update private.plans set max_active = 7")
    db.execute("update private.error_codes set message = 'Oh.', is_retryable = false")
    db.execute("update storage.buckets set file_size_limit = 1")
    buckets = db.execute("select * from storage.buckets")

    with unchanged(db):
        assert db.psql(SCHEDULE).returncode == 0

    assert db.execute("select * from storage.buckets") == buckets


def test_buckets_are_private_and_take_images_only(db):
    buckets = db.execute("select id, public, allowed_mime_types from storage.buckets order by 1")

    types = ["image/png", "image/jpeg", "image/webp"]
    outputs = ["image/avif", "image/gif", "application/octet-stream"]  # the last for SVGs
    assert buckets == [
        {"id": "generations", "public": False, "allowed_mime_types": types + outputs},
        {"id": "inputs", "public": False, "allowed_mime_types": types},
    ]


def test_a_bucket_that_was_public_stays_so_with_a_warning(supabase_db):
    supabase_db.execute(
        "insert into storage.buckets (id, name, public) values ('inputs', '', true)"
    )

    assert "Darkroom: a bucket of its own is public" in supabase_db.install()

    assert supabase_db.value("select public from storage.buckets where id = 'inputs'")


def test_pg_cron_recovers_and_erases_every_minute_and_trims_every_night(stack):
    def command(name: str) -> str:
        return f"select private.{name}(), private.note_run('{name}')"

    with psycopg.connect(stack.database_url) as connection:
        connection.execute(SCHEDULE.read_bytes())
        jobs = connection.execute(
            "select jobname, schedule, command, active from cron.job order by 1"
        ).fetchall()
        connection.execute(
            "insert into cron.job_run_details (runid, end_time) values"
            " (-1, now() - interval '8 days'), (-2, now() - interval '6 days')"
        )
        connection.execute("select private.trim_history()")
        runs = connection.execute("select runid from cron.job_run_details where runid < 0")
        kept = runs.fetchall()
        connection.rollback()

    assert jobs == [
        ("darkroom_apply_retention", "* * * * *", command("apply_retention"), True),
        ("darkroom_check_books", "47 3 * * *", command("check_books"), True),
        ("darkroom_expire_credits", "* * * * *", command("expire_credits"), True),
        ("darkroom_recover_stale_jobs", "* * * * *", command("recover_stale_jobs"), True),
        ("darkroom_trim_history", "17 3 * * *", command("trim_history"), True),
    ]
    assert kept == [(-2,)]
