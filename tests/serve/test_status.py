"""The gateway's `/status`: plan, replicas, load and performance of every model."""

from __future__ import annotations

import asyncio
import json
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from helpers.checkpoints import make_llama
from quantserve.checkpoint import open_checkpoint
from quantserve.checkpoint.quality import MeasuredQuality, record_name, record_text
from quantserve.config import load_object
from quantserve.planning.compose import compose
from quantserve.planning.plan import Plan, make_plan
from quantserve.plugins.registry import Registry
from quantserve.serve.asgi import request_scope
from quantserve.serve.gateway.app import describe_models, public_app
from quantserve.serve.gateway.metrics.collect import GatewayMetrics, MetricsEndpoint
from quantserve.serve.gateway.middleware.api_keys import KeySet
from quantserve.serve.gateway.middleware.limits import Policy
from quantserve.serve.gateway.routing.router import Router, ServedModel
from quantserve.serve.gateway.upstreams.directory import Directory
from quantserve.serve.gateway.upstreams.pool import Limits, Pool
from quantserve.system.secrets import HIDDEN, without_secrets
from quantserve.target import find_target

from .asgi_client import Answer, request
from .prometheus_texts import CARDS, EARLIER, LATER
from .replica import TOKEN, Replica, post, served, until
from .replica import run as in_loop

KEY = "sesame-0123456789"
FIELDS = {
    "id", "method", "bits", "bits_per_weight", "kernel", "source", "revision", "description", "url", "route", "target",
    "dtype", "tensor_parallel_size", "max_model_len", "weights_bytes", "kv_cache_bytes", "kv_cache_tokens", "plugins",
    "findings", "engine_arguments", "environment", "state", "replicas", "ongoing", "queued", "limits", "expected",
    "observed", "quality", "adapters",
}  # fmt: skip
PAGE = Path(__file__).parents[2] / "docs" / "explorer.md"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("status") / "m"
    make_llama(folder, "awq", hidden=512, intermediate=1024)
    engine = {
        "model_id": "org/m",
        "hf_model_id": str(folder),
        "max_total_tokens": 512,
        "model_description": "four bits",
        "runtime_env": {"env_vars": {"HF_TOKEN": "hf_very-secret", "COLOUR": "blue"}},
        "engine_kwargs": {"max_num_seqs": 8, "max_num_batched_tokens": 2048},
    }
    config = {"engine_config": engine, "deployment_config": {"max_ongoing_requests": 3, "max_queued_requests": 5}}
    (model,) = load_object(config, "test").models
    return make_plan(compose(model, Registry.load({}), find_target("a100-80g")))


def described(plan: Plan) -> list[dict[str, Any]]:
    """As another process gets it."""
    made: list[dict[str, Any]] = json.loads(json.dumps(describe_models([plan], 1_700_000_000, Policy())))
    return made


def ask(plan: Plan, method: str = "GET", path: str = "/status", policy: Policy | None = None, **kwargs: Any) -> Answer:
    models = described(plan)
    app = public_app(models, Directory(models, TOKEN), policy or Policy(access_log="off"))
    return asyncio.run(request(app, method, path, **kwargs))


def test_what_is_told_of_a_plan(plan: Plan) -> None:
    before = time.time()
    answer = ask(plan)
    assert (answer.status, answer.headers["cache-control"]) == (200, "no-store")
    report = answer.json
    assert set(report) == {"version", "time", "started", "models"}
    assert report["started"] == 1_700_000_000
    assert before <= report["time"] <= time.time()
    (model,) = report["models"]
    assert set(model) == FIELDS
    assert (model["id"], model["method"], model["bits"], model["dtype"]) == ("org/m", "awq", 4, "float16")
    assert (model["route"], model["description"], model["max_model_len"]) == ("/org--m", "four bits", 512)
    assert model["target"]["name"] == "a100-80g"
    assert 4 < model["bits_per_weight"] < 5
    assert model["weights_bytes"] > 1000
    assert model["kv_cache_tokens"] > 512
    assert model["limits"] == {"ongoing": 3, "queued": 5}
    arguments = {one["name"]: (one["value"], one["set_by"]) for one in model["engine_arguments"]}
    assert arguments["max_num_seqs"] == (8, "config")
    assert arguments["tensor_parallel_size"] == (1, "config")
    assert arguments["trust_remote_code"] == (False, "core")
    expected = model["expected"]
    assert (expected["concurrency"], expected["source"]) == (10, "roofline")
    assert 0 < expected["alone"]["ttft_ms"] < expected["ttft_ms"]
    assert 0 < expected["alone"]["tpot_ms"] <= expected["tpot_ms"]
    assert expected["alone"]["tokens_per_s"] > 0
    assert model["observed"] is None
    for finding in model["findings"]:
        assert set(finding) == {"code", "severity", "message", "where", "fix", "source"}


