"""What vLLM's own GPTQ does not serve, and what nothing serves. The rules are those of vLLM 0.32's ``auto_gptq.py``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from quantserve.api import (
    Checkpoint,
    Finding,
    KernelChoice,
    Linear,
    Scheme,
    Target,
    first_bytes,
    kernel_findings,
    linears,
    once,
    quantized_linears,
    shard_k,
    shard_n,
)
from quantserve_gptq.config import Settings, Written, config_findings
from quantserve_gptq.speed import KERNELS

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

MARLIN_GROUPS = (-1, 32, 64, 128)
CPU_MULTIPLE = 32
OFFENDERS = 8
MOST_READ = 64
"""Linears of which zeros are read."""


@once
def stored(checkpoint: Checkpoint) -> list[Linear]:
    """The linears that the files hold in GPTQ's tensors."""
    return quantized_linears(checkpoint, lambda linear: scheme_of(checkpoint, linear))[0]


def scheme_of(checkpoint: Checkpoint, linear: Linear) -> Scheme | None:
    """The scheme of a linear by the rules of the config; None where it is unquantized or the settings are wrong."""
    written = usable_config(checkpoint)
    settings = written.of(linear.name) if written else None
    return settings.scheme if settings else None


@once
def usable_config(checkpoint: Checkpoint) -> Written | None:
    """The config of the files, where nothing is wrong with it."""
    written = Written.read(checkpoint)
    return written if written and not config_findings(written) else None


@once
def each(checkpoint: Checkpoint) -> Mapping[str, Settings]:
    """The settings of every quantized linear, by its name."""
    written = usable_config(checkpoint)
    found = {linear.name: written.of(linear.name) for linear in stored(checkpoint)} if written else {}
    return {name: settings for name, settings in found.items() if settings}


def setting(checkpoint: Checkpoint, linear: Linear) -> Settings | None:
    """That of a quantized linear which can be a part of one layer; experts have a layer for gate and up."""
    return each(checkpoint).get(linear.name) if linear.parallel == "column" else None


@once
def vllm_problem(checkpoint: Checkpoint) -> str:
    """Why vLLM's own GPTQ cannot serve the files on any device, or would misread them; "" where it can."""
    written = usable_config(checkpoint)
    if written is None:
        return ""
    if any(settings.bits not in (4, 8) for settings in each(checkpoint).values()):
        return "it has 4 and 8 bits only"
    if not all(settings.sym for settings in each(checkpoint).values()):
        return "it takes every zero for the middle code, and these files have zeros of their own (sym false)"
    if any(settings.desc_act for settings in each(checkpoint).values()):
        return "it has no act-order (desc_act)"
    if written.values.get("desc_act") and written.values.get("group_size") != -1:
        return "it refuses desc_act, though the groups of these files are in order"
    if odd := [one.group_size for one in each(checkpoint).values() if one.group_size not in MARLIN_GROUPS]:
        return f"it has groups of 32, 64, 128 and whole rows, not of {odd[0]}"
    for linear in stored(checkpoint):
        if linear.group and linear.fused != "experts" and written.of(linear.group) != each(checkpoint).get(linear.name):
            return f"it matches dynamic rules with {linear.group}, which no file names, and not with {linear.name}"
    return ""


def vllm_cpu_problem(checkpoint: Checkpoint, model: ModelConfig) -> str:
    """Why vLLM's kernel for CPUs cannot compute the linears; "" where it can."""
    ranks = model.tensor_parallel_size
    if any(settings.bits != 4 for settings in each(checkpoint).values()):
        return "it has 4 bits only"
    for linear in stored(checkpoint):
        if shard_k(linear, ranks) % CPU_MULTIPLE or shard_n(linear, ranks) % CPU_MULTIPLE:
            return f"it takes K and N per rank in blocks of {CPU_MULTIPLE}, and {linear.name} has others"
    return ""


