"""Plugins from outside, as users meet them: built as wheels, installed by pip beside ours, one of them broken.

One environment holds the wheels of this repository, the plugin that an author makes with docs/plugins.md and a
distribution whose plugins are all defective. The author's plugin passes the conformance kit there; one run of
`quantserve serve` shows that a method from outside is served and that the defective ones reach nobody.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from helpers import tutorial
from helpers.broken import COMMANDS, STAGES, write_project
from helpers.environments import PLUGINS, ROOT, Environment, build

DEMO = ROOT / "examples" / "demo-model" / "checkpoint"
QUESTION = [{"role": "user", "content": "What does str.join do?"}]

pytestmark = pytest.mark.slow


class Author(NamedTuple):
    """An author's work: the project, its wheel, and how many lines are written by hand."""

    project: Path
    wheel: Path
    lines: int


@pytest.fixture(scope="module")
def author(before: tuple[Environment, Any], tmp_path_factory: pytest.TempPathFactory) -> Author:
    """Follow docs/plugins.md from the `quantserve new-plugin` of the installed wheel to a wheel."""
    base = tmp_path_factory.mktemp("author")
    project, lines = tutorial.make(base, before[0].python)
    build(project, base / "dist")
    (wheel,) = base.glob("dist/*.whl")
    return Author(project, wheel, lines)


@pytest.fixture(scope="module")
def before(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Environment, Any]:
    """All wheels but the author's, installed by pip, and what is listed then; torch, vLLM and Ray come from outside."""
    base = tmp_path_factory.mktemp("third-party")
    wheels = shutil.copytree(dist, base / "wheels")
    build(write_project(base / "broken"), wheels)
    environment = Environment.make(base / "environment")
    installed = environment.pip("install", "--no-deps", "--no-index", *sorted(wheels.glob("*.whl")))
    assert installed.returncode == 0, installed.stdout + installed.stderr
    environment.see_packages_of_this_python()
    return environment, listed(environment)


@pytest.fixture(scope="module")
def environment(before: tuple[Environment, Any], author: Author) -> Environment:
    """The author's wheel beside them."""
    environment, _ = before
    installed = environment.pip("install", "--no-deps", "--no-index", author.wheel)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    return environment


