"""The servers: how each is started on the same engine arguments, and where its models answer."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.console import BUILD, ROOT, BenchError, shown
from benchmarks.serving import ray_venv
from benchmarks.serving.models import SERVING, Model, write_config
from benchmarks.serving.processes import Tree
from quantserve.errors import EngineError
from quantserve_bench.request import Target
from quantserve_bench.server import free_port
from quantserve_bench.tokens import Session

START_S: Final = 300.0
POLL_S: Final = 0.1
ANSWER_S: Final = 60.0
LOST: Final = ("VLLM_", "OMP_", "GOMP_", "KMP_", "RAY_", "SERVE_", "QUANTSERVE_")
"""Variables of ours that would change a server."""


@dataclass(frozen=True)
class Command:
    """One process to start.

    Attributes:
        line: words of the command.
        environment: variables besides those of this process.
        urls: model id -> where its own route is.
        shared: where all models are, chosen by the request's `model`; empty where there is no such place.
    """

    line: Sequence[str]
    environment: Mapping[str, str]
    urls: Mapping[str, str]
    shared: str = ""


Build = Callable[[Sequence[Model]], list[Command]]


def bare(models: Sequence[Model]) -> list[Command]:
    """vLLM's own server for each model."""
    return [bare_one(model) for model in models]


def bare_one(model: Model) -> Command:
    """vLLM's own server for one model, on the engine arguments and variables of quantserve's plan."""
    port = free_port()
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    line += ["--disable-uvicorn-access-log", *flags(model.engine_args)]
    return Command(line, model.environment, {model.id: f"http://127.0.0.1:{port}/v1"})


def flags(engine_args: Mapping[str, Any]) -> list[str]:
    """Engine arguments as options of vLLM's command line."""
    words: list[str] = []
    for name, value in engine_args.items():
        option = "--" + name.replace("_", "-")
        if value is True:
            words.append(option)
        elif value is False:
            words.append("--no-" + option[2:])
        elif isinstance(value, dict):
            words += [option, json.dumps(value)]
        elif isinstance(value, list):
            words += [option, *map(str, value)]
        elif value is not None:
            words += [option, str(value)]
    return words


def quantserve(models: Sequence[Model]) -> list[Command]:
    """`quantserve serve` for all of them."""
    port = free_port()
    config = write_config([model.config for model in models], "served-" + "-".join(model.id for model in models))
    line = [sys.executable, "-m", "quantserve", "serve", str(config), "--host", "127.0.0.1", "--port", str(port)]
    base = f"http://127.0.0.1:{port}"
    if len(models) == 1:
        return [Command(line, {}, {models[0].id: f"{base}/v1"})]
    return [Command(line, {}, {m.id: f"{base}{m.plan['route_prefix']}/v1" for m in models}, f"{base}/v1")]


def ray_llm(models: Sequence[Model], environment: Mapping[str, str]) -> list[Command]:
    """Ray Serve LLM for all of them."""
    ray_venv.install()
    port = free_port()
    spec = [
        {
            "id": model.id,
            "source": model.engine_args["model"],
            "engine_kwargs": {k: v for k, v in model.engine_args.items() if k not in ("model", "served_model_name")},
            "env_vars": model.environment,
        }
        for model in models
    ]
    path = SERVING / "ray-llm.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(spec, indent=2) + "\n")
    line = [str(ray_venv.PYTHON), "-m", "benchmarks.serving.ray_llm", str(path), str(port)]
    url = f"http://127.0.0.1:{port}/v1"
    return [Command(line, environment, {model.id: url for model in models}, url)]


def ray_default(models: Sequence[Model]) -> list[Command]:
    """Ray Serve LLM as it comes."""
    return ray_llm(models, {})


def ray_direct(models: Sequence[Model]) -> list[Command]:
    """Its direct streaming, behind HAProxy."""
    return ray_llm(models, {"RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1", "RAY_SERVE_ENABLE_HA_PROXY": "1"})


