"""What the scheme of AWQ's tensors does not tell: other layouts, wrong settings, and what the target's kernels take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import lcm
from typing import TYPE_CHECKING

from quantserve.api import (
    Checkpoint,
    Finding,
    Linear,
    Scheme,
    Target,
    Tensor,
    check_shards,
    linears,
    modules,
    once,
    quantized_linears,
)
from quantserve_awq.config import NAMES, REFUSED, Written, config_findings, written_config
from quantserve_awq.experts import expert_findings
from quantserve_awq.format import GEMM, OTHER_LAYOUTS, OTHER_METHODS, awq_scheme

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

MARLIN_GROUPS = (-1, 32, 64, 128)
OFFENDERS = 8


def has_awq_tensors(checkpoint: Checkpoint) -> bool:
    """Whether some module is stored in the gemm layout."""
    for name in checkpoint.tensors:
        module, _, part = name.rpartition(".")
        if part == "qweight":
            names = {suffix: f"{module}.{suffix}" for suffix in GEMM.parts}
            tensors = {suffix: checkpoint.tensors[name] for suffix, name in names.items() if name in checkpoint.tensors}
            if (size := GEMM.solve(tensors)) and GEMM.fits(tensors, *size):
                return True
    return False


def has_quantized_tensors(checkpoint: Checkpoint) -> bool:
    """Whether any module is stored quantized, in whatever layout."""
    return any(name.endswith((".qweight", ".qzeros", ".weight_packed")) for name in checkpoint.tensors)


@once
def stored_scheme(checkpoint: Checkpoint) -> Scheme | None:
    """The scheme of the quantized linears; None where settings or tensors are not those of AWQ, which findings say."""
    written = written_config(checkpoint)
    if written is None or written.method not in NAMES or not has_quantized_tensors(checkpoint):
        return None
    if any(finding.code in REFUSED for finding in config_findings(written)) or foreign_findings(checkpoint):
        return None
    return awq_scheme(actual_group(checkpoint, written)[0])


@once
def stored_linears(checkpoint: Checkpoint) -> tuple[list[Linear], list[Linear]]:
    """The linears stored in AWQ's layout, and those stored as a plain weight."""
    scheme = stored_scheme(checkpoint)
    return quantized_linears(checkpoint, lambda linear: scheme)


def tensor_findings(
    checkpoint: Checkpoint, written: Written, target: Target, model: ModelConfig, *, own_kernel: bool
) -> list[Finding]:
    """What is wrong with the tensors beyond what their scheme tells."""
    if foreign := foreign_findings(checkpoint):
        return foreign
    group, findings = actual_group(checkpoint, written)
    quantized, plain = stored_linears(checkpoint)
    findings += pickle_findings(checkpoint, written, plain)
    findings += lm_head_findings(checkpoint, written)
    if group is not None and all(linear.k % group == 0 for linear in quantized):
        findings += whole_row_findings(quantized, group, model)
        findings += kernel_findings(quantized, group, written, target, model, own_kernel=own_kernel)
        findings += expert_findings(checkpoint, quantized, group, written, target, model)
    return findings


# --- the files ----------------------------------------------------------------------------------------


@once
def foreign_findings(checkpoint: Checkpoint) -> list[Finding]:
    """One finding when the tensors are of another layout than gemm, which vLLM would misread."""
    present = modules(checkpoint)
    seen = {linear.name: kind for linear in linears(checkpoint) if (kind := foreign_layout(present, linear))}
    if not seen:
        return []
    kind = Counter(seen.values()).most_common(1)[0][0]
    names = [name for name, value in seen.items() if value == kind]
    first = f"First: {names[0]} {list(present[names[0]][next(iter(OTHER_LAYOUTS[kind].parts))].shape)}"
    if kind in OTHER_METHODS:
        return [
            Finding.error(
                "awq-wrong-method",
                f"{len(names)} linears are stored in the layout of {kind}, not AWQ. {first}",
                names[:OFFENDERS],
                f"serve it with a plugin for {kind}, or use an AWQ export of the model",
            )
        ]
    return [
        Finding.error(
            "awq-version",
            f"{len(names)} linears are stored in AWQ's {kind} layout; vLLM reads every file as gemm. {first}",
            names[:OFFENDERS],
            'export the model again with version "gemm"',
        )
    ]


def foreign_layout(present: Mapping[str, Mapping[str, Tensor]], linear: Linear) -> str | None:
    """The name of the other layout a linear is stored in; None for gemm, for nothing and for nonsense."""
    tensors, n, k = present.get(linear.name, {}), linear.n, linear.k
    if GEMM.fits(tensors, n, k):  # a square gemv weight differs in its scales only
        return None
    return next((kind for kind, layout in OTHER_LAYOUTS.items() if layout.fits(tensors, n, k)), None)


def actual_group(checkpoint: Checkpoint, written: Written) -> tuple[int | None, list[Finding]]:
    """The group size of the tensors (-1 when the config says so and they agree), and whether the config agrees."""
    declared = written.group_size
    sizes: Counter[int] = Counter()
    wrong: list[str] = []
    for tensors in modules(checkpoint).values():
        if "qweight" not in tensors or "scales" not in tensors:
            continue
        scales, k = tensors["scales"], next(iter(tensors["qweight"].shape), 0)
        if len(scales.shape) != 2 or scales.shape[0] < 1 or k % scales.shape[0]:
            continue
        size = k // scales.shape[0]
        sizes[size] += 1
        if declared is not None and size != (k if declared == -1 else declared):
            wrong.append(f"{scales.name} {list(scales.shape)}: {k} / {scales.shape[0]} = {size}")
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


# --- the ranks and the device -------------------------------------------------------------------------


def whole_row_findings(quantized: list[Linear], group: int, model: ModelConfig) -> list[Finding]:
    """One group for a whole row has one row of scales, which vLLM would split like the inputs."""
    rows = [linear.name for linear in quantized if linear.parallel == "row" and linear.fused != "experts"]
    if model.tensor_parallel_size == 1 or group != -1:
        return []
    return [
        Finding.error(
            "awq-group-splits-ranks",
            f"group_size -1 makes one group of all K inputs, which tensor_parallel_size {model.tensor_parallel_size} "
            f"would split in {len(rows)} linears: their ranks would have no scales at all",
            rows[:OFFENDERS],
            "set scaling_config.num_workers to 1, or use an export with group_size 128",
        )
    ]


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
    quantized = [linear for linear in stored_linears(checkpoint)[0] if linear.fused != "experts"]
    problems = cpu_findings(quantized, group or 0, model.tensor_parallel_size)
    return problems[0].message if problems else ""


def uses_plain_kernel(group: int, symmetric: bool, target: Target) -> bool:
    """Whether vLLM cannot use Marlin or Machete on a GPU for this group size, or for files without zero points.

    On ROCm one Triton kernel takes both kinds of files.
    """
    if target.device == "cpu":
        return False
    return group not in MARLIN_GROUPS or (symmetric and target.device == "cuda")
