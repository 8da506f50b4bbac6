"""The lines printed while models start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from quantserve.serve.driver.progress import Progress, cause

FAILURE = """The deployment failed to start 1 times in a row. This may be due to a problem with its constructor or
initial health check failing. See controller logs for details. Error:
ray::ServeReplica:m:m.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)
  File "/usr/lib/python3.11/concurrent/futures/_base.py", line 449, in result
RuntimeError: Traceback (most recent call last):
  File "/x/quantserve/serve/replica/vllm/server.py", line 129, in _start_engine
    raise EngineError(cause) from error
quantserve.errors.EngineError: ValueError: head size 7 is not supported
"""


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (FAILURE, "ValueError: head size 7 is not supported"),
        (
            "Traceback:\n  File\nray.exceptions.ActorDiedError: The actor died.\nmore",
            "ray.exceptions.ActorDiedError: The actor died.",
        ),
        ("something else\nhappened", "happened"),
        ("", "no cause reported"),
    ],
)
def test_cause_is_one_line(message: str, line: str) -> None:
    assert cause(message) == line


def overview(status: str, message: str = "") -> Any:
    return SimpleNamespace(status=status, message="", deployments={"d": SimpleNamespace(message=message)})


def test_each_change_is_printed_once() -> None:
    progress = Progress(["a", "long-name"], "/logs")
    waiting = "Deployment 'a' has 1 replicas that have taken more than 30s to be scheduled. Resources: {'GPU': 1}"
    slow = "Deployment 'a' has 1 replicas that have taken more than 30s to initialize."
    steps = [
        ({}, []),
        ({"a": overview("DEPLOYING"), "long-name": overview("DEPLOYING", slow)}, []),
        ({"a": overview("DEPLOYING", waiting)}, ["GPU"]),
        ({"a": overview("DEPLOYING", waiting)}, []),
        ({"a": overview("RUNNING"), "long-name": overview("DEPLOY_FAILED", FAILURE)}, ["ready in", "failed: Value"]),
        ({"a": overview("RUNNING"), "long-name": overview("DEPLOY_FAILED", FAILURE)}, []),
        ({"a": overview("UNHEALTHY", "ValueError: x")}, ["unhealthy: ValueError: x"]),
        ({"a": overview("DEPLOYING")}, []),
        ({"a": overview("RUNNING")}, ["ready again"]),
    ]
    for applications, said in steps:
        lines = list(progress.update(applications))
        assert len(lines) == len(said), lines
        for line, part in zip(lines, said, strict=True):
            assert part in line
            assert "\n" not in line
    assert (progress.starting, progress.ready, progress.failed) == ([], ["a"], ["long-name"])
