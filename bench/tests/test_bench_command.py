"""`quantserve bench` against a server whose models are made up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pytest

from helpers.waiting import until
from quantserve.cli.main import run
from quantserve.config import ModelConfig
from quantserve_bench import Target
from quantserve_bench.command import command
from quantserve_bench.measured import SLO_KEYS
from quantserve_bench.workloads import WORKLOADS

from .fake_server import Exchange, FakeServer, Step, stream, whole

PROFILE = {
    "source": "calibration",
    "conditions": "64 in, 4 out",
    "e2e_ms": 100.0,
    "ttft_ms": 50.0,
    "itl_ms": 25.0,
    "output_tokens_per_s": 40.0,
}


class ModelServer(FakeServer):
    """A fake server that also answers what a benchmark asks first."""

    models: dict[str, dict[str, Any] | None] = {"demo-awq": PROFILE, "demo-fp16": None}
    max_model_len: int | None = 2048
    tokenizes = True
    key = ""

    async def _answer(self, steps: Iterable[Step], exchange: Exchange, writer: Any) -> None:
        path = exchange.head.split(" ")[1]
        if self.key and f"Bearer {self.key}" not in exchange.head:
            steps = [whole(401, {"error": {"message": "a key is needed"}})]
        elif path == "/v1/models":
            steps = [whole(200, {"data": [self._card(name) for name in self.models]})]
        elif path == "/version":
            steps = [whole(200, {"version": "0.32.0"})]
        elif path == "/tokenize":
            tokens = list(range(max(1, len(exchange.body["prompt"]) // 4)))
            steps = [whole(200 if self.tokenizes else 404, {"tokens": tokens} if self.tokenizes else {})]
        elif path == "/detokenize":
            steps = [whole(200, {"prompt": "abcd" * len(exchange.body["tokens"])})]
        await super()._answer(steps, exchange, writer)

    def _card(self, name: str) -> dict[str, Any]:
        metadata = {"method": name.split("-")[1], "bits": 4, "expected_performance": self.models[name]}
        return {"id": name, "max_model_len": self.max_model_len, "metadata": metadata}

    def bodies(self) -> list[dict[str, Any]]:
        """Of the requests for completions."""
        return [x.body for x in self.exchanges if "completions" in x.head.split("\r\n")[0]]


def answer(number: int, body: dict[str, Any]) -> Iterable[Step]:
    return stream([(0.02, ["a"]), (0.01, ["b"]), (0.01, ["c", "d"])], prompt=64)


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with ModelServer(answer) as running:
        yield running


@pytest.fixture
def bench(server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QUANTSERVE_API_KEY", raising=False)

    def call(*arguments: str) -> int:
        return run(["bench", "--url", server.url, "--warmup", "0", "--no-plots", "--out", "out", *arguments])

    return call


def results(tmp_path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((tmp_path / "out" / "results.json").read_text())
    return loaded


def test_all_models_at_several_loads(
    bench: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("-n", "6", "-c", "1,3", "--slo", "ttft=500", "--metadata", "site=here") == 0
    values = results(tmp_path)
    loads = [(m["model"], m["load"]["label"]) for m in values["measurements"]]
    assert loads == [(name, load) for name in ("demo-awq", "demo-fp16") for load in ("1 user", "3 users")]
    for m in values["measurements"]:
        assert m["totals"]["requests"] == m["totals"]["completed"] == 6
        assert m["metrics"]["output_tokens"]["mean"] == 4
        assert m["metrics"]["ttft"]["min"] >= 19
        assert m["server"] == {"version": "0.32.0"}
        assert m["tokenizer"] == "the server's /tokenize"
    assert values["metadata"] == {"site": "here"}
    out = capsys.readouterr().out
    for word in ("demo-awq", "awq 4 bit", "3 users", "Expected beside measured", "calibration, 64 in, 4 out"):
        assert word in out


def test_json_equals_the_written_results(
    bench: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("-n", "2", "--model", "demo-fp16", "--json") == 0
    assert json.loads(capsys.readouterr().out) == results(tmp_path)


def test_requests_are_made_as_asked(bench: Callable[..., int], server: ModelServer) -> None:
    options = ("--workload", "random", "--input-tokens", "20", "--output-tokens", "9", "--extra", '{"top_p": 0.5}')
    assert bench("-n", "3", "--model", "demo-awq", "--temperature", "0.7", *options) == 0
    bodies = server.bodies()[-3:]
    assert all(len(body["prompt"]) == 20 for body in bodies)
    wanted = {"max_tokens": 9, "ignore_eos": True, "temperature": 0.7, "top_p": 0.5, "model": "demo-awq"}
    assert all(body.items() >= wanted.items() for body in bodies)


def test_warm_up_is_not_counted(server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        run(
            [
                "bench",
                "--url",
                server.url,
                "--model",
                "demo-awq",
                "-n",
                "4",
                "--warmup",
                "3",
                "--no-plots",
                "--out",
                "out",
            ]
        )
        == 0
    )
    assert len(server.bodies()) == 1 + 3 + 4  # a probe, the warm-up, the measurement
    assert results(tmp_path)["measurements"][0]["totals"]["requests"] == 4


def test_open_load_and_trace(bench: Callable[..., int], tmp_path: Path) -> None:
    assert bench("-n", "5", "--model", "demo-awq", "--rate", "50", "--arrival", "constant") == 0
    assert results(tmp_path)["measurements"][0]["load"]["label"] == "50 req/s"
    lines = [json.dumps({"timestamp": i / 20, "prompt": "hello", "max_tokens": 4}) for i in range(3)]
    (tmp_path / "trace.jsonl").write_text("\n".join(lines))
    assert bench("--model", "demo-awq", "--trace", "trace.jsonl", "--overwrite") == 0
    traced = results(tmp_path)["measurements"][0]
    assert (traced["load"]["shape"], traced["totals"]["requests"]) == ("timed", 3)
    assert traced["totals"]["duration_s"] >= 0.1


def test_rayllm_2023_runs_in_rounds(bench: Callable[..., int], server: ModelServer, tmp_path: Path) -> None:
    assert bench("--workload", "rayllm-2023", "-n", "6", "-c", "3", "--model", "demo-awq", "--scale", "0.5") == 0
    values = results(tmp_path)
    assert values["measurements"][0]["load"]["label"] == "rounds of 3"
    assert all(body["max_tokens"] == 192 and body["temperature"] == 0 for body in server.bodies()[-6:])
    assert server.most_in_flight == 3


def test_the_gate(bench: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("-n", "3", "--model", "demo-awq", "--fail-under", "0.01") == 0
    assert bench("-n", "3", "--model", "demo-awq", "--fail-under", "1000", "--overwrite") == 1
    assert "below --fail-under 1000" in capsys.readouterr().err
    assert bench("-n", "3", "--model", "demo-fp16", "--fail-under", "0.01", "--overwrite") == 1
    assert (
        "demo-fp16, 10 users: --fail-under needs an expected performance, and the server reports none"
        in capsys.readouterr().err
    )


def test_failed_requests_are_counted_and_fail_the_gate(
    bench: Callable[..., int], server: ModelServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sometimes(number: int, body: dict[str, Any]) -> Iterable[Step]:
        refused = body.get("max_tokens") != 1 and len(server.bodies()) % 2
        return [whole(429, {"error": {"message": "queue full"}})] if refused else answer(number, body)

    server.script = sometimes
    assert bench("-n", "6", "-c", "1", "--model", "demo-awq") == 0
    measured = results(tmp_path)["measurements"][0]
    assert measured["error_codes"] == {"429": 3}
    assert "3 of 6 requests failed with 429: queue full" in capsys.readouterr().out
    assert bench("-n", "6", "-c", "1", "--model", "demo-awq", "--fail-under", "0.001", "--overwrite") == 1
    assert "requests failed" in capsys.readouterr().err


def test_a_run_without_a_token_fails(
    bench: Callable[..., int], server: ModelServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = lambda number, body: stream([], prompt=64)
    assert bench("-n", "3", "--model", "demo-awq") == 1
    assert "demo-awq, 10 users: no request got an output token" in capsys.readouterr().err


@pytest.mark.parametrize(("soft", "hard", "code"), [(60, 400, 0), (60, 60, 1)])
def test_open_files(server: ModelServer, tmp_path: Path, soft: int, hard: int, code: int) -> None:
    """120 connections need more than the soft limit, which the client raises; with too low a hard limit it fails."""
    server.script = lambda number, body: stream([(0.5, ["a"])], prompt=64)
    limited = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}));"
        "from quantserve.cli.main import run; sys.exit(run(sys.argv[1:]))"
    )
    arguments = ["bench", "--url", server.url, "--model", "demo-awq", "--warmup", "0", "--no-plots", "--out", "out"]
    command = [sys.executable, "-c", limited, *arguments, "-n", "120", "-c", "120"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == code, done.stderr
    errors = results(tmp_path)["measurements"][0]["error_codes"]
    if code:
        assert errors["open-files"] > 60
        assert f"{errors['open-files']} of 120 requests failed in this client, not in the server" in done.stderr
        assert "fix: raise the hard limit of open files" in done.stderr
    else:
        assert errors == {}


def test_a_certificate_that_cannot_be_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")]
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *files, *name]
    if not shutil.which("openssl") or subprocess.run(made, capture_output=True).returncode:
        pytest.skip("no openssl here")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    monkeypatch.chdir(tmp_path)
    with ModelServer(answer, context) as server:
        arguments = ["bench", "--warmup", "0", "--no-plots", "--model", "demo-awq", "-n", "2"]
        secure = f"https://localhost:{server.port}"
        assert run([*arguments, "--url", secure]) == 4
        said = capsys.readouterr().err
        assert "cannot verify the certificate of localhost" in said
        assert "SSL_CERT_FILE" in said
        assert "start the server" not in said
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        assert run([*arguments, "--url", secure]) == 0
        capsys.readouterr()
        assert run([*arguments, "--out", "plain", "--url", secure.replace("https", "http")]) == 4
        assert "https://" in capsys.readouterr().err


def test_prompts_by_estimate_without_tokenize(bench: Callable[..., int], server: ModelServer, tmp_path: Path) -> None:
    server.tokenizes = False
    assert bench("-n", "2", "--model", "demo-awq") == 0
    assert "prompt lengths are estimates" in str(results(tmp_path)["measurements"][0]["warnings"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "demo-akq"], "did you mean 'demo-awq'"),
        (["--workload", "lmperf"], "unknown workload 'lmperf'; did you mean 'llmperf'?"),
        (["--workload", "trace"], "give it with --trace FILE"),
        (["--rate", "5", "-c", "4"], "--rate (open load) excludes --concurrency"),
        (["--rate-end", "5"], "--rate-end needs --rate and --ramp"),
        (["--max-concurrency", "5"], "--max-concurrency needs an open load"),
        (["--slo", "tttf=5"], "unknown limit 'tttf'"),
        (["--slo", "ttft=fast"], "is not a number of milliseconds"),
        (["--metadata", "x"], "'x' is not NAME=VALUE"),
        (["--extra", "{"], "--extra: not JSON"),
        (["--extra", "[1]"], "[1] is not a JSON object"),
        (["-c", "0"], "not a comma-separated list of whole numbers above 0"),
        (["-c", "1,x"], "not a comma-separated list of whole numbers above 0"),
        (["--rate", "inf"], "not a comma-separated list of numbers above 0"),
        (["--input-tokens", "12/x"], "is not MEAN or MEAN/SD"),
        (["--tokenizer", "nowhere"], "give the path of a tokenizer.json"),
        (["--compare", "awq"], "--compare and --together need a CONFIG"),
        (["models/demo.yaml"], "fix: give one of them"),
    ],
)
def test_usage_errors(
    bench: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert bench("-n", "2", *arguments) == 2
    err = capsys.readouterr().err
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_a_server_is_named_with_url(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "http://127.0.0.1:8000"]) == 2
    assert "fix: use --url http://127.0.0.1:8000" in capsys.readouterr().err


def test_too_long_requests_are_refused_before_the_measurement(
    bench: Callable[..., int], server: ModelServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.max_model_len = 512
    assert bench("-n", "4", "--workload", "random") == 2
    err = capsys.readouterr().err
    assert "4 of 4 requests exceed the context length of demo-awq: the limit is 512 tokens" in err
    assert "the longest request needs 640\n  fix: multiply --scale (default 1) by 0.8" in err
    assert server.bodies() == []
    assert bench("-n", "4", "--workload", "random", "--scale", "0.8") == 0


def test_keys(bench: Callable[..., int], server: ModelServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.key = "sesame"
    assert bench("-n", "2") == 2
    assert "fix: set --api-key" in capsys.readouterr().err
    assert bench("-n", "2", "--api-key", "sesame") == 0


def test_a_refusal_is_reported_once(
    bench: Callable[..., int], server: ModelServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = lambda number, body: [whole(400, {"error": {"message": "no such parameter"}})]
    assert bench("-n", "50") == 2
    assert capsys.readouterr().err.count("no such parameter") == 1
    server.script = lambda number, body: ["close"]
    assert bench("-n", "50") == 4


def test_connection_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--url", "http://127.0.0.1:9", "--out", str(tmp_path / "out")]) == 4
    assert "start the server, or correct --url" in capsys.readouterr().err
    assert run(["bench"]) == 2
    assert "give a running server with --url, or a CONFIG to serve" in capsys.readouterr().err


def test_a_used_folder_is_refused_before_anything_is_measured(
    bench: Callable[..., int], server: ModelServer, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    assert bench("-n", "2") == 2
    assert server.exchanges == []


class Started:
    """Takes the place of a server process: the fake server, with the models it was asked to serve."""

    running: ModelServer
    groups: list[list[str]]

    def __init__(self, models: Sequence[ModelConfig], folder: Path, waiting: Callable[[float], None]) -> None:
        self._ids = [model.model_id for model in models]

    def __enter__(self) -> Target:
        self.groups.append(self._ids)
        self.running.models = {f"{name}": PROFILE for name in self._ids}
        return Target(self.running.url, "")

    def __exit__(self, *_: object) -> None:
        self.running.models = {}


@pytest.fixture
def own(server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Two models of one checkpoint, and a command that serves them by the fake server."""
    checkpoint = Path(__file__).parents[2] / "examples" / "demo-model" / "checkpoint"
    models = [
        {
            "engine_config": {
                "model_id": name,
                "hf_model_id": str(checkpoint),
                "max_total_tokens": 512,
                "engine_kwargs": {"quantization": "fp16"},
            },
            "scaling_config": {"num_gpus_per_worker": 0},
        }
        for name in ("demo-one", "demo-two")
    ]
    (tmp_path / "models.yaml").write_text(json.dumps({"models": models}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("quantserve_bench.program.Server", Started)
    monkeypatch.setattr(Started, "running", server, raising=False)
    monkeypatch.setattr(Started, "groups", [], raising=False)
    server.max_model_len = 512

    def call(*arguments: str) -> int:
        fixed = ("--warmup", "0", "--no-plots", "--out", "out", "--scale", "0.3", "-n", "4", "-c", "2")
        return run(["bench", "models.yaml", *fixed, *arguments])

    return call


def test_served_models_are_compared_with_a_prediction_for_their_load(own: Callable[..., int], tmp_path: Path) -> None:
    assert own() == 0
    assert Started.groups == [["demo-one"], ["demo-two"]]
    first, second = results(tmp_path)["measurements"]
    assert (first["model"], second["model"]) == ("demo-one", "demo-two")
    # The fake server counts 64 tokens in and 4 out, and that is what was predicted: not what /v1/models says.
    assert "predicted for 64 in, 4 out, 2 at once, closed loop" in first["expected"]["conditions"]
    keys = [verdict["key"] for verdict in first["verdicts"]]
    assert keys == ["e2e", "ttft", "normalized", "tpot", "tokens_per_s", "output_tokens_per_s"]


def test_an_open_load_is_compared_with_the_servers_expected_performance(
    own: Callable[..., int], tmp_path: Path
) -> None:
    fixed = ("--warmup", "0", "--no-plots", "--out", "out", "--scale", "0.3", "-n", "3", "--rate", "50")
    assert run(["bench", "models.yaml", "--compare", "demo-two", *fixed]) == 0
    (only,) = results(tmp_path)["measurements"]
    assert (only["model"], only["expected"]["conditions"]) == ("demo-two", "64 in, 4 out")


def test_together_and_compare(own: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert own("--together", "--compare", "demo-two,demo-one") == 0
    assert Started.groups == [["demo-two", "demo-one"]]
    assert own("--compare", "fp16", "--overwrite") == 2
    assert "fp16 is the method of several models" in capsys.readouterr().err
    assert own("--compare", "demo-tow", "--overwrite") == 2
    assert "did you mean 'demo-two'" in capsys.readouterr().err


def test_a_model_that_check_refuses_is_not_started(
    own: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((tmp_path / "models.yaml").read_text())
    config["models"][0]["engine_config"]["max_total_tokens"] = 10**7
    (tmp_path / "models.yaml").write_text(json.dumps(config))
    code = own()
    assert code == 1
    assert "demo-one" in capsys.readouterr().err
    assert Started.groups == []


def test_ctrl_c_keeps_completed_measurements(server: ModelServer, tmp_path: Path) -> None:
    """The first model is measured, the second answers for ever."""

    def script(number: int, body: dict[str, Any]) -> Iterable[Step]:
        if body.get("model") == "demo-fp16" and body.get("max_tokens", 1) != 1:
            return [60.0]
        return answer(number, body)

    server.script = script
    options = ["-n", "3", "--warmup", "0", "--no-plots", "--out", "out"]
    command = [sys.executable, "-m", "quantserve", "bench", "--url", server.url, *options]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    until(lambda: sum(body["model"] == "demo-fp16" for body in server.bodies()) == 4)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "interrupted; the completed measurements are in out" in err
    assert "Traceback" not in err
    assert [m["model"] for m in results(tmp_path)["measurements"]] == ["demo-awq"]


def test_the_help_names_every_workload_and_limit() -> None:
    helps = {option.name: option.help or "" for option in command.params if isinstance(option, click.Option)}
    assert helps["workload_name"] == f"Workload: {', '.join(WORKLOADS)}."
    assert helps["slo"] == f"Limits in ms for goodput: {', '.join(SLO_KEYS)}."


def test_the_module_of_the_command_is_light() -> None:
    """`quantserve list` imports it."""
    new = "print(*set(sys.modules) - before)"
    code = f"import sys, click; before = set(sys.modules); import quantserve_bench.command; {new}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert {name for name in imported if name.partition(".")[0] not in sys.stdlib_module_names} == {
        "quantserve_bench",
        "quantserve_bench.command",
    }
    assert not {"asyncio", "ssl"} & imported


def test_heavy_packages_stay_out() -> None:
    heavy = ("torch", "vllm", "ray", "numpy", "transformers", "matplotlib", "tokenizers")
    code = f"import sys, quantserve_bench.program; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
