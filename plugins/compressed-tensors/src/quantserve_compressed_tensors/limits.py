"""Who serves a checkpoint, what nobody serves, and what vLLM 0.32 serves wrong or overlooks without a message."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from quantserve.api import (
    DISABLED_KERNELS,
    Checkpoint,
    Finding,
    KernelChoice,
    Linear,
    Target,
    check_fused_blocks,
    check_mixed_layers,
    check_shards,
    disabled_kernels,
    engine_environment,
    kernel_findings,
    missing_kernels,
    once,
    quantized_linears,
)
from quantserve_compressed_tensors.config import NAME, Config, Group, config_of
from quantserve_compressed_tensors.schemes import Kind, Layout, kind_of, layout_of
from quantserve_compressed_tensors.speed import KERNELS

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

SHOWN = 8
SUFFIXES = (".weight_packed", ".weight_scale")
_W4A4 = "FlashInferMxFp4LinearKernel"
"""vLLM's kernel for MXFP4 that rounds activations to 4 bits."""
_WHERE, _CACHE = "quantization_config.", (".k_scale", ".v_scale")
# Families whose norms multiply by 1 + weight, on which AWQ of llm-compressor before 0.11 computed wrong weights.
_OFFSET_NORMS = ("gemma", "gemma2", "gemma3", "gemma3_text", "qwen3_next")


@once
def usable_config(checkpoint: Checkpoint) -> Config | None:
    """The config, where the files are quantized and vLLM stops at none of its groups, nor can a pattern take long."""
    config = config_of(checkpoint)
    stored = any(name.endswith(SUFFIXES) for name in checkpoint.tensors)
    good = config and stored and config.groups and not config.problems and None not in map(kind_of, config.groups)
    return config if good and config and not config.slow else None


def group_of(checkpoint: Checkpoint, linear: Linear) -> Group | None:
    """The group of a linear; None where no target matches."""
    config = usable_config(checkpoint)
    fused = linear.group if linear.fused not in ("", "experts") else ""
    return config.of(linear.name, fused) if config else None


def scheme_of(checkpoint: Checkpoint, linear: Linear) -> Layout | None:
    """How a linear is stored; None where no target matches it, so that it is plain."""
    group = group_of(checkpoint, linear)
    return layout_of(group) if group else None


@once
def members(checkpoint: Checkpoint) -> dict[Group, list[Linear]]:
    """The quantized linears of every group that has some."""
    found = dict[Group, list[Linear]]()
    for linear in quantized_linears(checkpoint, lambda linear: scheme_of(checkpoint, linear))[0]:
        if group := group_of(checkpoint, linear):
            found.setdefault(group, []).append(linear)
    return found


def kinds(checkpoint: Checkpoint) -> Iterator[tuple[Kind, Group, list[Linear], bool]]:
    """Every kind of layers with its group and linears, and whether there are experts among them."""
    for group, every in members(checkpoint).items():
        if kind := kind_of(group):
            yield kind, group, every, any(linear.fused == "experts" for linear in every)


# --- who serves -------------------------------------------------------------------------------------------