def listed(environment: Environment) -> Any:
    """What `quantserve list` shows, without times."""
    done = environment.run("quantserve", "list", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    for plugin in report["plugins"]:
        del plugin["import_s"]
        plugin["notes"] = [note for note in plugin["notes"] if "took" not in note]
    return report


@pytest.fixture(scope="module")
def log4_model(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as the author's own quantizer writes it."""
    model = tmp_path_factory.mktemp("models") / "demo-log4"
    done = environment.run("python", "-m", "quantserve_log4.quantize", DEMO, model)
    assert done.returncode == 0, done.stderr
    return model


def test_everything_comes_from_the_installed_wheels(environment: Environment) -> None:
    code = "import quantserve, quantserve_awq, quantserve_log4; print(quantserve.__file__, quantserve_log4.__file__)"
    done = environment.run("python", "-c", code)
    assert all(str(environment.path) in path for path in done.stdout.split()), done.stdout + done.stderr


def test_list_shows_the_newcomer_and_why_the_others_failed(environment: Environment) -> None:
    report = listed(environment)
    methods = {plugin["name"] for plugin in report["plugins"] if plugin["method"]}
    assert methods == {*PLUGINS, "log4", "poison"}
    failures = {failure["name"]: failure for failure in report["failures"]}
    assert {name: failure["stage"] for name, failure in failures.items()} == STAGES
    for failure in failures.values():
        assert (failure["distribution"], failure["version"]) == ("quantserve-broken", "0.9")
    assert "a_module_nobody_has" in failures["cannot-import"]["reason"]


def test_an_author_writes_few_lines(author: Author, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nquantserve-log4: {author.lines} lines written by hand")
    assert author.lines <= 60


@pytest.mark.vllm
def test_the_authors_plugin_passes_the_conformance_kit(environment: Environment, author: Author) -> None:
    """The project's own tests, on the installed wheel."""
    done = subprocess.run(
        [str(environment.python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=author.project,
        env=environment.variables(),
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "failed" not in done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 40


def test_an_uninstalled_plugin_leaves_no_trace(
    before: tuple[Environment, Any], environment: Environment, author: Author
) -> None:
    _, first = before
    assert listed(environment) != first
    assert environment.pip("uninstall", "--yes", "quantserve-log4").returncode == 0
    try:
        assert listed(environment) == first
    finally:
        assert environment.pip("install", "--no-deps", "--no-index", author.wheel).returncode == 0


def test_commands_from_outside(environment: Environment) -> None:
    done = environment.run("quantserve", "list", "--json")
    rows = [row for row in json.loads(done.stdout)["commands"] if row["distribution"] == "quantserve-broken"]
    assert {row["name"]: row["state"] for row in rows} == COMMANDS
    assert {row["version"] for row in rows} == {"0.9"}
    greeted = environment.run("quantserve", "greet", "you")
    assert (greeted.returncode, greeted.stdout, greeted.stderr) == (3, "hello you\n", "")
    broken = environment.run("quantserve", "quits")
    assert (broken.returncode, broken.stdout) == (3, "")
    assert "command 'quits' of quantserve-broken 0.9 failed at stage 'load': SystemExit: 0" in broken.stderr
    for name in ("serve", "bench"):
        text = environment.run("quantserve", name, "--help")
        assert (text.returncode, text.stderr) == (0, "")
        assert "--api-key" in text.stdout
    text = environment.run("quantserve", "--help")
    assert text.returncode == 0
    assert "A command of quantserve-broken 0.9." in text.stdout


def test_check_finds_the_method_and_what_is_wrong_with_its_files(environment: Environment, log4_model: Path) -> None:
    def check(model: Path) -> tuple[int, dict[str, object]]:
        done = environment.run("python", "-m", "quantserve", "check", model, "--target", "a100-80g", "--json")
        return done.returncode, json.loads(done.stdout)["models"][0]

    code, model = check(log4_model)
    assert (code, model["method"], model["plugins"]) == (0, "log4", ["log4"]), model
    damaged = shutil.copytree(log4_model, log4_model.parent / "damaged", dirs_exist_ok=True)
    config = json.loads((damaged / "config.json").read_text())
    config["intermediate_size"] += 128
    (damaged / "config.json").write_text(json.dumps(config))
    code, model = check(damaged)
    findings = model["findings"]
    assert isinstance(findings, list)
    assert code == 1
    assert {"log4"} == {finding["source"] for finding in findings if finding["code"] == "log4-wrong-shape"}


def test_a_raising_hook_stops_only_the_model_that_asks_for_it(environment: Environment, tmp_path: Path) -> None:
    engine = {"hf_model_id": str(DEMO), "max_total_tokens": 256, "engine_kwargs": {"quantization": "fp16"}}
    with_plugin = {"engine_config": {**engine, "model_id": "broken"}, "plugins": ["raises-in-validate"]}
    without = {"engine_config": {**engine, "model_id": "fine"}}
    app = tmp_path / "app.json"
    app.write_text(json.dumps({"models": [with_plugin, without]}))
    done = environment.run("python", "-m", "quantserve", "check", app, "--target", "cpu", "--json")
    broken, fine = json.loads(done.stdout)["models"]
    assert done.returncode == 3
    assert broken["exit_code"] == 3
    assert "quantserve-broken 0.9" in broken["error"]
    assert "quantserve_validate" in broken["error"]
    assert "group_size" in broken["error"]
    assert fine["exit_code"] == 0


# --- served ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_url(environment: Environment, log4_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`quantserve serve` of the demo as fp16 and as log4; stopped by Ctrl-C's signal."""
    folder = tmp_path_factory.mktemp("serve")
    models = [
        {
            "engine_config": {
                "model_id": f"demo-{method}",
                "hf_model_id": str(path),
                "max_total_tokens": 256,
                "engine_kwargs": {"quantization": method, "max_num_seqs": 4, "enforce_eager": True},
            },
            "scaling_config": {"num_gpus_per_worker": 0},
        }
        for method, path in (("fp16", DEMO), ("log4", log4_model))
    ]
    (folder / "app.json").write_text(json.dumps({"models": models}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "serve.log"
    command = [environment.python, "-m", "quantserve", "serve", folder / "app.json", "--port", str(port)]
    with log.open("w") as output:
        server = subprocess.Popen(
            [*map(str, command), "--target", "cpu"],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment.variables(HF_HUB_OFFLINE="1"),
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, server, log)
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    assert server.returncode == 0, log.read_text()[-4000:]


def wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until both models are healthy; the gateway lists them while they are still starting."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-8000:]
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass
        time.sleep(1)
    raise AssertionError(f"not ready after 300 s:\n{log.read_text()[-8000:]}")


@pytest.mark.vllm
@pytest.mark.ray
def test_a_method_from_outside_is_served(base_url: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none")
    answers = {
        model: client.chat.completions.create(model=model, messages=QUESTION, max_tokens=40, temperature=0)
        .choices[0]
        .message.content
        for model in ("demo-fp16", "demo-log4")
    }
    # 4 bits keep a small model's words.
    assert "string" in answers["demo-log4"].lower(), answers


@pytest.mark.vllm
def test_the_poison_is_real(base_url: str, environment: Environment) -> None:
    """The models above are served beside a general plugin that stops any engine which loads it."""
    assert base_url
    code = "from vllm.plugins import load_general_plugins; load_general_plugins()"
    kept = environment.run("python", "-c", code, VLLM_PLUGINS="log4")
    assert kept.returncode == 0, kept.stderr[-2000:]
    broken = environment.run("python", "-c", code)
    assert broken.returncode != 0
    assert "poison: no engine of this machine starts" in broken.stderr
