"""Engine runs shared by the tests of this plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PROMPTS = [[1, 17, 333, 42, 99], [2, 400, 401, 7, 8, 250, 64, 3, 129], [5], list(range(100, 140))]


@dataclass(frozen=True)
class Generation:
    """Greedy tokens of one prompt, with the log-probability the engine gave each."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


@pytest.fixture(scope="session")
def run_engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Generation]]:
    """Start a real vLLM engine in a process of its own, generate greedily, stop it."""

    def run(model: Path, **engine_args: Any) -> list[Generation]:
        out = tmp_path_factory.mktemp("engine") / "out.json"
        spec = {"model": str(model), "prompts": PROMPTS, "engine_args": engine_args, "out": str(out)}
        ranks = engine_args.get("tensor_parallel_size", 1)
        # By itself vLLM binds one rank per NUMA node; several ranks on one node need their cores named.
        cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
        binding = {"VLLM_CPU_OMP_THREADS_BIND": "|".join((cores * ranks)[:ranks])} if ranks > 1 else {}
        environment = {
            **os.environ,
            **binding,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_PLUGINS": "squeezellm",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        done = subprocess.run(
            [sys.executable, str(Path(__file__).parent / "engine_main.py"), json.dumps(spec)],
            capture_output=True,
            text=True,
            timeout=400,
            env=environment,
        )
        if done.returncode != 0 or not out.exists():
            raise RuntimeError(f"engine failed with {done.returncode}:\n{done.stdout[-20000:]}\n{done.stderr[-20000:]}")
        return [Generation(prompt, *item) for prompt, item in zip(PROMPTS, json.loads(out.read_text()), strict=True)]

    return run
