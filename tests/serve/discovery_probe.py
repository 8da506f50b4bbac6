"""Run as a script: what discovery makes of replicas of a real Ray Serve that are slow, raise and die; JSON lines."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

import ray
from ray import serve

from quantserve.serve.gateway.upstreams.discovery import MISSES, Roster, list_replicas


@serve.deployment(num_replicas=3, health_check_period_s=60, health_check_timeout_s=60, graceful_shutdown_timeout_s=2)
class Described:
    def __init__(self) -> None:
        self.mood = ""

    async def describe(self, gateway: str = "", waiting: int = 0) -> dict[str, Any]:
        if self.mood == "raises":
            raise ValueError("describe raised")
        name, actor = serve.get_replica_context().replica_id.unique_id, ray.get_runtime_context().get_actor_id()
        return {"id": name, "actor": actor, "host": "127.0.0.1", "port": os.getpid()}

    async def become(self, name: str, mood: str) -> None:
        if serve.get_replica_context().replica_id.unique_id == name:
            self.mood = mood


def main() -> None:
    """Print the states of the replicas that were there first, in the order in which their turn comes."""
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    handle = serve.run(Described.bind(), name="probe", route_prefix=None)  # type: ignore[attr-defined]
    roster = Roster()

    def look() -> dict[str, dict[str, Any]]:
        results = list_replicas(handle, "gateway", 0)
        assert results is not None
        return {one["id"]: one for one in roster.update(results)}

    first = look()
    names = list(first)

    def show(step: str, found: dict[str, dict[str, Any]]) -> None:
        print(json.dumps([step, [found.get(name, {}).get("state", "gone") for name in names]]), flush=True)

    show("started", first)
    slow = first[names[0]]["port"]
    os.kill(slow, signal.SIGSTOP)
    show("one slow", look())
    os.kill(slow, signal.SIGCONT)
    show("fast again", look())
    handle.broadcast("become", names[1], "raises").results()
    show("one raises", look())
    handle.broadcast("become", names[1], "").results()
    os.kill(first[names[2]]["port"], signal.SIGKILL)
    show("one killed", look())
    show("after the death", look())
    serve.delete("probe", _blocking=False)
    found = look()
    for _ in range(40):  # until Ray Serve lists none
        if not any(one["state"] == "ready" for one in found.values()):
            break
        time.sleep(0.25)
        found = look()
    show("not listed", found)
    for _ in range(MISSES - 1):
        found = look()
    show("removed", found)
    serve.shutdown()


if __name__ == "__main__":
    main()
