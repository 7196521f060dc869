"""The example app's types: as the database is, and as its functions answer."""

import json
import subprocess

import pytest
from actors import User, Worker

from app import APP, TYPES, types_of
from stack import node

CHECK = [
    *(node(), APP / "node_modules/typescript/bin/tsc", "--noEmit", "--strict"),
    *("--exactOptionalPropertyTypes", "--module", "esnext", "--moduleResolution", "bundler"),
]


@pytest.fixture
def answers(alice: User, worker: Worker) -> dict[str, object]:
    """What the functions answer, by the TypeScript type it should have."""
    completed = alice.enqueued(idempotency_key="a key", params={"num_outputs": 2})
    job = worker.claimed()
    preview = f"{alice.id}/{completed}/0.preview.webp"
    worker.complete_job(job, [job.image(0, preview_path=preview, blurhash="L6Pj0^"), job.image(1)])
    failed = alice.enqueued()
    worker.fail_job(worker.claimed(), "moderated")
    retried = alice.retry_generation(failed)
    running = worker.claimed()
    worker.report_progress(running, "storing", 80)
    queued = alice.enqueue()
    canceled = alice.cancel_generation(alice.enqueued())
    alice.set_tags(completed, "sea")
    jobs = [alice.get_job_status(id) for id in (completed, failed, queued["job_id"])]
    return {
        "Job[]": [*jobs, canceled, *alice.list_active_jobs(completed)],
        "EnqueueAnswer[]": [queued, retried],
        "Page": alice.list_generations(page_size=2),
        "Entitlement": alice.get_entitlement(),
        "Model[]": alice.list_models(),
    }


def errors(folder, answers) -> list[str]:
    """What the compiler says when each answer stands where its type is asked for."""
    names = "Job, EnqueueAnswer, Page, Entitlement, Model"
    source = f"import type {{ {names} }} from '{APP}/src/darkroom/types';\n"
    for number, (name, answer) in enumerate(answers.items()):
        source += f"export const answer{number}: {name} = {json.dumps(answer)};\n"
    file = folder / "answers.ts"
    file.write_text(source)
    done = subprocess.run([*CHECK, file], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()


def test_answers_have_the_fields_the_app_knows_and_no_others(answers, tmp_path):
    assert {job["status"] for job in answers["Job[]"]} == {
        *("queued", "processing", "completed", "failed", "canceled")
    }

    assert errors(tmp_path, answers) == []


def test_the_compiler_sees_a_field_too_many_and_one_too_few(answers, tmp_path):
    ones = {
        name.removesuffix("[]"): answer[0] if name.endswith("[]") else answer
        for name, answer in answers.items()
    }

    too_many = errors(tmp_path, {name: one | {"unheard_of": 1} for name, one in ones.items()})
    too_few = errors(tmp_path, {name: dict(list(one.items())[1:]) for name, one in ones.items()})

    for line, _ in enumerate(ones, start=2):
        assert any(f"({line}," in error and "unheard_of" in error for error in too_many)
        assert any(f"({line}," in error for error in too_few)


def test_the_generated_types_are_those_of_the_database(stack):
    assert TYPES.read_text() == types_of(stack.database_url), "run make types"
