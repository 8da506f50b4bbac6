"""What the scheme of AWQ's tensors does not tell: other layouts, a group size of another file, what vLLM overlooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from quantserve.api import (
    Checkpoint,
    Finding,
    Linear,
    Scheme,
    Tensor,
    linears,
    modules,
    once,
    quantized_linears,
)
from quantserve_awq.config import NAMES, REFUSED, Written, config_findings
from quantserve_awq.format import GEMM, OTHER_LAYOUTS, OTHER_METHODS, awq_scheme

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
    written = Written.read(checkpoint)
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


def tensor_findings(checkpoint: Checkpoint, written: Written) -> list[Finding]:
    """What is wrong with the tensors beyond what their scheme tells."""
    if foreign := foreign_findings(checkpoint):
        return foreign
    return [
        *actual_group(checkpoint, written)[1],
        *pickle_findings(checkpoint, written, stored_linears(checkpoint)[1]),
        *lm_head_findings(checkpoint, written),
    ]


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


@once
def stored_groups(checkpoint: Checkpoint) -> list[tuple[Tensor, int, int]]:
    """The scales of every quantized module, its K, and the inputs that share one of them."""
    found = []
    for tensors in modules(checkpoint).values():
        if "qweight" in tensors and "scales" in tensors:
            scales, k = tensors["scales"], next(iter(tensors["qweight"].shape), 0)
            if len(scales.shape) == 2 and scales.shape[0] and k % scales.shape[0] == 0:
                found.append((scales, k, k // scales.shape[0]))
    return found


def actual_group(checkpoint: Checkpoint, written: Written) -> tuple[int | None, list[Finding]]:
    """The group size of the tensors (-1 when the config says so and they agree), and whether the config agrees."""
    declared = written.group_size
    sizes: Counter[int] = Counter()
    wrong: list[str] = []
    for scales, k, size in stored_groups(checkpoint):
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
