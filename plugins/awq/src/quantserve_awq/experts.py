"""The experts of AWQ mixtures, which vLLM 0.32 serves by other kernels and other rules than linears.

Read from ``auto_awq.py``, ``moe_wna16.py``, ``oracle/int_wna16.py`` and ``experts/cpu_moe.py`` of vLLM.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from quantserve.api import Checkpoint, Finding, Linear, Target
from quantserve_awq.config import Written

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

MARLIN_GROUPS = (32, 64, 128)
HIDDEN_MULTIPLE = 128
SMALLEST_GROUP = 32
OFFENDERS = 8


def expert_findings(
    checkpoint: Checkpoint, quantized: list[Linear], group: int, written: Written, target: Target, model: ModelConfig
) -> list[Finding]:
    """What the kernels for experts cannot do, or only slowly."""
    experts = [linear for linear in quantized if linear.fused == "experts"]
    if not experts:
        return []
    names = [linear.name for linear in experts[:OFFENDERS]]
    whole = bool(model.engine_kwargs.get("enable_expert_parallel"))
    ranks = 1 if whole else model.tensor_parallel_size
    hidden = sorted({linear.k for linear in experts if linear.parallel == "column"})
    widths = sorted({linear.k for linear in experts if linear.parallel == "row"})
    if group == -1:
        return [
            Finding.error(
                "awq-experts-group",
                f"{len(experts)} experts have one group for a whole row (group_size -1), which vLLM cannot load",
                names,
                "use an export with group_size 128",
            )
        ]
    split = [f"{width}/{ranks}" for width in widths if width % ranks]
    if split:
        return []  # the core refuses it
    widths = [width // ranks for width in widths]
    sizes = f"hidden size {', '.join(map(str, hidden))}, expert width per rank {', '.join(map(str, widths))}"
    marlin = target.device != "rocm" and group in MARLIN_GROUPS
    marlin &= not any(size % HIDDEN_MULTIPLE for size in hidden) and not any(size % group for size in widths)
    if target.device == "cpu":
        return _on_cpu(checkpoint, names, len(experts), sizes, written, target, marlin)
    if marlin:
        return []
    return _on_gpu(names, [*hidden, *widths], group, sizes, written, target)


def _on_cpu(
    checkpoint: Checkpoint, names: list[str], count: int, sizes: str, written: Written, target: Target, marlin: bool
) -> list[Finding]:
    """vLLM's only kernel for 4-bit experts on CPUs needs AMX; with zentorch on AMD there is one for symmetric files."""
    if written.symmetric and find_spec("zentorch") is not None:
        return []
    text = checkpoint.text_config
    if not target.has_amx:
        why = f"only on CPUs with AMX, which {target.name} does not have"
    elif not marlin:
        why = f"only where hidden size is a multiple of 128 and the width per rank one of the group size ({sizes})"
    elif text.get("scoring_func") == "sigmoid" or any("e_score_correction_bias" in name for name in checkpoint.tensors):
        why = "on CPUs only with softmax routing, and this model routes by sigmoid or with a correction bias"
    else:
        return []
    return [
        Finding.error(
            "awq-cpu-experts",
            f"{count} quantized linears are experts of a mixture; vLLM serves 4-bit experts {why}",
            names,
            "serve it on a GPU, or serve the unquantized model",
        )
    ]


def _on_gpu(
    names: list[str], sizes: list[int], group: int, shown: str, written: Written, target: Target
) -> list[Finding]:
    """Experts that Marlin cannot take go to MoeWNA16, which halves the group until it divides both sizes."""
    halved = group
    while any(size % halved for size in sizes):
        halved //= 2
        if halved >= SMALLEST_GROUP:
            continue
        return [
            Finding.error(
                "awq-experts-group",
                f"experts of {shown}: no half of group_size {group} down to {SMALLEST_GROUP} divides both, and vLLM "
                "refuses to load them",
                names,
                "set another scaling_config.num_workers, or set engine_kwargs.enable_expert_parallel to true",
            )
        ]
    if missing := [key for key in ("bits", "group_size") if key not in written.values]:
        return [
            Finding.error(
                "awq-experts-keys",
                f"experts of {shown} go to vLLM's MoeWNA16 kernel, which reads {' and '.join(missing)} from the "
                f"quantization config and does not know other spellings; {written.where} lacks "
                f"{'them' if len(missing) > 1 else 'it'}",
                missing,
                "add quantization_config with bits and group_size to config.json",
            )
        ]
    reason = "on ROCm" if target.device == "rocm" else f"because Marlin does not take groups of {group} with {shown}"
    return [
        Finding.warning(
            "awq-experts-slow",
            f"experts run on vLLM's MoeWNA16 kernel {reason}"
            + (f", with groups cut to {halved}" if halved != group else "")
            + "; it is slower than Marlin",
            names,
            "choose scaling_config.num_workers so that the expert width per rank is a multiple of the group size, or "
            "set engine_kwargs.enable_expert_parallel to true"
            if target.device != "rocm"
            else "nothing to do; expect less speed than on CUDA",
        )
    ]
