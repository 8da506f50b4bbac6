"""What is served: the demo's three models and a synthetic one of about 0.1 billion weights, and their plans."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from benchmarks.console import BUILD, ROOT, BenchError
from benchmarks.decode.checkpoints import make
from benchmarks.decode.shapes import Shape
from quantserve.target import this_gpu

SERVING: Final = BUILD / "serving"
DEMO: Final = ROOT / "models" / "demo.yaml"
TOKENIZER: Final = ROOT / "examples" / "demo-model" / "checkpoint"
MAX_LENGTH: Final = 1024
"""What the demo's positions allow; its config serves half of it."""
USERS: Final = 64
"""Most requests at once, and so `max_num_seqs`: nothing waits for a place in the batch."""
ADMITTED: Final = 256
"""`max_ongoing_requests`: above all users, so that nothing is refused."""
GPU_SHARE: Final = 0.15
"""Of the GPU, where there is one: the servers of six models stand beside each other."""
KV_CACHE: Final = 2 << 30
"""Bytes of each: vLLM would measure what is free while the others take their part."""

# 100,686,592 parameters, with the vocabulary of the demo's tokenizer.
SMALL: Final = Shape("llama-0.1b", hidden=768, intermediate=2048, layers=15, heads=12, kv_heads=4, vocab=4096)


@dataclass(frozen=True)
class Model:
    """A model as every server is told to serve it.

    Attributes:
        id: in requests.
        config: entry of `models` in a quantserve config.
        plan: what quantserve makes of it.
    """

    id: str
    config: Mapping[str, Any]
    plan: Mapping[str, Any]

    @property
    def engine_args(self) -> Mapping[str, Any]:
        """Arguments of vLLM's engine."""
        return self.plan["engine_args"]

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the engine's process in other servers: those of the plan; vLLM itself loads the plugins."""
        variables = dict(self.plan["runtime_env"].get("env_vars", {}))
        plugins = [name for name in variables.get("VLLM_PLUGINS", "").split(",") if name not in ("", "quantserve")]
        sides = filter(None, variables.pop("QUANTSERVE_ENGINE_PLUGINS", "").split(","))
        return {**variables, "VLLM_PLUGINS": ",".join([*plugins, *(side.partition(":")[2] for side in sides)])}


def demo_configs() -> list[dict[str, Any]]:
    """The models of models/demo.yaml, for more tokens and users than there.

    Raises:
        BenchError: the quantized checkpoints have not been made.
    """
    configs = yaml.safe_load(DEMO.read_text())["models"]
    for config in configs:
        path = (DEMO.parent / config["engine_config"]["hf_model_id"]).resolve()
        if not path.is_dir():
            raise BenchError(f"{path} does not exist\n  fix: make prepare")
        config["engine_config"]["hf_model_id"] = str(path)
    return [sized(config) for config in configs]


def small_checkpoint() -> Path:
    """The 0.1B model's, made first if need be: random weights, the demo's tokenizer."""
    path = make(SMALL, "bf16")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (path / name).exists():
            shutil.copyfile(TOKENIZER / name, path / name)
    return path


def small_config() -> dict[str, Any]:
    """The 0.1B model's."""
    engine = {
        "model_id": SMALL.name,
        "hf_model_id": str(small_checkpoint()),
        "engine_kwargs": {"quantization": "fp16", "enforce_eager": True},
    }
    return sized({"engine_config": engine, "scaling_config": {"num_gpus_per_worker": 0}})


def sized(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config with lengths and limits of this benchmark."""
    engine = config["engine_config"]
    kwargs = {**engine["engine_kwargs"], "max_num_seqs": USERS}
    if this_gpu() is not None:
        config = {**config, "scaling_config": {"num_gpus_per_worker": GPU_SHARE}}
        kwargs = {**kwargs, "enforce_eager": False, "kv_cache_memory_bytes": KV_CACHE}
    deployment = {**config.get("deployment_config", {}), "max_ongoing_requests": ADMITTED}
    return {
        **config,
        "engine_config": {**engine, "max_total_tokens": MAX_LENGTH, "engine_kwargs": kwargs},
        "deployment_config": deployment,
    }


def planned(configs: Sequence[Mapping[str, Any]]) -> list[Model]:
    """Models that one server serves, with their plans by `quantserve plan --json`.

    Raises:
        BenchError: it refuses; its words.
    """
    path = write_config(configs, "planned")
    command = [sys.executable, "-m", "quantserve", "plan", str(path), "--json"]
    asked = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if asked.returncode:
        raise BenchError(f"quantserve plan refuses the models:\n{asked.stderr or asked.stdout}")
    plans = json.loads(asked.stdout)["plans"]
    return [
        Model(config["engine_config"]["model_id"], config, plan) for config, plan in zip(configs, plans, strict=True)
    ]


def write_config(configs: Sequence[Mapping[str, Any]], name: str) -> Path:
    """A quantserve config file of these models, in the folder of this benchmark."""
    path = SERVING / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"models": list(configs)}, indent=2) + "\n")
    return path
