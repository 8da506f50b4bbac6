"""Checks that plugins call: shares of tensor-parallel ranks, and the linears of a plugin without a scheme."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from quantserve.checks.scheme import check_schemes, misaligned, shard_findings
from quantserve.checks.skipped import SkipList
from quantserve.checks.stored import Schemes, stored_linears
from quantserve.checks.wording import are, named
from quantserve.finding import Finding
from quantserve.model.layers import in_layer_order, linears
from quantserve.model.linear import Linear, shard_n
from quantserve.scheme import Part, Scheme

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint

Expected = Part
"""Name of a `Part` of fixed sizes in version 0.1."""

Layout = Callable[[Linear], Mapping[str, Part] | Scheme | None]
"""The scheme of a linear, or its parts alone: suffix -> part."""


def quantized_linears(checkpoint: Checkpoint, layout: Layout) -> tuple[list[Linear], list[Linear]]:
    """The linears that are stored in a method's scheme, and those stored as a plain ``weight``.

    A linear counts as plain when its ``weight`` is there and no other tensor of its scheme is. Where the codes are
    called ``weight`` as well (FP8, INT8, NF4), its dtype must be a floating-point one that the scheme does not name.
    """
    stored = stored_linears(checkpoint, _schemes(layout))
    return [linear for linear, _ in stored.quantized], list(stored.plain)


def check_linears(
    checkpoint: Checkpoint,
    layout: Layout,
    *,
    code: str,
    skipped: SkipList | Iterable[str] | None = None,
    fix: str = "",
) -> list[Finding]:
    """Compare the linears of the files with a method's layout, for a plugin without ``quantserve_scheme``.

    Args:
        layout: gives each linear's tensors: suffix (``qweight``, ``weight.absmax``) -> `Part`.
        code: prefix of the codes: ``-missing-tensors``, ``-wrong-shape``, ``-wrong-dtype``,
            ``-unexpected-tensors``, ``-partly-quantized``, ``-skip-list``.
        skipped: `SkipList` of ``modules_to_not_convert`` or what the method calls it; None for a method without.
        fix: what to do about a file that is not in the layout.
    """
    skip = skipped if isinstance(skipped, SkipList) or skipped is None else SkipList(skipped)
    return check_schemes(checkpoint, stored_linears(checkpoint, _schemes(layout)), code=code, skip=skip, fix=fix)


def _schemes(layout: Layout) -> Schemes:
    """The schemes of a layout; linears with the same parts share one, so that it is read once."""
    made: dict[tuple[tuple[str, Part], ...], Scheme] = {}

    def scheme(linear: Linear) -> Scheme | None:
        parts = layout(linear)
        if parts is None or isinstance(parts, Scheme):
            return parts
        key = tuple(parts.items())
        if key not in made:
            made[key] = Scheme(parts, bits=0)
        return made[key]

    return scheme


def check_shards(
    quantized: Iterable[Linear],
    ranks: int,
    *,
    code: str,
    why: str,
    k_multiple: int = 1,
    n_multiple: int = 1,
    fused_n_multiple: int = 1,
    fix: str = "",
) -> list[Finding]:
    """Check that each linear's share of one tensor-parallel rank is a multiple of what a kernel needs.

    Args:
        quantized: the linears to check.
        ranks: tensor parallel size.
        code: the whole code of the finding.
        why: what the multiple is: "the kernel takes K in blocks of 32".
        k_multiple: required divisor of K per rank.
        n_multiple: required divisor of N per rank.
        fused_n_multiple: required divisor of N per rank summed over a fused module.
        fix: replaces the proposed smaller tensor parallel size.
    """
    every = list(quantized)

    def bad(ranks: int) -> list[str]:
        found: list[str] = []
        fused: dict[str, int] = {}
        for linear in every:
            along_k = misaligned(linear, "row", ranks, k_multiple)
            along_n = misaligned(linear, "column", ranks, n_multiple)
            found += [problem for problem in (along_k, along_n) if problem]
            # Experts are separate matrices of one module; only gate and up lie side by side.
            group = linear.name if linear.fused == "experts" else linear.group
            fused[group] = fused.get(group, 0) + shard_n(linear, ranks)
        return found + [
            f"{group}: N {n} per rank is not a multiple of {fused_n_multiple}"
            for group, n in fused.items()
            if n % fused_n_multiple
        ]

    return list(shard_findings(bad, ranks, code, why, fix))


def check_fused_blocks(quantized: Iterable[Linear], ranks: int, rows: int, *, code: str) -> list[Finding]:
    """Check that vLLM's own layers can hold scales of blocks, which they put side by side for the parts of a layer.

    Args:
        quantized: the linears with such scales.
        ranks: tensor parallel size.
        rows: out_features of a block. Every part of a fused layer but the last needs whole blocks on each rank.
        code: the whole code of the finding.
    """
    parts: dict[str, list[Linear]] = {}
    for linear in quantized:
        if linear.fused != "experts":  # which are separate matrices
            parts.setdefault(linear.group, []).append(linear)
    inner = [linear for every in parts.values() for linear in in_layer_order(every)[:-1]]
    why = f"vLLM puts the scales of blocks of fused parts side by side, so all but the last need whole blocks of {rows}"

    def bad(ranks: int) -> list[str]:
        return [problem for one in inner if (problem := misaligned(one, "column", ranks, rows))]

    return list(shard_findings(bad, ranks, code, why))


def check_mixed_layers(checkpoint: Checkpoint, setting: Callable[[Linear], object], *, code: str) -> list[Finding]:
    """Find fused layers with parts of different settings: vLLM builds each as one layer of one setting.

    Args:
        setting: how a linear is quantized, readable as text; None where it does not count.
        code: the whole code of the finding.
    """
    layers: dict[str, dict[str, object]] = {}
    for linear in linears(checkpoint):
        if linear.fused and (value := setting(linear)) is not None:
            layers.setdefault(linear.group, {})[linear.name.rpartition(".")[2]] = value
    mixed = [
        f"{layer}: " + "; ".join(f"{part} {value}" for part, value in parts.items())
        for layer, parts in layers.items()
        if len(set(parts.values())) > 1
    ]
    if not mixed:
        return []
    count = are(len(mixed), "fused layer")
    message = f"{count} quantized in different ways; vLLM builds each as one layer. First: {mixed[0]}"
    fix = "quantize q, k and v alike, gate and up alike, and all linears of a layer's experts"
    return [Finding.error(code, message, named(mixed), fix)]
