"""What the target's kernels and tensor parallelism cannot do with AWQ linears.

quantserve's own kernel takes any shape that files can hold; these are the limits of vLLM's.
"""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING

from quantserve.api import Checkpoint, Finding, Linear, Target, check_shards
from quantserve_awq.config import Written
from quantserve_awq.experts import expert_findings, experts_problem
from quantserve_awq.tensors import actual_group, stored_linears

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

MARLIN_GROUPS = (-1, 32, 64, 128)
OFFENDERS = 8


def limit_findings(
    checkpoint: Checkpoint, written: Written, target: Target, model: ModelConfig, *, own_kernel: bool
) -> list[Finding]:
    """What cannot be computed, or only slowly; nothing where the files' groups do not divide K."""
    group, quantized = actual_group(checkpoint, written)[0], stored_linears(checkpoint)[0]
    if group is None or not quantized or any(linear.k % group for linear in quantized):
        return []
    return [
        *whole_row_findings(quantized, group, model),
        *kernel_findings(quantized, group, written, target, model, own_kernel=own_kernel),
        *expert_findings(checkpoint, quantized, group, written, target, model, own_kernel=own_kernel),
    ]


def whole_row_findings(quantized: list[Linear], group: int, model: ModelConfig) -> list[Finding]:
    """One group for a whole row has one row of scales, which vLLM would split like the inputs."""
    rows = [linear.name for linear in quantized if linear.parallel == "row" and linear.fused != "experts"]
    if not rows or model.tensor_parallel_size == 1 or group != -1:
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


def vllm_cpu_problems(checkpoint: Checkpoint, written: Written, target: Target, model: ModelConfig) -> tuple[str, str]:
    """Why vLLM's AWQ kernels for CPUs cannot take the linears, and the experts, of this model; "" when they can."""
    group, quantized = actual_group(checkpoint, written)[0] or 0, stored_linears(checkpoint)[0]
    linears = [linear for linear in quantized if linear.fused != "experts"]
    problems = cpu_findings(linears, group, model.tensor_parallel_size)
    return (
        problems[0].message if problems else "",
        experts_problem(checkpoint, quantized, group, written, target, model),
    )


def uses_plain_kernel(group: int, symmetric: bool, target: Target) -> bool:
    """Whether vLLM cannot use Marlin or Machete on a GPU for this group size, or for files without zero points.

    On ROCm one Triton kernel takes both kinds of files.
    """
    if target.device == "cpu":
        return False
    return group not in MARLIN_GROUPS or (symmetric and target.device == "cuda")
