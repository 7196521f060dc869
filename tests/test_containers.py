"""Which stack the tests run on: what the environment asks for, or a clear refusal."""

import sys

import pytest
import stack_choice


@pytest.mark.parametrize(
    ("environment", "refusal"),
    [
        ({"STACK": "podman"}, "STACK: 'podman' is not docker"),
        ({"POSTGREST_BIN": "/nonexistent/postgrest"}, "POSTGREST_BIN: /nonexistent/postgrest is"),
        ({"POSTGREST_BIN": sys.executable, "STACK": "docker"}, "POSTGREST_BIN: with STACK=docker"),
        (
            {"STACK": "docker", "DOCKER_HOST": "unix:///nonexistent/docker.sock"},
            "STACK=docker: no Docker daemon answers: ",
        ),
    ],
)
def test_what_cannot_be_had_is_refused_before_the_first_test(environment, refusal):
    with pytest.raises(pytest.UsageError) as error:
        stack_choice.refuse_unusable(environment)

    assert str(error.value).startswith(refusal)
