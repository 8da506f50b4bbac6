"""The AWQ tensors of a checkpoint against its settings, the tensor-parallel size and the target."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from math import lcm
from typing import TYPE_CHECKING

from quantserve.api import (
    Checkpoint,
    Expected,
    Finding,
    Linear,
    SkipList,
    Target,
    check_linears,
    check_shards,
    linears,
    modules,
    quantized_linears,
)
from quantserve_awq.config import Written
from quantserve_awq.experts import expert_findings

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

PER_WORD = 8
PARTS = ("qweight", "qzeros", "scales")
MARLIN_GROUPS = (-1, 32, 64, 128)
OFFENDERS = 8
BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.\d+\.")
# Leaves whose K vLLM splits over the ranks in every family, and those whose N it splits, with what it fuses them into.
ROW = ("o_proj", "down_proj", "out_proj", "w2")
COLUMN = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "w1": "", "w3": "",
}  # fmt: skip
REPEAT = "download the checkpoint again, or quantize the model again"


def has_awq_tensors(checkpoint: Checkpoint) -> bool:
    """Whether some module is stored in the gemm layout: eight codes of N per word, one scale per N."""
    for name, qweight in checkpoint.tensors.items():
        module, _, part = name.rpartition(".")
        scales = checkpoint.tensors.get(f"{module}.scales")
        if part != "qweight" or scales is None or f"{module}.qzeros" not in checkpoint.tensors:
            continue
        if len(qweight.shape) == 2 and scales.shape[-1:] == (qweight.shape[1] * PER_WORD,):
            return True
    return False


def has_quantized_tensors(checkpoint: Checkpoint) -> bool:
    """Whether any module is stored quantized, in whatever layout."""
    return any(name.endswith((".qweight", ".qzeros", ".weight_packed")) for name in checkpoint.tensors)


def tensor_findings(
    checkpoint: Checkpoint, written: Written, target: Target, model: ModelConfig, *, own_kernel: bool
) -> list[Finding]:
    """Compare the tensors with the settings, and with what the kernels of the target can take."""
    if foreign := foreign_findings(checkpoint):
        return foreign
    group, findings = actual_group(checkpoint, written)

    def layout(linear: Linear) -> Mapping[str, Expected]:
        rows = None if group is None else 1 if group == -1 else linear.k // group
        return {
            "qweight": Expected((linear.k, linear.n // PER_WORD), ("I32",)),
            "qzeros": Expected((rows, linear.n // PER_WORD), ("I32",)),
            "scales": Expected((rows, linear.n), ("F16", "BF16")),
        }

    skipped = SkipList(written.values.get("modules_to_not_convert"))
    findings += check_linears(checkpoint, layout, code="awq", skipped=skipped)
    quantized, dense = quantized_linears(checkpoint, layout)
    stored = stored_linears(checkpoint)
    findings += pickle_findings(checkpoint, written, dense)
    findings += lm_head_findings(checkpoint, written)
    findings += other_module_findings(checkpoint, group)
    quantized += stored
    findings += packing_findings(quantized, group)
    if group is not None and not any(finding.code == "awq-packing" for finding in findings):
        findings += shard_findings(quantized, group, target, model, own_kernel=own_kernel)
        findings += kernel_findings(quantized, group, written, target, model, own_kernel=own_kernel)
        findings += expert_findings(checkpoint, quantized, group, written, target, model)
    return findings


def stored_linears(checkpoint: Checkpoint) -> tuple[Linear, ...]:
    """The quantized linears of numbered blocks that the core does not know, from their own tensors.

    K and N are those of qweight [K, N / 8]. A leaf nobody knows counts as whole on every rank, so that no shard of it
    is checked.
    """
    known = {linear.name for linear in linears(checkpoint)}
    kv_heads = checkpoint.text_config.get("num_key_value_heads")
    found = []
    for module, tensors in modules(checkpoint).items():
        qweight = tensors.get("qweight")
        if qweight is None or module in known or len(qweight.shape) != 2 or not BLOCK.search(module):
            continue
        k, words = qweight.shape
        leaf = module.rpartition(".")[2]
        experts = ".experts." in module
        if leaf in ROW:
            found.append(Linear(module, words * PER_WORD, k, "row", "experts" if experts else ""))
        elif leaf in COLUMN:
            replicated = leaf in ("k_proj", "v_proj")
            most = (kv_heads if type(kv_heads) is int and kv_heads > 0 else 1) if replicated else 0
            fused = "experts" if experts else COLUMN[leaf]
            found.append(Linear(module, words * PER_WORD, k, "column", fused, most))
        else:
            found.append(Linear(module, words * PER_WORD, k, "column", "", 1))
    return tuple(found)


# --- the files ----------------------------------------------------------------------------------------


def foreign_findings(checkpoint: Checkpoint) -> list[Finding]:
    """One finding when the tensors are of another layout than gemm, which vLLM would misread."""
    seen = {linear.name: kind for linear in linears(checkpoint) if (kind := foreign_layout(checkpoint, linear))}
    if not seen:
        return []
    kind = Counter(seen.values()).most_common(1)[0][0]
    names = [name for name, value in seen.items() if value == kind]
    shape = next(
        list(checkpoint.tensors[f"{names[0]}.{part}"].shape)
        for part in ("qweight", "weight_packed")
        if f"{names[0]}.{part}" in checkpoint.tensors
    )
    if kind in ("GPTQ", "compressed-tensors"):
        return [
            Finding.error(
                "awq-wrong-method",
                f"{len(names)} linears are stored in the layout of {kind}, not AWQ. First: {names[0]} {shape}",
                names[:OFFENDERS],
                f"serve it with a plugin for {kind}, or use an AWQ export of the model",
            )
        ]
    return [
        Finding.error(
            "awq-version",
            f"{len(names)} linears are stored in AWQ's {kind} layout; vLLM reads every file as gemm. "
            f"First: {names[0]}.qweight {shape}",
            names[:OFFENDERS],
            'export the model again with version "gemm"',
        )
    ]


def foreign_layout(checkpoint: Checkpoint, linear: Linear) -> str | None:
    """The name of the other layout a linear is stored in; None for gemm, for nothing and for nonsense."""
    if f"{linear.name}.weight_packed" in checkpoint.tensors:
        return "compressed-tensors"
    qweight = checkpoint.tensors.get(f"{linear.name}.qweight")
    scales = checkpoint.tensors.get(f"{linear.name}.scales")
    if qweight is None or scales is None or len(scales.shape) != 2:
        return None
    n, k = linear.n, linear.k
    if qweight.dtype == "I16" and qweight.shape == (n // 4, k):
        return "gemv_fast"
    if qweight.shape == (k // 16, 2 * n):
        return "marlin"
    # A square gemv weight has the shape of a gemm one; its scales lie along N.
    if qweight.shape == (n, k // PER_WORD) and scales.shape[0] == n and scales.shape[1] != n:
        return "gemv"
    if qweight.shape == (k // PER_WORD, n) and scales.shape[1] == n:
        return "GPTQ"
    return None


def actual_group(checkpoint: Checkpoint, written: Written) -> tuple[int | None, list[Finding]]:
    """The group size of the tensors (-1 when the config says so and they agree), and whether the config agrees."""
    declared = written.group_size
    sizes: Counter[int] = Counter()
    wrong: list[str] = []
    for linear in (*linears(checkpoint), *stored_linears(checkpoint)):
        scales = checkpoint.tensors.get(f"{linear.name}.scales")
        if scales is None or len(scales.shape) != 2 or scales.shape[0] < 1 or linear.k % scales.shape[0]:
            continue
        size = linear.k // scales.shape[0]
        sizes[size] += 1
        if declared is not None and size != (linear.k if declared == -1 else declared):
            wrong.append(f"{scales.name} {list(scales.shape)}: {linear.k} / {scales.shape[0]} = {size}")
    if not sizes or declared is None:
        return (sizes.most_common(1)[0][0] if sizes else declared), []
    if len(wrong) < sum(sizes.values()) / 2:
        return declared, []  # single misshapen tensors are not the config's fault
    actual = sizes.most_common(1)[0][0]
    return actual, [
        Finding.error(
            "awq-group-size",
            f"{written.where} says group_size {declared}, the scales are of groups of {actual}. First: {wrong[0]}",
            wrong[:OFFENDERS],
            f"set group_size to {actual} if these are the right weights",
        )
    ]


def pickle_findings(checkpoint: Checkpoint, written: Written, dense: list[Linear]) -> list[Finding]:
    """vLLM finds unquantized linears by itself in safetensors only."""
    files = {checkpoint.tensors[f"{linear.name}.weight"].file for linear in dense}
    if written.skipped or not any(not name.endswith(".safetensors") for name in files):
        return []
    return [
        Finding.error(
            "awq-skip-list",
            f"{len(dense)} linears are unquantized, and vLLM does not see that in {sorted(files)[0]}",
            [linear.name for linear in dense[:OFFENDERS]],
            "list them in modules_to_not_convert, or convert the weights to safetensors",
        )
    ]


def lm_head_findings(checkpoint: Checkpoint, written: Written) -> list[Finding]:
    """A quantized lm_head is read only where the config announces it."""
    heads = [name for name in checkpoint.tensors if name.endswith("lm_head.qweight")]
    if not heads or written.values.get("lm_head") is True:
        return []
    return [
        Finding.error(
            "awq-lm-head",
            f"lm_head is quantized, and {written.where} does not say so: vLLM builds it unquantized",
            heads,
            'add "lm_head": true to the quantization config',
        )
    ]


def other_module_findings(checkpoint: Checkpoint, group: int | None) -> list[Finding]:
    """Quantized modules config.json does not describe (lm_head, unknown families): their tensors against each other."""
    known = {linear.name for linear in linears(checkpoint)}
    missing: list[str] = []
    misshapen: list[str] = []
    for module, tensors in modules(checkpoint).items():
        qweight = tensors.get("qweight")
        if qweight is None or module in known:
            continue
        missing += [f"{module}.{part}" for part in PARTS if part not in tensors]
        if len(qweight.shape) != 2 or any(part not in tensors for part in PARTS):
            continue
        k, words = qweight.shape
        rows = (tensors["scales"].shape or (0,))[0] if group is None else 1 if group == -1 else k // group
        for part, shape in (("qzeros", (rows, words)), ("scales", (rows, words * PER_WORD))):
            if tensors[part].shape != shape:
                misshapen.append(f"{module}.{part} {list(tensors[part].shape)}, expected {list(shape)}")
    findings = []
    if missing:
        message = f"{len(missing)} tensors of quantized modules are missing. First: {missing[0]}"
        findings.append(Finding.error("awq-missing-tensors", message, missing[:OFFENDERS], REPEAT))
    if misshapen:
        message = f"{len(misshapen)} tensors do not fit their qweight. First: {misshapen[0]}"
        findings.append(Finding.error("awq-wrong-shape", message, misshapen[:OFFENDERS], REPEAT))
    return findings


def packing_findings(quantized: list[Linear], group: int | None) -> list[Finding]:
    """Shapes that no AWQ file can hold."""
    bad = [f"{linear.name}: N {linear.n} is not a multiple of 8" for linear in quantized if linear.n % PER_WORD]
    if group is not None and group > 0:
        bad += [f"{linear.name}: K {linear.k} is not a multiple of {group}" for linear in quantized if linear.k % group]
    if not bad:
        return []
    groups = f" and groups of {group}" if group is not None and group > 0 else ""
    return [
        Finding.error(
            "awq-packing",
            f"{len(bad)} linears cannot be stored with 8 codes per word{groups}. First: {bad[0]}",
            bad[:OFFENDERS],
            "leave these linears unquantized, or quantize with a group size that divides K",
        )
    ]


# --- the ranks and the device -------------------------------------------------------------------------


def shard_findings(
    quantized: list[Linear], group: int, target: Target, model: ModelConfig, *, own_kernel: bool
) -> list[Finding]:
    """What one tensor-parallel rank's part of each linear must divide by; the groups of experts have other rules."""
    ranks = model.tensor_parallel_size
    if model.engine_kwargs.get("enable_expert_parallel"):
        quantized = [linear for linear in quantized if linear.fused != "experts"]  # each is whole on its rank
    split = [linear for linear in quantized if linear.parallel == "row" and linear.fused != "experts"]
    findings: list[Finding] = []
    if ranks > 1 and group == -1:
        rows = [linear.name for linear in split]
        findings.append(
            Finding.error(
                "awq-group-splits-ranks",
                f"group_size -1 makes one group of all K inputs, which tensor_parallel_size {ranks} would split in "
                f"{len(rows)} linears: their ranks would have no scales at all",
                rows[:OFFENDERS],
                "set scaling_config.num_workers to 1, or use an export with group_size 128",
            )
        )
    elif ranks > 1:
        theirs = target.device == "cpu" and not own_kernel
        silent = "vLLM on CPU does not notice and answers with wrong tokens" if theirs else ""
        findings += check_shards(
            split,
            ranks,
            code="awq-group-splits-ranks",
            why=f"the {group} inputs of a group must stay on one rank" + (f"; {silent}" if silent else ""),
            k_multiple=group,
        )
    findings += check_shards(
        quantized, ranks, code="awq-word-splits-ranks", why="8 codes along N share one int32 word", n_multiple=PER_WORD
    )
    return findings