def test_secrets_stay_out(plan: Plan) -> None:
    body = ask(plan).body.decode()
    assert "hf_very-secret" not in body
    (model,) = json.loads(body)["models"]
    arguments = {one["name"]: one["value"] for one in model["engine_arguments"]}
    assert arguments["max_num_batched_tokens"] == 2048
    variables = {one["name"]: (one["value"], one["set_by"]) for one in model["environment"]}
    assert variables["HF_TOKEN"][0] == HIDDEN
    assert variables["COLOUR"][0] == "blue"


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "apikey", "db-password", "PGPASSWORD", "AUTH",
     "X_CREDENTIALS", "LICENSE_KEY", "secret.name", "authToken", "clientSecret"],
)  # fmt: skip
def test_names_of_secrets(name: str) -> None:
    assert without_secrets("x", name) == HIDDEN
    assert without_secrets({"a": [{name: "x"}]}) == {"a": [{name: HIDDEN}]}


@pytest.mark.parametrize(
    ("name", "value"),
    [("tokenizer", "t"), ("tokenizer_mode", "hf"), ("max_num_batched_tokens", 5), ("monkey", "m"), ("HF_TOKEN", ""),
     ("author", "a"), ("keyboard", "k"), ("trust", True)],
)  # fmt: skip
def test_what_is_no_secret(name: str, value: object) -> None:
    assert without_secrets(value, name) == value


def test_users_in_addresses_are_hidden() -> None:
    assert without_secrets("http://me:pw@host/x and s3://b") == f"http://{HIDDEN}@host/x and s3://b"


def test_published_and_measured_quality(plan: Plan) -> None:
    published = ask(plan).json["models"][0]["quality"]
    assert published["measured"] is False
    assert published["perplexity_ratio"] > 1
    assert published["source"]
    checkpoint = open_checkpoint(plan.source)
    made = MeasuredQuality(
        perplexity=11.0, baseline=10.0, kl_mean=0.02, same_top=0.9, tokens=100, samples=4, length=25, text="built-in",
        text_sha256="0", reference="demo", reference_sha256="1", weights_sha256="2",
        weight_bytes=checkpoint.weight_bytes, through="engine", date="2026-11-30",
    )  # fmt: skip
    record = Path(plan.source) / record_name(checkpoint)
    record.write_text(record_text(made))
    try:
        (model,) = load_object({"engine_config": {"model_id": "m", "hf_model_id": plan.source}}, "test").models
        again = make_plan(compose(model, Registry.load({}), find_target("a100-80g")))
    finally:
        record.unlink()
    quality = ask(again).json["models"][0]["quality"]
    assert (quality["measured"], quality["perplexity_ratio"], quality["kl_mean"], quality["same_top"]) == (
        True, 1.1, 0.02, 0.9,
    )  # fmt: skip
    assert (quality["reference"], quality["text"]) == ("demo", "built-in")


def test_methods_and_keys(plan: Plan) -> None:
    assert ask(plan, "HEAD").status == 200
    for method in ("POST", "PUT", "DELETE"):
        answer = ask(plan, method)
        assert (answer.status, answer.error["code"], answer.headers["allow"]) == (405, "method_not_allowed", "GET")
    policy = Policy(keys=KeySet(fixed=(sha256(KEY.encode()).hexdigest(),)), access_log="off")
    assert ask(plan, policy=policy).status == 401
    assert ask(plan, policy=policy, headers={"authorization": f"Bearer {KEY}"}).status == 200
    assert ask(plan, path="/below/status", root_path="/below").status == 200


def test_the_page_of_the_docs_names_every_field(plan: Plan) -> None:
    example = PAGE.read_text().partition("## `GET /status`")[2].partition("```json\n")[2].partition("```")[0]
    shown, model = json.loads(example), ask(plan).json["models"][0]
    assert set(shown["models"][0]) == FIELDS
    for name in ("expected", "target", "limits", "quality"):
        assert set(shown["models"][0][name]) == set(model[name]), name


# --- load and replicas ---------------------------------------------------------------------------------


def pool_with(limits: Limits | None = None, **states: str) -> Pool:
    made = Pool("m", limits or Limits())
    made.update([{"id": name, "host": "127.0.0.1", "port": 9, "state": state} for name, state in states.items()])
    return made


def test_states() -> None:
    assert pool_with().state == "starting"
    assert pool_with(a="ready").state == "ready"
    assert pool_with(a="unknown", b="draining").state == "ready"
    assert pool_with(a="draining").state == "unhealthy"
    gone = pool_with(a="ready")
    gone.update([])
    assert gone.state == "unhealthy"
    asleep = pool_with(Limits(wakes=True), a="ready")
    asleep.update([])
    assert asleep.state == "stopped"
    broken = pool_with(a="ready")
    broken.replicas["a"].broken = True
    assert broken.state == "unhealthy"


def test_a_sleeping_model_with_a_queue_is_starting() -> None:
    async def go() -> None:
        pool = pool_with(Limits(wakes=True, queue_s=60))
        waiting = asyncio.create_task(pool.slot().__aenter__())
        while not pool.waiting:
            await asyncio.sleep(0)
        assert pool.state == "starting"
        waiting.cancel()

    asyncio.run(go())


