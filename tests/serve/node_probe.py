"""Programs for the test of two nodes.

``node_probe.py replicas ADDRESS APP`` prints token, hosts and ports of an app's replicas as JSON.
``node_probe.py watch HOST PORT TOKEN`` prints time, requests running and requests served of a replica, again and again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
import time

from quantserve.serve.transport.client import ReplicaLost, Upstream


def replicas(address: str, app: str) -> None:
    import ray
    from ray import serve

    from quantserve.serve.driver.ray_cluster import cluster_secret

    ray.init(address=address, namespace="serve", log_to_driver=False)
    handle = serve.get_deployment_handle(app, "quantserve")
    answers = handle.broadcast("describe").results(timeout_s=30)
    found = {answer["host"]: answer["port"] for answer in answers}
    print(json.dumps({"token": cluster_secret()[0], "replicas": found}))


async def watch(host: str, port: str, token: str) -> None:
    upstream = Upstream(host, int(port), token)
    while True:
        with contextlib.suppress(ReplicaLost):
            response = await upstream.request("GET", b"/metrics")
            text = b""
            while data := await response.read():
                text += data
            response.close()
            sums = []
            for name in (b"vllm:num_requests_running", b"vllm:request_success_total"):
                sums.append(
                    sum(float(value) for value in re.findall(rb"^%s\{[^}]*\} (\S+)$" % name, text, re.MULTILINE))
                )
            print(time.monotonic(), *sums, flush=True)
        await asyncio.sleep(0.5)


if __name__ == "__main__":
    _, what, *arguments = sys.argv
    if what == "replicas":
        replicas(*arguments)
    else:
        asyncio.run(watch(*arguments))
