"""The experts of AWQ mixtures, which vLLM 0.32 serves by other kernels and other rules than linears.

On CPUs quantserve's kernel serves them wherever it serves linears. vLLM's rules are read from ``auto_awq.py``,
``moe_wna16.py``, ``oracle/int_wna16.py`` and ``experts/cpu_moe.py`` of vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from quantserve.api import DISABLED_KERNELS, Checkpoint, Finding, Linear, Target
from quantserve_awq.config import Written

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

MARLIN_GROUPS = (32, 64, 128)
HIDDEN_MULTIPLE = 128
SMALLEST_GROUP = 32
OFFENDERS = 8


def expert_findings(
    checkpoint: Checkpoint,
    quantized: list[Linear],
    group: int,
    written: Written,
    target: Target,
    model: ModelConfig,
    *,
    own_kernel: bool,
) -> list[Finding]:
    """What the kernels for experts cannot do, or only slowly.

    Args:
        own_kernel: whether quantserve's kernel serves the model.
    """
    experts = [linear for linear in quantized if linear.fused == "experts"]
    if not experts:
        return []
    names = [linear.name for linear in experts[:OFFENDERS]]
    sizes = _sizes(experts, model)
    if any(width % sizes.ranks for width in sizes.whole):
        return []  # the core refuses it
    if own_kernel:
        return _on_own_kernel(names, group, sizes)
    if group == -1:
        return [
            Finding.error(
                "awq-experts-group",
                f"{len(experts)} experts have one group for a whole row (group_size -1), which vLLM cannot load",
                names,
                "use an export with group_size 128",
            )
        ]
    if target.device == "cpu":
        why = _cpu_problem(checkpoint, group, sizes, written, target)
        return [_cpu_finding(why, len(experts), names)] if why else []
    if target.device != "rocm" and _marlin(group, sizes):
        return []
    return _on_gpu(names, [*sizes.hidden, *sizes.widths], group, str(sizes), written, target)


def experts_problem(
    checkpoint: Checkpoint, quantized: list[Linear], group: int, written: Written, target: Target, model: ModelConfig
) -> str:
    """Why vLLM's own kernel for experts on CPUs cannot take this model; "" when it can, or there are none."""
    experts = [linear for linear in quantized if linear.fused == "experts"]
    if not experts:
        return ""
    return _cpu_problem(checkpoint, group, _sizes(experts, model), written, target)


@dataclass(frozen=True)
class _Sizes:
    """Of the experts: in_features of what is cut by columns and by rows, and the ranks that cut them."""

    hidden: tuple[int, ...]
    whole: tuple[int, ...]
    ranks: int

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(width // self.ranks for width in self.whole)

    def __str__(self) -> str:
        return (
            f"hidden size {', '.join(map(str, self.hidden))}, expert width per rank {', '.join(map(str, self.widths))}"
        )


def _sizes(experts: list[Linear], model: ModelConfig) -> _Sizes:
    def inputs(parallel: str) -> tuple[int, ...]:
        return tuple(sorted({linear.k for linear in experts if linear.parallel == parallel}))

    whole = bool(model.engine_kwargs.get("enable_expert_parallel"))
    return _Sizes(inputs("column"), inputs("row"), 1 if whole else model.tensor_parallel_size)


def _marlin(group: int, sizes: _Sizes) -> bool:
    """Whether vLLM takes the experts for its Marlin layout, which its kernel for CPUs needs too."""
    if group not in MARLIN_GROUPS or any(size % HIDDEN_MULTIPLE for size in sizes.hidden):
        return False
    return not any(size % group for size in sizes.widths)


def _on_own_kernel(names: list[str], group: int, sizes: _Sizes) -> list[Finding]:
    """quantserve's kernel takes experts whose groups stay whole on every rank."""
    if sizes.ranks == 1 or (group > 0 and not any(width % group for width in sizes.widths)):
        return []
    return [
        Finding.error(
            "awq-experts-group",
            f"experts of {sizes}: a group of {group if group > 0 else 'all inputs'} would be split between ranks",
            names,
            "set another scaling_config.num_workers, or set engine_kwargs.enable_expert_parallel to true",
        )
    ]


def _cpu_problem(checkpoint: Checkpoint, group: int, sizes: _Sizes, written: Written, target: Target) -> str:
    """vLLM's only kernel for 4-bit experts on CPUs needs AMX; with zentorch on AMD there is one for symmetric files."""
    if written.symmetric and find_spec("zentorch") is not None:
        return ""
    text = checkpoint.text_config
    if not target.has_amx:
        return f"only on CPUs with AMX, which {target.name} does not have"
    if not _marlin(group, sizes):
        return f"only where hidden size is a multiple of 128 and the width per rank one of the group size ({sizes})"
    if text.get("scoring_func") == "sigmoid" or any("e_score_correction_bias" in name for name in checkpoint.tensors):
        return "on CPUs only with softmax routing, and this model routes by sigmoid or with a correction bias"
    return ""


def _cpu_finding(why: str, count: int, names: list[str]) -> Finding:
    return Finding.error(
        "awq-cpu-experts",
        f"{count} quantized linears are experts of a mixture; vLLM serves 4-bit experts {why}",
        names,
        "let quantserve's kernel serve them: install a C++ compiler and then 'quantserve-awq[engine]', and leave "
        f"{DISABLED_KERNELS} out",
    )


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
