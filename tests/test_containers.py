"""Which stack the tests run on: what the environment asks for, or a clear refusal."""

from __future__ import annotations

import sys
from pathlib import Path

import containers
import pytest
from containers import ContainerStack

from stack import Stack

NO_DAEMON = {"STACK": "docker", "DOCKER_HOST": "unix:///nonexistent/docker.sock"}


def test_without_a_word_the_stack_is_local(stopped_stack):
    containers.refuse_unusable({})

    assert not containers.is_wanted({})
    assert containers.postgrest_image({"POSTGREST_IMAGE": "mine"}) is None
    assert type(stopped_stack) is (ContainerStack if containers.is_wanted() else Stack)


@pytest.mark.parametrize(
    ("environment", "image"),
    [
        ({}, "postgrest/postgrest:v12.2.3"),
        ({"POSTGREST_IMAGE": "mine"}, "mine"),
        ({"POSTGREST_IMAGE": "none"}, None),
    ],
)
def test_variables_name_the_images(environment, image):
    assert containers.postgrest_image({"STACK": "docker"} | environment) == image


@pytest.mark.parametrize(
    ("environment", "refusal"),
    [
        ({"STACK": "podman"}, "STACK: 'podman' is not docker"),
        ({"POSTGREST_BIN": "/nonexistent/postgrest"}, "POSTGREST_BIN: /nonexistent/postgrest is"),
        ({"POSTGREST_BIN": sys.executable, "STACK": "docker"}, "POSTGREST_BIN: with STACK=docker"),
        (NO_DAEMON, "STACK=docker: no Docker daemon answers: "),
    ],
)
def test_what_cannot_be_had_is_refused_before_the_first_test(environment, refusal):
    with pytest.raises(pytest.UsageError) as error:
        containers.refuse_unusable(environment)

    assert str(error.value).startswith(refusal)


def test_a_stack_of_containers_is_a_stack_with_another_cluster(tmp_path: Path):
    stack = ContainerStack(tmp_path)

    assert stack.services[0] is stack.cluster
    assert not stack.cluster.is_running()
    stack.cluster.delete()  # nothing there, nothing to do