def test_requests_in_progress_and_queued(plan: Plan) -> None:
    replica = Replica()

    async def go() -> tuple[Any, Any]:
        replica.hold = asyncio.Event()
        models = described(plan)
        models[0]["limits"] |= {"ongoing": 1}
        directory = Directory(models, TOKEN)
        app = public_app(models, directory, Policy(access_log="off"))
        async with served(replica) as port:
            directory.update({"org/m": [{"id": "r1", "host": "127.0.0.1", "port": port}]})
            running = [asyncio.create_task(post(app, {"model": "org/m", "prompt": "x"})) for _ in range(3)]
            await until(lambda: len(directory.pools["org/m"].waiting) == 2)
            busy = (await request(app, "GET", "/status")).json["models"][0]
            replica.hold.set()
            assert [answer.status for answer in await asyncio.gather(*running)] == [200] * 3
            idle = (await request(app, "GET", "/status")).json["models"][0]
        return busy, idle

    busy, idle = in_loop(go)
    assert (busy["state"], busy["ongoing"], busy["queued"], busy["limits"]["ongoing"]) == ("ready", 1, 2, 1)
    assert busy["replicas"] == [{"id": "r1", "state": "ready", "ongoing": 1}]
    assert (idle["ongoing"], idle["queued"], idle["replicas"][0]["ongoing"]) == (0, 0, 0)


# --- observed performance --------------------------------------------------------------------------------


class Engines:
    """The metrics endpoint over replicas whose texts are given, and how often they were asked."""

    def __init__(self) -> None:
        self.text = EARLIER
        self.asked = 0
        self.pools = [pool_with(a="ready"), pool_with(b="ready")]
        self.pools[0].model_id, self.pools[1].model_id = (str(card["id"]) for card in CARDS)
        self.endpoint = MetricsEndpoint(GatewayMetrics(CARDS, lambda: self.pools), self.fetch)

    async def fetch(self, replica: Any) -> bytes:
        self.asked += 1
        await asyncio.sleep(0)
        return self.text


def test_observed_is_what_the_metrics_say(plan: Plan) -> None:
    from quantserve.serve.gateway.routing.status import Status

    async def go() -> dict[str, Any]:
        engines = Engines()
        status = Status([{"card": card} for card in CARDS], lambda: engines.pools, engines.endpoint)
        await engines.endpoint.refresh(0)
        assert status.report()["models"][0]["observed"] is None
        engines.text = LATER
        await asyncio.sleep(0.01)
        await engines.endpoint.refresh(0)
        means = engines.endpoint.observed.means("demo")
        observed: dict[str, Any] = status.report()["models"][0]["observed"]
        assert observed["ttft_ms"] == pytest.approx(1000 * means["ttft_seconds"], rel=1e-3)
        assert observed["tpot_ms"] == pytest.approx(1000 * means["tpot_seconds"], rel=1e-3)
        assert observed["tokens_per_s"] == pytest.approx(means["output_tokens_per_second"], rel=1e-3)
        return observed

    observed = asyncio.run(go())
    assert observed["requests"] == 4
    assert observed["total_tokens_per_s"] > 0
    assert observed["window_s"] >= 0


def test_many_who_ask_share_one_round() -> None:
    async def go() -> int:
        engines = Engines()
        await asyncio.gather(*(engines.endpoint.refresh(60) for _ in range(50)))
        await engines.endpoint.refresh(60)
        return engines.asked

    assert asyncio.run(go()) == 2  # each replica once


def test_a_replica_that_fails_spoils_nothing(plan: Plan) -> None:
    async def go() -> Answer:
        models = described(plan)
        directory = Directory(models, TOKEN)
        directory.update({"org/m": [{"id": "r", "host": "127.0.0.1", "port": 9}]})
        return await request(public_app(models, directory, Policy(access_log="off")), "GET", "/status")

    answer = asyncio.run(go())
    assert answer.status == 200
    assert answer.json["models"][0]["observed"] is None


def test_samples_are_taken_from_startup_to_shutdown() -> None:
    """The router's lifespan runs the work beside the app and ends it."""
    states: list[str] = []

    async def work() -> None:
        states.append("runs")
        try:
            await asyncio.Event().wait()
        finally:
            states.append("ended")

    async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError

    async def healthy() -> bool:
        return True

    async def go() -> None:
        router = Router([ServedModel({"id": "m"}, nothing, healthy, "/m")], work=work)
        incoming: asyncio.Queue[dict[str, str]] = asyncio.Queue()
        sent: asyncio.Queue[Any] = asyncio.Queue()
        life = asyncio.create_task(router({**request_scope("GET", "/"), "type": "lifespan"}, incoming.get, sent.put))
        incoming.put_nowait({"type": "lifespan.startup"})
        assert (await sent.get())["type"] == "lifespan.startup.complete"
        while not states:
            await asyncio.sleep(0)
        incoming.put_nowait({"type": "lifespan.shutdown"})
        assert (await sent.get())["type"] == "lifespan.shutdown.complete"
        await life
        while len(states) < 2:
            await asyncio.sleep(0)

    asyncio.run(go())
    assert states == ["runs", "ended"]
