"""The gateway's `/metrics`."""

from __future__ import annotations

import asyncio
import gzip
import socket
from collections.abc import Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from quantserve.serve.gateway.metrics.collect import GatewayMetrics, MetricsEndpoint
from quantserve.serve.gateway.metrics.text import CONTENT_TYPE
from quantserve.serve.gateway.upstreams.pool import Limits, Pool, Replica
from quantserve.serve.transport.server import Listener

from .asgi_client import Answer, request
from .prometheus_texts import CARDS, EARLIER, LATER, all_samples, families, has, pool, value


class TestEndpoint:
    def ask(
        self,
        texts: Mapping[str, bytes | Exception | float],
        *,
        rounds: int = 1,
        method: str = "GET",
        accept: str = "identity",
    ) -> Answer:
        """Scrape; a replica's text may be an error or the seconds it hangs. Returns the last answer."""
        pools = [
            pool("demo", *(name for name in texts if name < "x")),
            pool("org/big", *(n for n in texts if n >= "x")),
        ]
        metrics = GatewayMetrics(CARDS, lambda: pools)

        async def fetch(replica: Replica) -> bytes:
            text = texts[replica.id]
            if isinstance(text, Exception):
                raise text
            if isinstance(text, float):
                await asyncio.sleep(text)
                return EARLIER
            return text

        async def scrape() -> Answer:
            endpoint = MetricsEndpoint(metrics, fetch, timeout_s=0.2)
            for _ in range(rounds):
                answer = await request(endpoint, method, "/metrics", headers={"accept-encoding": accept})
            return answer

        return asyncio.run(scrape())

    def test_everything_in_one_text(self) -> None:
        answer = self.ask({"a": EARLIER, "b": LATER, "x": EARLIER})
        assert (answer.status, answer.headers["content-type"]) == (200, CONTENT_TYPE)
        families(answer.body)
        tokens = "vllm:generation_tokens_total"
        assert value(answer.body, tokens, model="demo", method="awq", replica="a", model_name="demo") == 75
        assert value(answer.body, tokens, model="demo", method="awq", replica="b") == 203
        assert value(answer.body, tokens, model="org/big", method="fp16", replica="x") == 75
        assert value(answer.body, "quantserve_scrape_errors_total", model="demo") == 0
        assert value(answer.body, "quantserve_replicas", model="demo", state="ready") == 2
        assert len({s.labels.get("replica") for s in all_samples(answer.body) if s.name == "process_open_fds"}) == 4

    def test_a_replica_that_hangs_or_fails_is_left_out_and_counted(self) -> None:
        answer = self.ask({"a": 3600.0, "b": OSError("gone"), "c": LATER}, rounds=3)
        assert {s.labels["replica"] for s in all_samples(answer.body) if s.name.startswith("vllm:")} == {"c"}
        assert value(answer.body, "quantserve_scrape_errors_total", model="demo", method="awq") == 6
        assert value(answer.body, "quantserve_scrape_errors_total", model="org/big") == 0

    def test_replicas_are_asked_at_once(self) -> None:
        everyone = asyncio.Barrier(6)

        async def fetch(replica: Replica) -> bytes:
            await everyone.wait()
            return EARLIER

        pools = [pool("demo", *"abcdef")]
        text = asyncio.run(MetricsEndpoint(GatewayMetrics(CARDS, lambda: pools), fetch).text())
        assert value(text, "quantserve_scrape_errors_total", model="demo") == 0

    def test_observed_appears_beside_expected(self) -> None:
        pools = [pool("demo", "a")]
        texts = [EARLIER, LATER]

        async def fetch(replica: Replica) -> bytes:
            return texts.pop(0)

        async def scrape() -> bytes:
            endpoint = MetricsEndpoint(GatewayMetrics(CARDS, lambda: pools), fetch)
            await endpoint.text()
            return await endpoint.text()

        text = asyncio.run(scrape())
        for name in ("ttft_seconds", "tpot_seconds", "output_tokens_per_second"):
            assert value(text, f"quantserve_expected_{name}", model="demo", method="awq") > 0
            assert value(text, f"quantserve_observed_{name}", model="demo", method="awq") > 0

    def test_scrapes_at_the_same_time_share_a_round(self) -> None:
        pools, asked = [pool("demo", "a")], []

        async def fetch(replica: Replica) -> bytes:
            asked.append(replica.id)
            await asyncio.sleep(0.05)
            return EARLIER

        async def scrape() -> list[Answer]:
            endpoint = MetricsEndpoint(GatewayMetrics(CARDS, lambda: pools), fetch)
            return await asyncio.gather(*(request(endpoint, "GET", "/metrics") for _ in range(20)))

        answers = asyncio.run(scrape())
        assert asked == ["a"]
        assert len({answer.body for answer in answers}) == 1

    def test_gzip(self) -> None:
        plain = self.ask({"a": EARLIER})
        packed = self.ask({"a": EARLIER}, accept="gzip")
        assert packed.headers["content-encoding"] == "gzip"
        assert len(packed.body) < len(plain.body) / 4
        assert has(gzip.decompress(packed.body), "vllm:generation_tokens_total")

    def test_head_and_other_methods(self) -> None:
        assert self.ask({}, method="HEAD").status == 200
        refused = self.ask({}, method="POST")
        assert (refused.status, refused.headers["allow"]) == (405, "GET")

    def test_over_a_connection(self) -> None:
        """Over a connection between gateway and replica."""

        async def scrape() -> bytes:
            seen: list[tuple[str, str]] = []

            def answer(status: int, text: bytes) -> ASGIApp:
                async def app(scope: Scope, receive: Receive, send: Send) -> None:
                    seen.append((scope["method"], scope["path"]))
                    await send({"type": "http.response.start", "status": status, "headers": []})
                    await send({"type": "http.response.body", "body": text})

                return app

            ports, listeners = [1], []
            for app in (answer(200, EARLIER), answer(500, b"bad 1\n")):
                listening = socket.create_server(("127.0.0.1", 0))
                listeners.append(Listener(app, "secret"))
                await listeners[-1].start(listening)
                ports.append(listening.getsockname()[1])
            made = Pool("demo", Limits(), token="secret")
            made.update([{"id": f"r{n}", "host": "127.0.0.1", "port": port} for n, port in enumerate(ports)])
            text = await MetricsEndpoint(GatewayMetrics(CARDS, lambda: [made])).text()
            assert seen == [("GET", "/metrics")] * 2
            made.update([])
            for listener in listeners:
                listener.close()
            return text

        text = asyncio.run(scrape())
        assert value(text, "vllm:generation_tokens_total", replica="r1") == 75
        assert value(text, "quantserve_scrape_errors_total", model="demo") == 2
        assert not has(text, "bad")
