"""The example app's types: as the database is, and as its functions answer."""

import json
import subprocess

from app import APP, TYPES, types_of
from stack import node

CHECK = [
    *(node(), APP / "node_modules/typescript/bin/tsc", "--noEmit", "--strict"),
    *("--exactOptionalPropertyTypes", "--module", "esnext", "--moduleResolution", "bundler"),
]


def test_answers_have_the_fields_the_app_knows_and_no_others(alice, worker, tmp_path):
    completed = alice.enqueued(idempotency_key="a key", params={"num_outputs": 2})
    job = worker.claimed()
    preview = f"{alice.id}/{completed}/0.preview.webp"
    worker.complete_job(job, [job.image(0, preview_path=preview, blurhash="L6Pj0^"), job.image(1)])
    failed = alice.enqueued()
    worker.fail_job(worker.claimed(), "moderated")
    retried = alice.retry_generation(failed)
    worker.report_progress(worker.claimed(), "storing", 80)
    queued = alice.enqueue()
    canceled = alice.cancel_generation(alice.enqueued())
    jobs = [alice.get_job_status(job_id) for job_id in (completed, failed, queued["job_id"])]
    jobs += [canceled, *alice.list_active_jobs(completed)]
    assert {job["status"] for job in jobs} == {
        *("queued", "processing", "completed", "failed", "canceled")
    }
    known = [
        ("Job[]", jobs),
        ("EnqueueAnswer[]", [queued, retried]),
        ("Page", alice.list_generations(page_size=2)),
        ("Entitlement", alice.get_entitlement()),
        ("Model[]", alice.list_models()),
    ]
    wrong = [("Job", jobs[0] | {"unheard_of": 1}), ("Job", dict(list(jobs[0].items())[1:]))]
    lines = [
        f"export const answer{n}: {name} = {json.dumps(answer)};"
        for n, (name, answer) in enumerate(known + wrong)
    ]
    names = f"import type {{ Job, EnqueueAnswer, Page, Entitlement, Model }} from '{APP}"
    file = tmp_path / "answers.ts"
    file.write_text("\n".join([f"{names}/src/darkroom/types';", *lines]))

    done = subprocess.run([*CHECK, file], capture_output=True, text=True, check=False)

    errors = [line for line in done.stdout.splitlines() if "answers.ts" in line]
    assert len(errors) == 2, done.stdout
    assert "(7," in errors[0] and "unheard_of" in errors[0]
    assert "(8," in errors[1] and "job_id" in errors[1]


def test_the_generated_types_are_those_of_the_database(stack):
    assert TYPES.read_text() == types_of(stack.database_url), "run make types"
