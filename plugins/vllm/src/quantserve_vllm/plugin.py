"""The light module for what vLLM serves by itself: what `quantserve list`, `check` and `plan` ask.

The layout of these files is vLLM's own business, so there is no scheme for them: `check` judges the settings, the
device and what vLLM would pass over in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

from quantserve.api import Checkpoint, Finding, K, Linear, Method, N, Part, Scheme, Target, hookimpl, linears
from quantserve.api import served_dtype as dtype_of
from quantserve_vllm.methods import ARGUMENTS, METHODS, Served, argument_of, declared
from quantserve_vllm.settings import CHECKS, auto_round_on_cpus, quark_on_cpus

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

WHERE = "quantization_config"
PLAIN = Scheme({"weight": Part((N(), K()), ("F16", "BF16", "F32"))}, bits=16, scales="none")
ONLINE = Scheme(PLAIN.parts, bits=16, scales="none", kept=8)


@hookimpl
def quantserve_method() -> Method:
    """Describe all of them as one method; ``vllm_name`` is None because the files or the user name vLLM's."""
    over = {name for served in METHODS.values() for name in served.over}
    return Method(
        name="vllm",
        summary="what vLLM serves by itself: Quark, torchao, AutoRound, FBGEMM FP8, online FP8 and INT8",
        bits=(2, 3, 4, 5, 6, 7, 8),
        vllm_name=None,
        aliases=tuple(ARGUMENTS),
        devices=("cuda", "rocm", "cpu"),
        dtypes=("float16", "bfloat16", "float32"),
        homepage="https://docs.vllm.ai/en/latest/features/quantization",
        accepts={name: {} for name in sorted(over)},
    )


@hookimpl
def quantserve_detect(checkpoint: Checkpoint) -> bool:
    """Claim files that declare one of these methods, and no others."""
    return any(declared(checkpoint) in served.declared for served in METHODS.values())


@hookimpl
def quantserve_scheme(checkpoint: Checkpoint, linear: Linear) -> Scheme | None:
    """16-bit files that vLLM quantizes while it loads them; else None, because the layout is vLLM's.

    The hook does not see which online method the user names: 8 bits is what vLLM keeps of a weight in most.
    """
    if declared(checkpoint) not in ("", "experts_int8"):
        return None
    return PLAIN if linear.name.endswith("lm_head") else ONLINE


