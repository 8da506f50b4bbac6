"""Checks of the environment variables that the engine will have, and of those it will not have."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from quantserve.finding import Finding
from quantserve.system.environment import (
    API_KEY,
    CPU_ONLY,
    JUDGED,
    KV_CACHE_SPACE,
    MODELSCOPE,
    PORT,
    RESERVE,
    configured_environment,
    engine_environment,
    is_on,
    whole_number,
)
from quantserve.system.homes import is_bucket

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint
    from quantserve.config import ModelConfig
    from quantserve.target import Target

_NUMBERS = {
    KV_CACHE_SPACE: "a whole number of GiB",
    RESERVE: "a whole number of CPUs",
    PORT: "the number of a port",
}
_SET_BY_PLAN = {
    "VLLM_PLUGINS": "the plan sets it to the plugins of the model",
    API_KEY: "the gateway checks API keys: use QUANTSERVE_API_KEYS or http.api_keys_file",
    "VLLM_WORKER_MULTIPROC_METHOD": "engines are always started with spawn",
}
_ARGUMENTS = {"VLLM_ATTENTION_BACKEND": "engine_kwargs.attention_backend"}
_WHERE = "engine_config.runtime_env.env_vars"


def check_environment(
    checkpoint: Checkpoint, model: ModelConfig, target: Target, environ: Mapping[str, str] = os.environ
) -> Iterator[Finding]:
    """Find values vLLM refuses, names it does not know, and variables of the shell that will not reach the engine."""
    given = configured_environment(model)
    shell = {name: value for name, value in environ.items() if name.startswith("VLLM_")}
    engine = engine_environment(model, target, environ)
    yield from _check_values(engine, given, target)
    yield from _check_names(engine, given)
    yield from _check_modelscope(checkpoint, engine, target)
    unused = {name: why for name, why in _SET_BY_PLAN.items() if engine.get(name, "spawn") not in ("", "spawn")}
    if not target.is_here:
        why = f"target {target.name} is not this machine; if it is set there, write it under {_WHERE}"
        unused |= {name: why for name in JUDGED if name in shell}
    elif target.device != "cpu":
        unused |= {name: "vLLM reads it on CPUs only" for name in CPU_ONLY if name in engine}
    for name in set(shell) & set(given):
        if shell[name] != engine[name]:
            unused[name] = f"the plan sets {engine[name]!r:.80}"
    for name, why in sorted(unused.items()):
        whose = "" if name in given and name not in shell else " of the shell"
        yield Finding.info("environment-unused", f"{name}{whose} is not used: {why}", [name])


def _check_values(engine: Mapping[str, str], given: Mapping[str, str], target: Target) -> Iterator[Finding]:
    """The numbers among the variables; an empty `KV_CACHE_SPACE` counts as unset."""
    for name, what in _NUMBERS.items():
        text = engine.get(name, "0")
        number = whole_number(text)
        if (number is not None and number >= 0) or (name == KV_CACHE_SPACE and not text):
            continue
        if name == KV_CACHE_SPACE and target.device != "cpu":
            continue
        # What the shell says of the KV cache is replaced by the plan; everything else reaches the engine.
        severity = Finding.warning if name == KV_CACHE_SPACE and name not in given else Finding.error
        unused = "; the plan sets another value" if severity is Finding.warning else ""
        where = f"{_WHERE}.{name}" if name in given else f"{name} of the shell"
        yield severity(
            "environment-invalid",
            f"{where} must be {what}, got {text!r:.80}{unused}",
            [name],
            "correct it, or unset it; Kubernetes sets VLLM_PORT for a service called vllm (enableServiceLinks: false)"
            if name == PORT
            else 'write a whole number, such as "1"',
        )


def _check_names(engine: Mapping[str, str], given: Mapping[str, str]) -> Iterator[Finding]:
    known = _known()
    unknown = [name for name in sorted(engine) if name.startswith("VLLM_") and known and name not in known]
    for where, names, severity in (
        ("the plan", [name for name in unknown if name in given], Finding.warning),
        ("the shell", [name for name in unknown if name not in given], Finding.info),
    ):
        if names:
            instead = [f"{name} is now {_ARGUMENTS[name]}" for name in names if name in _ARGUMENTS]
            yield severity(
                "environment-unknown",
                f"the installed vLLM has no such variables, set in {where}: {', '.join(names[:8])}",
                names,
                "; ".join(instead) or "correct the names, or unset them",
            )


def _check_modelscope(checkpoint: Checkpoint, engine: Mapping[str, str], target: Target) -> Iterator[Finding]:
    if not is_on(engine, MODELSCOPE):
        return
    if target.is_here and find_spec("modelscope") is None:
        yield Finding.error(
            "modelscope",
            f"{MODELSCOPE} is on and the package modelscope is not installed: vLLM cannot be imported",
            [MODELSCOPE],
            f"pip install 'modelscope>=1.18.1', or unset {MODELSCOPE}",
        )
    elif checkpoint.location != "local" and not is_bucket(checkpoint.source):
        yield Finding.warning(
            "modelscope",
            f"{MODELSCOPE} is on: vLLM fetches the model from ModelScope, and the files of Hugging Face were checked",
            [MODELSCOPE],
            "name the folder of a downloaded model",
        )


@cache
def _known() -> frozenset[str]:
    """The variables of the vLLM on this machine, read from its source without importing it; empty without vLLM."""
    names: set[str] = set()
    spec = find_spec("vllm")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        try:
            text = (Path(folder) / "envs.py").read_text(encoding="utf-8")
        except OSError:
            continue
        names.update(re.findall(r'"(VLLM_\w+)"', text))
    return frozenset(names)