def kernel_findings(
    quantized: list[Linear], group: int, written: Written, target: Target, model: ModelConfig, *, own_kernel: bool
) -> list[Finding]:
    """What vLLM's AWQ kernels of the target cannot do with linears; quantserve's takes any shape files can hold."""
    ranks = model.tensor_parallel_size
    quantized = [linear for linear in quantized if linear.fused != "experts"]
    if own_kernel:
        return []
    if target.device == "cpu":
        return cpu_findings(quantized, group, ranks)
    if not uses_plain_kernel(group, written.symmetric, target):
        return []
    if target.device == "rocm":
        if all(linear.k == group for linear in quantized):
            return []
        return [
            Finding.error(
                "awq-rocm-group-size",
                f"group_size {group}: vLLM's Triton kernel for AWQ takes 32, 64, 128 and whole rows",
                ["group_size"],
                "use an export with group_size 128",
            )
        ]
    findings = [plain_kernel_finding(group, written)]
    findings += check_shards(
        quantized,
        ranks,
        code="awq-plain-kernel-shape",
        why=f"the plain AWQ kernel takes N per rank in multiples of 64 and of the group size {group}",
        fused_n_multiple=lcm(64, group) if group > 0 else 64,
    )
    if group > 0 and group % 32:
        findings.append(
            Finding.error(
                "awq-plain-kernel-shape",
                f"group_size {group} is not a multiple of 32, which the plain AWQ kernel needs",
                ["group_size"],
                "use an export with group_size 128",
            )
        )
    return findings