@dataclass
class Started:
    """What a start took.

    Attributes:
        first_token_s: from the command to each model's first token.
        idle_cores: cores its processes kept busy while nobody asked, once settled.
        memory_bytes: what only its processes hold.
        other_cores: cores that others kept busy while it started, its own processes that have ended included.
    """

    first_token_s: dict[str, float] = field(default_factory=dict)
    idle_cores: float | None = None
    memory_bytes: int | None = None
    other_cores: float | None = None


class Server:
    """A server with all its processes, from `start` to `stop`.

    Args:
        name: for messages and the log file.
        commands: its processes.
    """

    def __init__(self, name: str, commands: Sequence[Command]) -> None:
        self.name = name
        self.commands = commands
        self.started = Started()
        self._given_up = threading.Event()
        self._running: list[tuple[subprocess.Popen[bytes], Tree, Path]] = []

    def start(self) -> None:
        """Start it and wait for the first token of every model.

        Raises:
            BenchError: it did not get there.
        """
        began = time.monotonic()
        for number, command in enumerate(self.commands):
            log = BUILD / "logs" / f"serving-{self.name}{f'-{number}' if number else ''}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("wb") as out:
                process = subprocess.Popen(
                    command.line, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT,
                    env=environment(command.environment), start_new_session=True,
                )  # fmt: skip
            self._running.append((process, Tree(process.pid), log))
        wanted = {model: url for command in self.commands for model, url in command.urls.items()}
        with ThreadPoolExecutor(len(wanted)) as waiting:
            try:
                times = waiting.map(lambda pair: self._first_token(began, *pair), wanted.items())
                self.started.first_token_s = dict(zip(wanted, times, strict=True))
            except BaseException:  # Ctrl-C too: leaving the block would wait for the threads
                self._given_up.set()
                raise

    def route(self, model: str) -> Target:
        """A model's own place."""
        return next(Target(command.urls[model], model) for command in self.commands if model in command.urls)

    def shared(self, model: str) -> Target:
        """The place of all models."""
        return Target(self.commands[0].shared, model)

    def cpu_s(self) -> float:
        """Processor time so far, in seconds."""
        return sum(tree.cpu_s() for _, tree, _ in self._running)

    def memory(self) -> int:
        """Bytes that only its processes hold."""
        return sum(tree.memory() for _, tree, _ in self._running)

    def freeze(self) -> None:
        """Let it use no processor until `thaw`."""
        for _, tree, _ in self._running:
            tree.freeze()

    def thaw(self) -> None:
        """Let it go on."""
        for _, tree, _ in self._running:
            tree.thaw()

    def stop(self) -> None:
        """End all processes."""
        running, self._running = self._running, []
        for process, tree, _ in running:
            tree.stop()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)

    def _first_token(self, began: float, model: str, url: str) -> float:
        while (passed := time.monotonic() - began) < START_S and not self._given_up.is_set():
            for process, _, log in self._running:
                if process.poll() is not None:
                    raise BenchError(f"ended with exit code {process.returncode}: {ray_venv.last_line(log)[:300]}")
            if answers(Target(url, model)):
                return time.monotonic() - began
            time.sleep(POLL_S)
        raise BenchError(f"no first token of {model} in {passed:.0f} s; log: {shown(self._running[0][2])}")


def answers(target: Target) -> bool:
    """Whether a model gives a token."""
    session = Session(target, ANSWER_S)
    try:
        status, _ = session.ask("POST", "/v1/completions", {"model": target.model, "prompt": "a", "max_tokens": 1})
    except EngineError:
        return False
    finally:
        session.close()
    return status == 200


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """Variables a server starts with: ours without those that would change it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(LOST)}
    return {
        **kept, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "RAY_USAGE_STATS_ENABLED": "0",
        "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1", **more,
    }  # fmt: skip
