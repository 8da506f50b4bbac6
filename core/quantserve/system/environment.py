"""The environment variables that the engine of a model will have."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from quantserve.config import ModelConfig
    from quantserve.target import Target

KV_CACHE_SPACE: Final = "VLLM_CPU_KVCACHE_SPACE"
DISABLED_KERNELS: Final = "VLLM_DISABLED_KERNELS"
"""The variable with the names of linear kernels that vLLM leaves out."""
LONG_CONTEXT: Final = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
MODELSCOPE: Final = "VLLM_USE_MODELSCOPE"
THREADS_BIND: Final = "VLLM_CPU_OMP_THREADS_BIND"
RESERVE: Final = "VLLM_CPU_NUM_OF_RESERVED_CPU"
PORT: Final = "VLLM_PORT"
API_KEY: Final = "VLLM_API_KEY"
API_KEYS: Final = "QUANTSERVE_API_KEYS"

CPU_ONLY: Final = (KV_CACHE_SPACE, THREADS_BIND, RESERVE)
"""Variables that vLLM reads on CPUs only."""
JUDGED: Final = (LONG_CONTEXT, MODELSCOPE, *CPU_ONLY)
"""Variables that checks and the plan depend on."""
GATEWAY_LIMITS: Final = ("VLLM_MAX_COMPLETION_PROMPTS", "VLLM_MAX_STOP_STRINGS", "VLLM_MAX_NUM_BAD_WORDS")
"""Limits of vLLM's server that the gateway has, too, as ``max_prompts`` and ``max_stops``."""
UNLIMITED: Final = 1 << 20
_REFERENCE: Final = re.compile(r"\$(\w+|\{\w+\})", re.ASCII)


def engine_environment(model: ModelConfig, target: Target, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """vLLM's variables as a replica of the model has them.

    Ray's workers inherit the shell's variables, and ``engine_config.runtime_env.env_vars`` overrides them. A target
    that is not this machine has another shell, so only the config counts there.

    Args:
        model: the config.
        target: the hardware planned for.
        environ: the variables of this process.
    """
    shell = {name: value for name, value in environ.items() if name.startswith("VLLM_")} if target.is_here else {}
    known = environ if target.is_here else {}
    given = configured_environment(model)
    return {**shell, **{name: _expanded(value, known) for name, value in given.items()}}


def configured_environment(model: ModelConfig) -> dict[str, str]:
    """``engine_config.runtime_env.env_vars``, which the schema has checked."""
    variables = (model.engine_config.runtime_env or {}).get("env_vars")
    return dict(variables) if isinstance(variables, dict) else {}


def with_environment(model: ModelConfig, variables: Mapping[str, str]) -> ModelConfig:
    """The model as if its config set these environment variables and no others."""
    runtime_env = {**(model.engine_config.runtime_env or {}), "env_vars": dict(variables)}
    engine = model.engine_config.model_copy(update={"runtime_env": runtime_env})
    return model.model_copy(update={"engine_config": engine})


def carried(environment: Mapping[str, str], target: Target) -> dict[str, str]:
    """The judged variables that an engine on `target` reads."""
    names = [name for name in JUDGED if target.device == "cpu" or name not in CPU_ONLY]
    return {name: environment[name] for name in names if name in environment}


def disabled_kernels(environment: Mapping[str, str]) -> frozenset[str]:
    """The kernels that ``VLLM_DISABLED_KERNELS`` leaves out, as vLLM reads it: spaces belong to names."""
    return frozenset(environment.get(DISABLED_KERNELS, "").split(",")) - {""}


def includes(environment: Mapping[str, str], variables: Mapping[str, str]) -> bool:
    """Whether an environment has these variables; ``VLLM_DISABLED_KERNELS`` may name further kernels."""
    others = {name: value for name, value in variables.items() if name != DISABLED_KERNELS}
    listed = DISABLED_KERNELS not in variables or disabled_kernels(variables) <= disabled_kernels(environment)
    return listed and others.items() <= environment.items()


def is_on(environment: Mapping[str, str], name: str) -> bool:
    """Whether vLLM takes a variable for true."""
    return environment.get(name, "").strip().lower() in ("1", "true")


def whole_number(text: str) -> int | None:
    """What vLLM makes of a number; None where it raises."""
    try:
        return int(text)
    except ValueError:
        return None


def _expanded(value: str, environ: Mapping[str, str]) -> str:
    """A value as Ray sets it: references to variables are replaced, ``${UNKNOWN}`` by nothing."""

    def one(match: re.Match[str]) -> str:
        return environ.get(match[1].strip("{}"), "" if match[1].startswith("{") else match[0])

    return _REFERENCE.sub(one, value)
