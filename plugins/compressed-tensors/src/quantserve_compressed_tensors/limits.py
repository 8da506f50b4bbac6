"""What vLLM refuses, or serves wrong without a message: kinds of layers, devices, and what it overlooks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from quantserve.api import (
    DISABLED_KERNELS,
    Checkpoint,
    Finding,
    KernelChoice,
    Linear,
    Target,
    check_shards,
    disabled_kernels,
    engine_environment,
    linears,
    missing_kernels,
    once,
    quantized_linears,
)
from quantserve_compressed_tensors.config import Group, Written
from quantserve_compressed_tensors.schemes import Kind, kind_of, scheme_of
from quantserve_compressed_tensors.speed import KERNELS
from quantserve_compressed_tensors.targets import Targets, groups_of

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

SHOWN = 8
_SUFFIXES = (".weight_packed", ".weight_scale")
_W4A4 = "FlashInferMxFp4LinearKernel"
"""vLLM's kernel for MXFP4 that rounds activations to 4 bits."""
_WHERE = "quantization_config"
_CACHE = (".k_scale", ".v_scale")
# Families whose norms multiply by 1 + weight, on which AWQ of llm-compressor before 0.11 computed wrong weights.
_OFFSET_NORMS = ("gemma", "gemma2", "gemma3", "gemma3_text", "qwen3_next")


@once
def is_stored(checkpoint: Checkpoint) -> bool:
    """Whether any module has this method's tensors."""
    return any(name.endswith(_SUFFIXES) for name in checkpoint.tensors)


@once
def stored(checkpoint: Checkpoint) -> tuple[list[Linear], list[Linear]]:
    """The linears in a scheme, and the plain ones."""
    groups = groups_of(checkpoint)

    def scheme(linear: Linear) -> object:
        group = groups.of(linear) if groups else None
        return scheme_of(group) if group else None

    return quantized_linears(checkpoint, scheme)  # type: ignore[arg-type]


@once
def by_group(checkpoint: Checkpoint) -> dict[Group, list[Linear]]:
    """The quantized linears of every group that has some."""
    groups, found = groups_of(checkpoint), dict[Group, list[Linear]]()
    for linear in stored(checkpoint)[0] if groups else ():
        if groups and (group := groups.of(linear)):
            found.setdefault(group, []).append(linear)
    return found


@once
def kinds(checkpoint: Checkpoint) -> Counter[Kind]:
    """The kinds of layers that the model has, by weights."""
    count: Counter[Kind] = Counter()
    for group, members in by_group(checkpoint).items():
        if (kind := kind_of(group)) is not None:
            count[kind] += sum(linear.weights for linear in members)
    return count