def choose(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> KernelChoice:
    """Whether quantserve's engine side serves the model (`own`), or vLLM's own GPTQ."""
    problem = vllm_problem(checkpoint)
    if not problem:
        return KERNELS.choose(model, target, vllm_cpu_problem(checkpoint, model) if target.device == "cpu" else "")
    findings = [
        Finding.info(
            "gptq-engine",
            f"vLLM's own GPTQ cannot serve these files: {problem}. quantserve's engine side does, on "
            "quantserve-kernels",
            ["engine_kwargs.quantization"],
        )
    ]
    findings += kernel_findings("gptq", "these GPTQ", target)
    return KernelChoice(True, {}, tuple(findings))


def limit_findings(checkpoint: Checkpoint, model: ModelConfig, *, own: bool) -> Iterable[Finding]:
    """What the engine that serves the model cannot do.

    Args:
        own: whether it is quantserve's.
    """
    written = usable_config(checkpoint)
    scattered = [linear for linear in stored(checkpoint) if each(checkpoint)[linear.name].desc_act]
    ranks = model.tensor_parallel_size
    rows = [linear.name for linear in scattered if linear.parallel == "row" and ranks > 1]
    experts = [linear.name for linear in scattered if linear.fused == "experts"]
    if rows and not experts:
        yield Finding.error(
            "gptq-act-order",
            f"act-order (desc_act) scatters groups over all inputs of {len(rows)} linears, which "
            f"tensor_parallel_size {ranks} divides: a rank would have parts of groups",
            rows[:OFFENDERS],
            "set scaling_config.num_workers to 1, or use an export with desc_act false",
        )
    if experts:
        yield Finding.error(
            "gptq-act-order",
            f"{len(experts)} linears are experts with act-order (desc_act), each with inputs in an order of its own",
            experts[:OFFENDERS],
            "use an export with desc_act false",
        )
    head = [name for name in checkpoint.tensors if name.endswith("lm_head.qweight")]
    if written and head and not own and written.values.get("lm_head") is not True:
        yield Finding.error(
            "gptq-lm-head",
            f"lm_head is quantized, and {written.where} does not say so: vLLM builds it unquantized",
            head,
            'add "lm_head": true to the quantization config',
        )
    if written and not head and not own and written.values.get("lm_head"):
        yield Finding.error(
            "gptq-lm-head",
            f"{written.where} says that lm_head is quantized, and it is not: vLLM finds no tensors for it",
            [f"{written.where}: lm_head"],
            'set "lm_head" to false',
        )


def tensor_findings(checkpoint: Checkpoint, written: Written) -> Iterable[Finding]:
    """What the scheme does not tell: words of another width, and zeros that tools disagree on."""
    words = [
        f"{name} {tensor.dtype}"
        for name, tensor in checkpoint.tensors.items()
        if name.endswith((".qweight", ".qzeros")) and tensor.dtype in ("I64", "I16", "I8")
    ]
    if words:
        yield Finding.error(
            "gptq-pack-dtype",
            f"{len(words)} tensors are packed in other words than int32. First: {words[0]}",
            words[:OFFENDERS],
            "export the model again with pack_dtype int32",
        )
    yield from zero_findings(checkpoint)
    meta = written.values.get("meta")
    odd = [name for name, one in each(checkpoint).items() if one.bits == 3 and not one.sym]
    if odd and written.version == "gptq" and "gptqmodel" in str(meta).lower():
        yield Finding.warning(
            "gptq-3-bit-zeros",
            f"GPTQModel stores the zeros of asymmetric 3-bit files of version 1 in a way of its own; {len(odd)} "
            "linears may be read with wrong zeros",
            odd[:OFFENDERS],
            "export the model again with checkpoint_format gptq_v2",
        )


def zero_findings(checkpoint: Checkpoint) -> Iterable[Finding]:
    """Zeros of symmetric files that are not the middle code; the first words of some linears are read."""
    usual = {f"{name}.qzeros": middles(one.bits) for name, one in each(checkpoint).items() if one.sym and one.bits != 3}
    read = first_bytes(checkpoint, list(usual)[:MOST_READ], 4)
    if odd := [f"{name}: {word.hex()}" for name, word in read.items() if word not in usual[name]]:
        yield Finding.warning(
            "gptq-stray-zeros",
            f"the config says sym, so every zero is taken for the middle code, and {len(odd)} of {len(read)} linears "
            f"that were read store others. First: {odd[0]}",
            odd[:OFFENDERS],
            'if the weights were rounded with these zeros, set "sym" to false in the quantization config; else compare '
            "a few answers with the unquantized model",
        )


def middles(bits: int) -> set[bytes]:
    """The word of middle codes, as version 2 and version 1 store it, and a word that was never filled."""
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return {(ones * zero).to_bytes(4, "little") for zero in (2 ** (bits - 1), 2 ** (bits - 1) - 1, 0)}


def is_stored(checkpoint: Checkpoint) -> bool:
    """Whether any linear of the files has GPTQ's tensors, whatever their shapes."""
    return any(name.endswith(".qweight") for name in checkpoint.tensors) and bool(linears(checkpoint))