@hookimpl
def quantserve_validate(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterator[Finding]:
    """The settings, and where vLLM serves them."""
    argument = argument_of(checkpoint, model)
    if not argument:
        yield Finding.error(
            "vllm-not-declared",
            f"engine_kwargs.quantization is {model.quantization!r}, and config.json declares none of vLLM's methods",
            [f"{WHERE}.quant_method"],
            "name vLLM's method (" + ", ".join(name for name, one in METHODS.items() if one.online) + ")",
        )
        return
    served = METHODS[argument]
    yield from _device(served, checkpoint, model, target)
    other = _other_files(argument, served, checkpoint, model)
    if other:
        yield other
        return
    config = checkpoint.quantization_config or {}
    wrong = list(CHECKS[argument](config)) if argument in CHECKS else []
    for key, what, fix in wrong:
        yield Finding.error("vllm-settings", f"{served.title}: {WHERE}.{key} {what}", [f"{WHERE}.{key}"], fix)
    if argument in ("inc", "quark") and target.device == "cpu" and not wrong:
        yield from _on_cpus(argument, checkpoint, target)
    if argument == "torchao" and target.is_here and find_spec("vllm") and not find_spec("torchao"):
        fix = "pip install 'torchao>=0.10'"
        yield Finding.error(
            "vllm-torchao-missing", "vLLM needs the package torchao, which is not here", ["torchao"], fix
        )
    if served.experts and not any(linear.experts for linear in linears(checkpoint)):
        yield Finding.warning(
            "vllm-no-experts",
            f"{served.title}: vLLM quantizes experts only, and this model has none; it is served unquantized",
            ["engine_kwargs.quantization"],
            "name fp8_per_channel, which quantizes every linear",
        )
    if served.deprecated:
        yield Finding.warning(
            "vllm-deprecated",
            f"vLLM 0.32 serves {served.title} with allow_deprecated_quantization only, and will remove it",
            [f"{WHERE}.quant_method"],
            "export the model as compressed-tensors",
        )


@hookimpl
def quantserve_engine_kwargs(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Mapping[str, object]:
    """The method that the user names, as vLLM spells it; what files declare vLLM finds by itself."""
    argument = argument_of(checkpoint, model)
    named = {"quantization": argument} if (model.quantization or "").lower() in ARGUMENTS else {}
    deprecated = argument in METHODS and METHODS[argument].deprecated
    return {**named, **({"allow_deprecated_quantization": True} if deprecated else {})}


def _device(served: Served, checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterator[Finding]:
    other = "choose another target, or serve a checkpoint of another method"
    if target.device not in served.devices:
        runs = ", ".join(served.devices)
        message = f"vLLM 0.32 serves {served.title} on {runs}; the target {target.name} is {target.device}"
        yield Finding.error("vllm-device", message, [target.name], other)
    elif served.amx and target.device == "cpu" and not target.has_amx:
        message = f"vLLM's only CPU kernel for {served.title} needs AMX, which {target.name} does not have"
        yield Finding.error("vllm-device", message, [target.name], other)
    elif target.capability is not None and target.capability < served.capability:
        need, have = (f"{value // 10}.{value % 10}" for value in (served.capability, target.capability))
        message = f"{served.title} needs compute capability {need}; {target.name} has {have}"
        yield Finding.error("vllm-device", message, [target.name], other)
    dtype = dtype_of(checkpoint, model, target).name
    if dtype not in served.dtypes:
        message = f"{served.title} runs in {' or '.join(served.dtypes)}; vLLM would run it in {dtype}"
        fix = f"set engine_kwargs.dtype to {served.dtypes[-1] if len(served.dtypes) < 3 else served.dtypes[0]}"
        yield Finding.error("vllm-dtype", message, ["engine_kwargs.dtype"], fix)


def _other_files(argument: str, served: Served, checkpoint: Checkpoint, model: ModelConfig) -> Finding | None:
    """What keeps the method from starting with these files at all."""
    method = declared(checkpoint)
    if method and method not in served.declared and method not in served.over:
        return Finding.error(
            "vllm-already-quantized",
            f"engine_kwargs.quantization is {model.quantization!r}, and config.json declares {method!r}: vLLM refuses "
            "an argument that is not the declared method",
            [f"{WHERE}.quant_method", "engine_kwargs.quantization"],
            "leave engine_kwargs.quantization out, or name a 16-bit checkpoint",
        )
    if not method and not served.online:
        return Finding.error(
            "vllm-not-declared",
            f"engine_kwargs.quantization is {model.quantization!r}, and config.json declares no method: vLLM does not "
            f"make {served.title} of 16-bit weights",
            [f"{WHERE}.quant_method"],
            "name a checkpoint in this format, or an online method such as fp8_per_channel",
        )
    if argument == "online" and not isinstance(model.engine_kwargs.get(WHERE), Mapping):
        return Finding.error(
            "vllm-online-settings",
            f"quantization online takes its settings from engine_kwargs.{WHERE}, which is not there",
            [f"engine_kwargs.{WHERE}"],
            "write it ({linear: fp8_per_channel}), or name fp8_per_channel instead of online",
        )
    return None


def _on_cpus(argument: str, checkpoint: Checkpoint, target: Target) -> Iterator[Finding]:
    """Settings for which vLLM 0.32 has no kernel on this CPU; each was tried with its own layers."""
    config = checkpoint.quantization_config or {}
    reason = {"inc": auto_round_on_cpus, "quark": quark_on_cpus}[argument](config, target.has_amx)
    if not reason and argument == "inc" and any(linear.experts for linear in linears(checkpoint)):
        reason = "experts, which vLLM builds unquantized there, so that the quantized ones do not fit"
    if reason:
        yield Finding.error(
            "vllm-cpu",
            f"vLLM on CPUs does not serve this {METHODS[argument].title} checkpoint: it has {reason}",
            [WHERE],
            "choose a GPU, or export another format (quantserve-gptq and quantserve-compressed-tensors serve CPUs)",
        )
