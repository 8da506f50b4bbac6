"""`serve deploy` of a changed config while clients ask: no request is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from .load import Asked, Clients
from .server import BIN, Server, free_port, model, until

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(500)]

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 40}
"""Ray's dashboard, to which `serve deploy` talks, wants one."""
AT_ONCE = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
"""`ray start` would wait 30 s for its actors to end when it is stopped."""


@dataclass
class Cluster:
    """A Ray of its own with a dashboard."""

    head: Server
    dashboard: int
    port: int
    folder: Path

    def deploy(self, *models: dict[str, Any], deployments: Sequence[dict[str, Any]] = ()) -> None:
        """Deploy models; `deployments` has options of deployments, as in Serve's config."""
        config = {
            "http_options": {"host": "127.0.0.1", "port": self.port},
            "applications": [
                {
                    "name": "quantserve",
                    "route_prefix": "/",
                    "import_path": "quantserve.serve.app:build",
                    "args": {"models": models, "target": "cpu"},
                    "deployments": list(deployments),
                }
            ],
        }
        path = self.folder / "serve.yaml"
        path.write_text(yaml.safe_dump(config))
        self._serve("deploy", str(path))

    def running(self) -> bool:
        """Whether the application is as it was last deployed."""
        application = yaml.safe_load(self._serve("status"))["applications"]["quantserve"]
        assert application["status"] != "DEPLOY_FAILED", application
        return bool(application["status"] == "RUNNING")

    def _serve(self, *arguments: str) -> str:
        command = [str(BIN / "serve"), *arguments, "--address", f"http://127.0.0.1:{self.dashboard}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **TOKEN})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    dashboard, agent, gcs = free_port(), free_port(), free_port()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Ray's sockets need a short path
        command = [
            str(BIN / "ray"), "start", "--head", "--block", f"--port={gcs}", "--include-dashboard=true",
            f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}",
            "--num-cpus=4", "--disable-usage-stats", f"--object-store-memory={200 << 20}",
        ]  # fmt: skip
        head = Server(command, RAY_worker_niceness="0", **AT_ONCE, **TOKEN)
        try:
            head.wait_for("Ray runtime started")
            yield Cluster(head, dashboard, free_port(), tmp_path)
        finally:
            head.stop(signal.SIGTERM)


def test_a_changed_config_loses_no_request(demo: Path, cluster: Cluster) -> None:
    first = model("m", demo / "awq", generation={"generate_kwargs": {"max_tokens": 40}})
    changed = model("m", demo / "awq", generation={"generate_kwargs": {"max_tokens": 50}})
    cluster.deploy(first)
    server = cluster.head
    server.base = f"http://127.0.0.1:{cluster.port}"
    until(lambda: server.request("GET", "/health").status_code == 200, 240)
    fields = {"max_tokens": None}  # the model's default, which differs between the two configs
    with Clients(server, [Asked("m", True, fields), Asked("m", True, fields), Asked("m", False, fields)]) as load:
        load.wait(load.served("m", 0, 6))
        cluster.deploy(changed)
        deployed = time.monotonic()
        load.wait(lambda: any('"completion_tokens":50' in outcome.body for outcome in load.of("m")), 240)
        until(cluster.running, 120)
        settled = time.monotonic()
        load.wait(load.served("m", settled, 6))
    assert {outcome.kind for outcome in load.outcomes} == {"ok"}, [o for o in load.outcomes if o.kind != "ok"][:3]
    whole = [outcome for outcome in load.outcomes if not outcome.asked.stream]
    assert all('"completion_tokens":40' in outcome.body for outcome in whole if outcome.ended < deployed)
    assert all('"completion_tokens":50' in outcome.body for outcome in whole if outcome.began > settled)
    # The old replica served while the new one started, and not just before and after.
    assert len([outcome for outcome in load.outcomes if deployed < outcome.began < settled]) > 10