@once
def vllm_problem(checkpoint: Checkpoint, target: Target) -> str:
    """Why vLLM's own method cannot serve the files on a target, so that this plugin's engine side does; "" else."""
    for kind, group, every, experts in kinds(checkpoint):
        bits = group.weights.bits
        words = checkpoint.tensors.get(f"{every[0].name}.weight_packed")
        if group.weights.act_order:
            return "it has removed act-order by groups (weight_g_idx)"
        if words and words.dtype == "I32" and words.shape[-1] > -(-every[0].k * bits // 32):
            return f"it reads {bits}-bit codes as a stream of bits, and the words of these files leave some unused"
        if target.device != "cpu":
            continue
        if kind.door == "mp" and bits not in ((4,) if missing_kernels() else (2, 4, 8)):
            return f"it has no kernel for {bits} bits on CPUs"
        if experts and not target.has_amx and (kind.door == "int8" or (kind.door == "mp" and missing_kernels())):
            return f"its kernels for {kind.name} experts on CPUs need AMX"
        if kind.door == "w4a8":
            return f"it computes {kind.name} on GPUs only"
        if kind.door in ("fp8", "fp4"):
            return f"it has no kernel for {kind.name} on CPUs, or none without AMX that keeps activations in 16 bits"
    return ""


def kernel_choice(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> KernelChoice:
    """Within vLLM's own method, quantserve's kernel or vLLM's for integer weights with 16-bit activations."""
    found = [(group, every, experts) for kind, group, every, experts in kinds(checkpoint) if kind.door == "mp"]
    if target.device != "cpu" or not found or vllm_problem(checkpoint, target):
        return KernelChoice(own=False)
    single = [linear for _, every, _ in found for linear in every if linear.fused != "experts"]
    why = "vLLM's kernel for CPUs takes K and N per rank in blocks of 32"
    shapes = check_shards(single, model.tensor_parallel_size, code=NAME, why=why, k_multiple=32, fused_n_multiple=32)
    problems = [shape.message for shape in shapes]
    if other := sorted({group.weights.bits for group, _, _ in found} - {4}):
        problems = [f"vLLM's kernel for CPUs takes 4 bits, and linears have {', '.join(map(str, other))}"]
    experts = any(some for _, _, some in found) and not target.has_amx
    most = max(found, key=lambda one: sum(linear.weights for linear in one[1]))[0]
    cannot = "vLLM's kernels for experts on CPUs need AMX" if experts else ""
    return KERNELS.choose(model, target, problems[0] if problems else "", cannot, most.weights.bits)


def mxfp4_environment(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> dict[str, str]:
    """The variable that keeps vLLM from rounding activations which the files keep in 16 bits."""
    weight_only = any(kind.name == "MXFP4" and group.inputs is None for kind, group, _, _ in kinds(checkpoint))
    chosen = DISABLED_KERNELS in engine_environment(model, target)
    return {DISABLED_KERNELS: _W4A4} if weight_only and (target.capability or 0) >= 100 and not chosen else {}


def limit_findings(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterator[Finding]:
    """What neither vLLM's method nor this plugin's engine side can compute on the target."""
    yield from kernel_choice(checkpoint, model, target).findings
    if problem := vllm_problem(checkpoint, target):
        message = f"vLLM's own method cannot serve these files: {problem}. quantserve's engine side does, weights only"
        where = ["engine_kwargs.quantization"]
        yield Finding.info("compressed-tensors-engine", f"{message}: activations keep 16 bits", where)
        yield from kernel_findings(NAME, NAME, target, checkpoint, scheme_of)
        yield from _order_findings(checkpoint, model.tensor_parallel_size)
        return
    for kind, group, every, _ in kinds(checkpoint):
        if reason := _no_kernel(kind, group, target):
            message = f"{len(every)} linears are {kind.name}, and {reason}. First: {every[0].name}"
            yield _error(
                "compressed-tensors-device",
                message,
                _names(every),
                "use another export of the model, or another target",
            )
        if block := group.weights.block:
            yield from check_fused_blocks(every, model.tensor_parallel_size, block[0], code="compressed-tensors-blocks")


def _no_kernel(kind: Kind, group: Group, target: Target) -> str:
    if target.device == "rocm" and kind.door == "w4a8":
        return "vLLM has no kernel for it on ROCm"
    capability = target.capability or 90
    if kind.door == "w4a8" and group.inputs and group.inputs.type == "float" and capability != 90:
        return "vLLM has a kernel for it for compute capability 9.0 only"
    return "vLLM's kernels for it need compute capability 8.0" if kind.name == "MXFP4" and capability < 80 else ""


def _order_findings(checkpoint: Checkpoint, ranks: int) -> Iterator[Finding]:
    ordered = [linear for _, group, every, _ in kinds(checkpoint) if group.weights.act_order for linear in every]
    if cut := [one for one in ordered if one.fused == "experts" or (one.parallel == "row" and ranks > 1)]:
        message = f"act-order scatters groups over all inputs of {len(cut)} linears, which are experts or which "
        message += f"tensor_parallel_size {ranks} divides. First: {cut[0].name}"
        fix = "use an export with actorder static, or none; for other linears than experts, 1 rank will do"
        yield _error("compressed-tensors-act-order", message, _names(cut), fix)


# --- the config -------------------------------------------------------------------------------------------


def config_findings(config: Config, checkpoint: Checkpoint, target: Target) -> Iterator[Finding]:
    """What vLLM stops at, or passes over, in the config."""
    problems = config.problems
    if not config.groups and not problems:
        problems = ("there are no config_groups, so vLLM builds every linear unquantized, and the files are quantized",)
    if problems:
        fix = "restore the config.json of these files, or quantize the model again with a current llm-compressor"
        yield _error(
            "compressed-tensors-bad-keys", f"vLLM cannot read the quantization_config: {problems[0]}", problems, fix
        )
    for group in config.groups:
        if kind_of(group) is None:
            message = f"config_groups.{group.name}: vLLM 0.32 has no layers for weights ({group.weights}) with "
            message += f"activations ({group.inputs or 'in 16 bits'}) in format {group.format}"
            fix = "use a W4A16, W8A8, FP8 or NVFP4 export of the model"
            yield _error("compressed-tensors-scheme", message, [f"{_WHERE}config_groups.{group.name}"], fix)
    every = Counter(target for group in config.groups for target in group.targets)
    if several := [target for target, count in every.items() if count > 1]:
        last = config.targets[several[0]].name
        message = f"several groups have the target {several[0]!r}; vLLM takes the last one ({last}) for all its modules"
        yield _error(
            "compressed-tensors-targets", message, several, "give the groups targets of their own, as patterns"
        )
    if config.slow:
        message = f"the files are not compared with the config: target {config.slow[0][:80]!r} may take long"
        fix = "write the targets as names of modules, or as simpler patterns"
        yield Finding.warning("compressed-tensors-targets", message, config.slow[:SHOWN], fix)
    if usable_config(checkpoint):
        yield from check_mixed_layers(
            checkpoint, partial(_group_name, checkpoint), code="compressed-tensors-mixed-layer"
        )
    sparsity, transforms = (config.values.get(key) or {} for key in ("sparsity_config", "transform_config"))
    if sparsity.get("targets") or config.values.get("format") in ("marlin-24", "sparse-24-bitmask"):
        message, fix = "the weights are stored sparse (2:4); vLLM 0.32 no longer reads that", "use a dense export"
        yield _error("compressed-tensors-sparse", message, [f"{_WHERE}sparsity_config"], fix)
    if transforms.get("config_groups") and (target.device == "cpu" or vllm_problem(checkpoint, target)):
        message = "the activations are rotated while serving (transform_config), which is not served on CPUs"
        fix = "serve the model on a GPU, or use an export without transforms"
        yield _error("compressed-tensors-transform", message, [f"{_WHERE}transform_config"], fix)


def _group_name(checkpoint: Checkpoint, linear: Linear) -> str:
    group = group_of(checkpoint, linear)
    return group.name if group else "none"


# --- what is served wrong ---------------------------------------------------------------------------------


def silent_findings(config: Config, checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterator[Finding]:
    """What vLLM serves wrong, or otherwise than the files say, without a message."""
    heads = [name for name in checkpoint.tensors if name.endswith(tuple(f"lm_head{suffix}" for suffix in SUFFIXES))]
    tied = checkpoint.text_config.get("tie_word_embeddings") is True
    if heads and not tied and not config.slow and config.of(heads[0].rpartition(".")[0]) is None:
        message = "lm_head is quantized, and no target names it: vLLM's class of it is no Linear, and it is built plain"
        yield _error("compressed-tensors-lm-head", message, heads, 'add "re:.*lm_head" to the targets of its group')
    rounded = [one for one in kinds(checkpoint) if one[0].name == "MXFP4" and one[1].inputs is None]
    if rounded and (target.capability or 0) >= 100:
        left_out = disabled_kernels(engine_environment(model, target) | mxfp4_environment(checkpoint, model, target))
        experts = any(some for _, _, _, some in rounded)
        message = "the files are MXFP4 with 16-bit activations, and vLLM 0.32 rounds activations to 4 bits on this GPU "
        fix = f"add {_W4A4} to {DISABLED_KERNELS}, or leave the variable out"
        if experts or _W4A4 not in left_out:
            fix = "serve it on a GPU before Blackwell, whose kernel keeps 16 bits" if experts else fix
            names = [group.name for _, group, _, _ in rounded]
            yield _error("compressed-tensors-mxfp4-activations", f"{message}(vllm issue 56770)", names, fix)
    model_type = str(checkpoint.text_config.get("model_type"))
    version = re.match(r"(\d{1,4})\.(\d{1,4})", str(config.values.get("version") or "0.0"))
    four = [group for group in members(checkpoint) if group.weights.is_("int", 4, "group")]
    zeros = [group.name for group in four if not group.weights.symmetric]
    if zeros and model_type in _OFFSET_NORMS and (not version or tuple(map(int, version.groups())) < (0, 15)):
        message = f"the norms of {model_type} multiply by 1 + weight. 4-bit weights with zero points are what AWQ "
        message += "writes, and AWQ of llm-compressor before 0.11 computed wrong weights for such norms "
        fix = "compare a few answers with the unquantized model; use a GPTQ export, or a newer llm-compressor"
        message += "(llm-compressor issue 2102)"
        yield Finding.warning("compressed-tensors-offset-norms", message, zeros, fix)
    yield from _cache_findings(config, checkpoint, str(model.engine_kwargs.get("kv_cache_dtype", "auto")))


def _cache_findings(config: Config, checkpoint: Checkpoint, asked: str) -> Iterator[Finding]:
    scheme, scales = config.values.get("kv_cache_scheme"), [one for one in checkpoint.tensors if one.endswith(_CACHE)]
    where = [f"{_WHERE}kv_cache_scheme"]
    if not isinstance(scheme, dict):
        if scales and not asked.startswith("fp8"):
            message = f"the files hold {len(scales)} scales of an FP8 KV cache, which are not used: no kv_cache_scheme"
            fix = "set engine_kwargs.kv_cache_dtype to fp8 for a cache of half the size"
            yield Finding.info("compressed-tensors-kv-cache", message, scales[:SHOWN], fix)
        return
    kind, bits, strategy = (scheme.get(key) for key in ("type", "num_bits", "strategy"))
    if (kind, bits) != ("float", 8) or strategy not in ("tensor", "attn_head") or not scheme.get("symmetric"):
        message = f"kv_cache_scheme is {bits} bits, {kind}, by {strategy}; vLLM takes symmetric FP8 by tensor or "
        fix = "set kv_cache_scheme to null, or export the model again"
        yield Finding.error("compressed-tensors-kv-cache", f"{message}attn_head", where, fix)
    elif not asked.startswith(("auto", "fp8")):
        message = f"the files are calibrated for an FP8 KV cache, and kv_cache_dtype is {asked}"
        yield Finding.warning(
            "compressed-tensors-kv-cache", message, ["engine_kwargs.kv_cache_dtype"], "leave kv_cache_dtype out"
        )
    elif not scales and not scheme.get("dynamic") and checkpoint.tensors_complete:
        message = "kv_cache_scheme asks for an FP8 KV cache, and the files have no k_scale and v_scale: vLLM takes 1.0"
        yield Finding.warning(
            "compressed-tensors-kv-cache", message, where, "compare a few answers with kv_cache_dtype bfloat16"
        )


def _names(every: Sequence[Linear]) -> list[str]:
    return [linear.name for linear in every[:SHOWN]]


def _error(code: str, message: str, where: Sequence[str], fix: str) -> Finding:
    return Finding.error(code, message, list(where[:SHOWN]), fix)