def plain_kernel_finding(group: int, written: Written) -> Finding:
    """Why vLLM falls back to its plain AWQ kernel."""
    slower = "which is much slower than Marlin and computes in float16 only"
    if written.symmetric:
        return Finding.warning(
            "awq-zero-point",
            f"{written.where} has zero_point: false, for which vLLM has no Marlin kernel on GPUs: it falls back to its "
            f"plain AWQ kernel, {slower}. That one subtracts the stored qzeros, which auto-round writes as 8",
            [f"{written.where}: zero_point"],
            "set zero_point to true where the file's qzeros are right, as in exports by auto-round",
        )
    return Finding.warning(
        "awq-plain-kernel",
        f"group_size {group} is not one of 32, 64, 128, -1, so vLLM falls back to its plain AWQ kernel, {slower}",
        ["group_size"],
        "use an export with group_size 128",
    )


def cpu_findings(quantized: list[Linear], group: int, ranks: int) -> list[Finding]:
    """What vLLM's AWQ kernel for CPUs cannot do."""
    findings = check_shards(
        quantized,
        ranks,
        code="awq-cpu-alignment",
        why="vLLM's AWQ kernel for CPUs takes K and N per rank in blocks of 32",
        k_multiple=32,
        fused_n_multiple=32,
    )
    if group > 0 and group % 2:
        findings.append(
            Finding.error(
                "awq-cpu-group-size",
                f"group_size {group} is odd; vLLM's AWQ kernel for CPUs needs an even one",
                ["group_size"],
                "use an export with group_size 128, or quantserve's kernel",
            )
        )
    return findings


def vllm_cpu_problem(checkpoint: Checkpoint, written: Written, model: ModelConfig) -> str:
    """Why vLLM's AWQ kernel for CPUs cannot take this model; "" when it can."""
    group = actual_group(checkpoint, written)[0]
    every = [linear for linear in (*linears(checkpoint), *stored_linears(checkpoint)) if linear.fused != "experts"]
    quantized = [linear for linear in every if f"{linear.name}.qweight" in checkpoint.tensors]
    problems = cpu_findings(quantized, group or 0, model.tensor_parallel_size)
    return problems[0].message if problems else ""


def uses_plain_kernel(group: int, symmetric: bool, target: Target) -> bool:
    """Whether vLLM cannot use Marlin or Machete on a GPU for this group size, or for files without zero points.

    On ROCm one Triton kernel takes both kinds of files.
    """
    if target.device == "cpu":
        return False
    return group not in MARLIN_GROUPS or (symmetric and target.device == "cuda")