def kernel_choice(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> KernelChoice:
    """quantserve's kernel or vLLM's for integer weights with 16-bit activations; neither where there are none."""
    members = [
        (group, linear)
        for group, every in by_group(checkpoint).items()
        if (kind := kind_of(group)) is not None and kind.door == "mp"
        for linear in every
    ]
    if target.device != "cpu" or not members:
        return KernelChoice(own=False)
    problem, experts = "", ""
    if other := sorted({group.weights.bits for group, _ in members} - {4}):
        problem = f"vLLM's kernel for CPUs takes 4 bits, and linears have {', '.join(map(str, other))}"
    single = [linear for _, linear in members if linear.fused != "experts"]
    why = "vLLM's kernel for CPUs takes K and N per rank in blocks of 32"
    shapes = check_shards(
        single, model.tensor_parallel_size, code="compressed-tensors-cpu-kernel", why=why, k_multiple=32,
        fused_n_multiple=32,
    )  # fmt: skip
    if len(single) < len(members) and not target.has_amx:
        experts = "vLLM's kernels for experts on CPUs need AMX"
    bits = Counter(group.weights.bits for group, _ in members).most_common(1)[0][0]
    return KERNELS.choose(model, target, problem or (shapes[0].message if shapes else ""), experts, bits)


def limit_findings(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterator[Finding]:
    """What the kernels of the target cannot compute."""
    for group, members in by_group(checkpoint).items():
        kind = kind_of(group)
        reason = _refused(kind, group, members, target) if kind else ""
        if kind and reason:
            yield Finding.error(
                "compressed-tensors-device",
                f"{len(members)} linears are {kind.name}, and {reason}. First: {members[0].name}",
                [linear.name for linear in members[:SHOWN]],
                "use another export of the model, or another target",
            )
    if target.device != "cpu":
        return
    choice = kernel_choice(checkpoint, model, target)
    yield from choice.findings
    experts = any(linear.fused == "experts" for linear in stored(checkpoint)[0])
    integers = [group for group in by_group(checkpoint) if (kind := kind_of(group)) and kind.door == "mp"]
    if integers and not choice.own and (problem := _vllm_cannot(integers, experts, target)):
        yield Finding.error(
            "compressed-tensors-cpu-kernel",
            f"{problem}, and quantserve's kernel is not used: {missing_kernels() or 'it is left out'}",
            [group.name for group in integers],
            "install a C++ compiler and then 'quantserve-compressed-tensors[engine]', and leave "
            f"{DISABLED_KERNELS} out",
        )


def _vllm_cannot(integers: list[Group], experts: bool, target: Target) -> str:
    if other := sorted({group.weights.bits for group in integers} - {4}):
        return f"vLLM has no kernel for CPUs with {', '.join(map(str, other))} bits"
    return "vLLM's kernels for experts on CPUs need AMX" if experts and not target.has_amx else ""


def _refused(kind: Kind, group: Group, members: list[Linear], target: Target) -> str:
    """Why no kernel of the target computes a kind; "" where one does."""
    experts = any(linear.fused == "experts" for linear in members)
    if target.device == "cpu":
        if kind.door == "mp":
            three = group.weights.bits not in (2, 4, 8)
            return "on CPUs neither vLLM nor quantserve has a kernel for this width" if three else ""
        if kind.door == "int8":
            return (
                "on CPUs vLLM has no kernel for experts of this kind without AMX"
                if experts and not target.has_amx
                else ""
            )
        if kind.door == "w4a8":
            return "vLLM computes it on GPUs only"
        return "FP8 and FP4 weights are not served on CPUs: vLLM has no kernel for them there, or none without AMX"
    capability = target.capability
    if target.device == "rocm":
        return "vLLM has no kernel for it on ROCm" if kind.door == "w4a8" else ""
    if kind.vllm == "CompressedTensorsW4A8Fp8" and capability is not None and capability != 90:
        return "vLLM has a kernel for it for compute capability 9.0 only"
    if kind.name == "MXFP4" and capability is not None and capability < 80:
        return "vLLM's kernels for it need compute capability 8.0"
    return ""


def config_findings(written: Written, checkpoint: Checkpoint, target: Target) -> Iterator[Finding]:
    """What vLLM stops at, or passes over, in the config."""
    if written.problems:
        yield Finding.error(
            "compressed-tensors-bad-keys",
            f"vLLM cannot read {_WHERE}: {written.problems[0]}",
            list(written.problems[:SHOWN]),
            "quantize the model again with a current llm-compressor",
        )
    for group in written.groups:
        if kind_of(group) is None:
            yield Finding.error(
                "compressed-tensors-scheme",
                f"config_groups.{group.name}: vLLM 0.32 has no layers for weights {_said(group.weights)} with "
                f"activations {_said(group.inputs)} in format {group.format}",
                [f"config_groups.{group.name}"],
                "use a W4A16, W8A8, FP8 or NVFP4 export of the model",
            )
    if not written.groups and not written.problems and is_stored(checkpoint):
        yield Finding.error(
            "compressed-tensors-bad-keys",
            f"{_WHERE} has no config_groups, so vLLM builds every linear unquantized, and the files are quantized",
            [f"{_WHERE}.config_groups"],
            "restore the config.json of these files",
        )
    yield from _target_findings(written, checkpoint)
    sparsity = written.values.get("sparsity_config") or {}
    if sparsity.get("targets") or str(written.values.get("format")) in ("marlin-24", "sparse-24-bitmask"):
        yield Finding.error(
            "compressed-tensors-sparse",
            "the weights are stored sparse (2:4); vLLM 0.32 no longer reads that",
            [f"{_WHERE}.sparsity_config"],
            "use an export without sparsity",
        )
    transforms = written.values.get("transform_config") or {}
    if transforms.get("config_groups") and target.device == "cpu":
        yield Finding.error(
            "compressed-tensors-transform",
            "the activations are rotated while serving (transform_config), which is not served on CPUs",
            [f"{_WHERE}.transform_config"],
            "serve the model on a GPU, or use an export without transforms",
        )


def _target_findings(written: Written, checkpoint: Checkpoint) -> Iterator[Finding]:
    groups = groups_of(checkpoint)
    if unclear := Targets(list(written.by_target())).unclear:
        yield Finding.warning(
            "compressed-tensors-targets",
            f"the files are not compared with the config: target {unclear[0][:80]!r} may take long, or is no pattern",
            unclear[:SHOWN],
            "write the targets as names of modules, or as simpler patterns",
        )
    every = Counter(target for group in written.groups for target in group.targets)
    if several := [target for target, count in every.items() if count > 1]:
        last = written.by_target()[several[0]].name
        yield Finding.error(
            "compressed-tensors-targets",
            f"several groups have the target {several[0]!r}; vLLM takes the last one ({last}) for all its modules",
            several[:SHOWN],
            "give the groups targets of their own, as patterns",
        )
    mixed: dict[str, set[str]] = {}
    for linear in linears(checkpoint) if groups else ():
        if groups and linear.fused == "experts":
            group = groups.of(linear)
            mixed.setdefault(linear.group, set()).add(group.name if group else "none")
    if differing := [layer for layer, names in mixed.items() if len(names) > 1]:
        yield Finding.error(
            "compressed-tensors-experts",
            f"the linears of {len(differing)} layers of experts belong to different groups: "
            f"{', '.join(sorted(mixed[differing[0]]))}. vLLM needs one. First: {differing[0]}",
            differing[:SHOWN],
            "quantize gate, up and down projections of the experts alike",
        )


def silent_findings(written: Written, checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterator[Finding]:
    """What vLLM serves wrong, or otherwise than the files say, without a message."""
    yield from _head_findings(checkpoint)
    yield from _cache_findings(written, checkpoint, model)
    rounds = [group for group in by_group(checkpoint) if (kind := kind_of(group)) and kind.name == "MXFP4"]
    if (target.capability or 0) >= 100 and any(group.inputs is None for group in rounds):
        left_out = disabled_kernels(engine_environment(model, target) | mxfp4_environment(checkpoint, model, target))
        experts = any(linear.fused == "experts" for group in rounds for linear in by_group(checkpoint)[group])
        if _W4A4 not in left_out or experts:
            yield Finding.error(
                "compressed-tensors-mxfp4-activations",
                "the files are MXFP4 with 16-bit activations, and vLLM 0.32 rounds activations to 4 bits on this GPU "
                "(vllm issue 56770)",
                [group.name for group in rounds],
                "serve it on a GPU before Blackwell, whose kernel keeps 16 bits"
                if experts
                else f"add {_W4A4} to {DISABLED_KERNELS}, or leave the variable out",
            )
    model_type = str(checkpoint.text_config.get("model_type"))
    wide = [
        group for group in by_group(checkpoint) if group.weights.is_("int", 4, "group") and not group.weights.symmetric
    ]
    if wide and model_type in _OFFSET_NORMS and _version(written) < (0, 15):
        yield Finding.warning(
            "compressed-tensors-offset-norms",
            f"the norms of {model_type} multiply by 1 + weight. 4-bit weights with zero points are what AWQ writes, "
            "and AWQ of llm-compressor before 0.11 computed wrong weights for such norms (llm-compressor issue 2102)",
            [group.name for group in wide],
            "compare a few answers with the unquantized model; use a GPTQ export, or a newer llm-compressor",
        )


def mxfp4_environment(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> dict[str, str]:
    """The variable that keeps vLLM from rounding activations which the files keep in 16 bits."""
    weight_only = any(
        kind.name == "MXFP4" and group.inputs is None
        for group in by_group(checkpoint)
        if (kind := kind_of(group)) is not None
    )
    chosen = DISABLED_KERNELS in engine_environment(model, target)
    return {DISABLED_KERNELS: _W4A4} if weight_only and (target.capability or 0) >= 100 and not chosen else {}


def _head_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    heads = [name for name in checkpoint.tensors if name.endswith(tuple(f"lm_head{suffix}" for suffix in _SUFFIXES))]
    if not heads:
        return
    groups = groups_of(checkpoint)
    head = Linear(heads[0].rpartition(".")[0], 0, 0, "column")
    if checkpoint.text_config.get("tie_word_embeddings") is True:
        yield Finding.error(
            "compressed-tensors-lm-head",
            "lm_head is quantized, and tie_word_embeddings is true: vLLM takes the embedding for lm_head",
            heads,
            'set "tie_word_embeddings" to false in config.json if lm_head has weights of its own',
        )
    elif groups is not None and groups.of(head) is None:
        yield Finding.error(
            "compressed-tensors-lm-head",
            "lm_head is quantized, and no target names it: vLLM's class of it is no Linear, and it is built plain",
            heads,
            'add "re:.*lm_head" to the targets of its group',
        )


def _cache_findings(written: Written, checkpoint: Checkpoint, model: ModelConfig) -> Iterator[Finding]:
    scheme, asked = written.values.get("kv_cache_scheme"), str(model.engine_kwargs.get("kv_cache_dtype", "auto"))
    scales = [name for name in checkpoint.tensors if name.endswith(_CACHE)]
    if isinstance(scheme, dict):
        kind, bits, strategy = (scheme.get(key) for key in ("type", "num_bits", "strategy"))
        if (kind, bits) != ("float", 8) or strategy not in ("tensor", "attn_head") or not scheme.get("symmetric"):
            yield Finding.error(
                "compressed-tensors-kv-cache",
                f"kv_cache_scheme is {bits} bits, {kind}, by {strategy}; vLLM takes symmetric FP8 by tensor or by "
                "attn_head",
                [f"{_WHERE}.kv_cache_scheme"],
                "set kv_cache_scheme to null, or export the model again",
            )
        elif not asked.startswith(("auto", "fp8")):
            yield Finding.warning(
                "compressed-tensors-kv-cache",
                f"the files are calibrated for an FP8 KV cache, and kv_cache_dtype is {asked}",
                ["engine_kwargs.kv_cache_dtype"],
                "leave kv_cache_dtype out",
            )
        elif not scales and not scheme.get("dynamic") and checkpoint.tensors_complete:
            yield Finding.warning(
                "compressed-tensors-kv-cache",
                "kv_cache_scheme asks for an FP8 KV cache, and the files have no k_scale and v_scale: vLLM takes 1.0",
                [f"{_WHERE}.kv_cache_scheme"],
                "compare a few answers with kv_cache_dtype bfloat16",
            )
    elif scales and not asked.startswith("fp8"):
        yield Finding.info(
            "compressed-tensors-kv-cache",
            f"the files hold {len(scales)} scales of an FP8 KV cache, which are not used: there is no kv_cache_scheme",
            scales[:SHOWN],
            "set engine_kwargs.kv_cache_dtype to fp8 for a cache of half the size",
        )


def _said(args: object) -> str:
    if args is None:
        return "in 16 bits"
    return ", ".join(f"{key} {value}" for key, value in vars(args).items() if value not in (None, "", False))


def _version(written: Written) -> tuple[int, ...]:
    found = re.match(r"(\d{1,4})\.(\d{1,4})", str(written.values.get("version") or "0.0"))
    return (int(found[1]), int(found[2])) if found else (0, 0)
