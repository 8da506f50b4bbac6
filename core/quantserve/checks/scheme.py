"""What follows from a method's scheme: the tensors every linear must have, and what tensor parallelism may cut.

A finding's code is the method's name and what went wrong (``awq-missing-tensors``); see docs/findings.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd, lcm
from typing import TYPE_CHECKING, NamedTuple

from quantserve.checks.fused import check_partly_quantized, check_skip_list, fuses, is_known
from quantserve.checks.skipped import SkipList
from quantserve.checks.stored import FLOATS, Stored
from quantserve.checks.wording import and_experts, are, counted, have, named, shown
from quantserve.finding import Finding
from quantserve.model.architecture import read_sizes
from quantserve.model.layers import linears, lm_head_name
from quantserve.model.linear import Linear, shard_k, shard_n
from quantserve.model.modules import BESIDE, engine_layers, modules
from quantserve.scheme import Dim, K, N, Part, Scheme

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint, Tensor

# What quantizers call their tensors; models of other families have parameters of other names in their linears.
_QUANTIZERS_SUFFIXES = (
    "qweight", "qzeros", "scales", "g_idx", "lookup_table", "weight_scale", "weight_packed", "weight_zero_point",
    "weight_shape", "weight_g_idx", "weight_global_scale", "input_scale", "input_global_scale", "weight.", "W_q", "SCB",
    "absmax", "quant_map", "nested_absmax",
)  # fmt: skip
_PLAIN = Scheme({"weight": Part((N(), K()), FLOATS)}, bits=16, scales="none")
_PLAIN_STACK = _PLAIN.stacked()


def check_schemes(
    checkpoint: Checkpoint,
    stored: Stored,
    *,
    code: str,
    skip: SkipList | None = None,
    ranks: int = 1,
    whole_experts: bool = False,
    fix: str = "",
) -> list[Finding]:
    """Compare the files with the schemes of a model's linears. Nothing follows where no linear has one.

    Args:
        stored: the linears by their schemes (`stored_linears`).
        code: prefix of the codes: ``-missing-tensors``, ``-wrong-shape``, ``-wrong-dtype``, ``-unexpected-tensors``,
            ``-packing``, ``-partly-quantized``, ``-skip-list``, ``-tied-lm-head``, ``-word-splits-ranks``,
            ``-group-splits-ranks``.
        skip: the config's list of unquantized modules. Files and list have to agree, as in vLLM. None for a method
            that has no such list.
        ranks: tensor parallel size.
        whole_experts: whether each expert is whole on its rank (expert parallelism).
        fix: what to do about files that are not in the scheme.

    Missing tensors are errors because vLLM does not notice them: it serves whatever the parameter's memory held. A
    bias is not the method's business; the core checks it against config.json.

    Of families that core does not know, the linears are compared that the files hold. There a tensor is unexpected
    when its suffix is one of a quantizer, and what depends on how vLLM builds the model warns.
    """
    present = modules(checkpoint)
    paths = {linear.name for linear in linears(checkpoint)} if is_known(checkpoint) else set()
    compared = _Comparison()
    held = {name: _quantizers(present.get(name, {})) for linear in stored.plain for name in linear.names}
    left_out = {name: suffixes for name, suffixes in held.items() if suffixes}
    plain = [
        (linear.only(names), _PLAIN_STACK if linear.stacked else _PLAIN)
        for linear in stored.plain
        if (names := [name for name in linear.names if name not in left_out])
    ]
    for linear, scheme in (*stored.quantized, *plain, *stored.unsized):
        compared.add(linear, scheme, present, known=linear.name in paths)
    if not checkpoint.tensors_complete:
        compared.missing = _Problems()  # a file could not be read, which is the one thing to say
    findings = [*compared.findings(code, fix), *_left_out(left_out, code)]
    layers = engine_layers(checkpoint)
    if left_out:
        layers = {layer: parts for layer, parts in layers.items() if left_out.keys().isdisjoint(parts)}
    findings += check_partly_quantized(held.keys(), layers, code, lambda layer: fuses(checkpoint, layer))
    if skip is not None and (held or stored.quantized):
        findings += check_skip_list(checkpoint, skip, stored.plain, code)
    findings += _check_tied(checkpoint, code)
    if ranks > 1:
        split = [one for one in compared.cuts if not (whole_experts and one.linear.fused == "experts")]
        findings += _check_ranks(split, ranks, code)
    return findings


def _quantizers(tensors: Mapping[str, Tensor]) -> list[str]:
    """The suffixes of a quantizer among the tensors of a module that has no plain weight."""
    weight = tensors.get("weight")
    if weight is not None and weight.dtype in FLOATS:
        return []
    return [suffix for suffix in tensors if suffix.startswith(_QUANTIZERS_SUFFIXES) and suffix not in BESIDE]


def _left_out(modules: Mapping[str, Sequence[str]], code: str) -> Iterator[Finding]:
    """Modules that are quantized in the files and not by the config."""
    if modules:
        bad = [f"{name} ({', '.join(suffixes)})" for name, suffixes in modules.items()]
        yield Finding.error(
            f"{code}-unexpected-tensors",
            f"{are(len(bad), 'linear')} quantized in the files, and the quantization config leaves "
            f"{'it' if len(bad) == 1 else 'them'} out, by a rule or because no target matches. First: {bad[0]}",
            named(bad),
            "correct the targets, rules and lists of the quantization config, or use the config.json of these files",
        )


def _check_tied(checkpoint: Checkpoint, code: str) -> Iterator[Finding]:
    """A quantized output layer where config.json ties it to the embedding."""
    sizes, head = read_sizes(checkpoint), lm_head_name(checkpoint).removesuffix(".weight")
    if sizes and sizes.tied and modules(checkpoint).get(head, {}).keys() - {"weight", "bias"}:
        yield Finding.warning(
            f"{code}-tied-lm-head",
            f"{head} is quantized, and config.json ties it to the embedding: vLLM leaves out its tensors and computes "
            "logits with the embedding",
            [head, "tie_word_embeddings"],
            'set "tie_word_embeddings" to false if the output layer has weights of its own',
        )


# --- the tensors of a linear ------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """A part for linears of one size: its shape, with None where any length will do."""

    sizes: tuple[int | None, ...]
    part: Part

    def __str__(self) -> str:
        return "[" + ", ".join("*" if size is None else str(size) for size in self.sizes) + "]"


class Cut(NamedTuple):
    """A linear, and what a rank's share of the axis that is split must be a multiple of."""

    linear: Linear
    word: int
    group: int


class _Problems:
    """Texts about tensors; what is wrong with several experts alike is one text, with their number."""

    def __init__(self) -> None:
        self.count = 0
        self._texts: dict[object, tuple[str, int]] = {}

    def add(self, linear: Linear, problem: object, text: str) -> None:
        """Note a text; `problem` is the same for experts whose tensors lack the same."""
        key = (linear.name, problem)
        first, count = self._texts.get(key, (text, 0))
        self._texts[key] = (first, count + 1)
        self.count += 1

    def __iter__(self) -> Iterator[str]:
        return (and_experts(text, count) for text, count in self._texts.values())


@dataclass
class _Comparison:
    """The tensors of linears against their schemes. What follows from a scheme and a size is computed once."""

    missing: _Problems = field(default_factory=_Problems)
    misshapen: _Problems = field(default_factory=_Problems)
    mistyped: _Problems = field(default_factory=_Problems)
    unexpected: _Problems = field(default_factory=_Problems)
    unpackable: _Problems = field(default_factory=_Problems)
    cuts: list[Cut] = field(default_factory=list)
    _sized: dict[tuple[int, int, int, int], tuple[dict[str, list[Wanted]], str]] = field(default_factory=dict)
    _multiples: dict[tuple[int, ...], tuple[int, int]] = field(default_factory=dict)

    def add(self, linear: Linear, scheme: Scheme, present: Mapping[str, Mapping[str, Tensor]], *, known: bool) -> None:
        """Compare one linear; `known` tells whether it can have no other tensors than those of its scheme."""
        key = (id(scheme), linear.n, linear.k, linear.experts)
        if key not in self._sized:
            self._sized[key] = _sized(scheme, linear)
        wanted, unpackable = self._sized[key]
        sized = not unpackable and linear.n > 0
        chosen: dict[int, Part] = {}
        for name in linear.names:
            tensors = present.get(name, {})
            found = 0
            for suffix, alternatives in wanted.items():
                tensor = tensors.get(suffix)
                if tensor is not None:
                    part = self._compare(tensor, suffix, alternatives, linear, sized)
                    chosen[id(part)] = part
                    found += 1
                elif not alternatives[0].part.optional:
                    self.missing.add(linear, suffix, f"{name}.{suffix}")
            if len(tensors) > found:
                for suffix in tensors:
                    if suffix in wanted or suffix in BESIDE:
                        continue
                    if known or suffix.startswith(_QUANTIZERS_SUFFIXES):
                        self.unexpected.add(linear, suffix, shown(tensors[suffix]))
        if unpackable:
            self.unpackable.add(linear, "", and_experts(f"{linear.name}: {unpackable}", len(linear.names)))
        elif scheme is not _PLAIN and scheme is not _PLAIN_STACK and linear.n:
            self.cuts.append(Cut(linear, *self._multiple(linear, scheme, list(chosen.values()))))

    def _compare(self, tensor: Tensor, suffix: str, alternatives: list[Wanted], linear: Linear, sized: bool) -> Part:
        """Note what is wrong with a tensor, its shape apart unless `sized`; the alternative it is stored in."""
        for want in alternatives:
            if want.sizes == tensor.shape and tensor.dtype in want.part.dtypes:
                return want.part
        parts = [want.part for want in alternatives]
        if sized:
            fitting = [part for part in parts if part.fits(tensor.shape, linear.n, linear.k, linear.experts)]
            if not fitting:
                text = f"{shown(tensor)}, expected {' or '.join(map(str, alternatives))}"
                self.misshapen.add(linear, (suffix, tensor.shape), text)
            parts = fitting or parts
        for part in parts:
            if tensor.dtype in part.dtypes:
                return part
        dtypes = dict.fromkeys(dtype for part in parts for dtype in part.dtypes)
        text = f"{tensor.name} {tensor.dtype}, expected {' or '.join(dtypes)}"
        self.mistyped.add(linear, (suffix, tensor.dtype), text)
        return parts[0]

    def _multiple(self, linear: Linear, scheme: Scheme, parts: list[Part]) -> tuple[int, int]:
        """What a rank's share of the split axis must be a multiple of: for words of codes, and for groups."""
        key = (id(scheme), linear.parallel == "row", linear.k, *map(id, parts))
        if key not in self._multiples:
            axis = "k" if linear.parallel == "row" else "n"
            every = {one for part in parts for one in part.shape if isinstance(one, Dim) and not one.free}
            dims = [one for one in every if one.axis in (axis, "nk")]
            words, groups = ([one for one in dims if scheme.is_group(one) is group] for group in (False, True))
            self._multiples[key] = (_along(words, linear), _along(groups, linear))
        return self._multiples[key]

    def findings(self, code: str, fix: str) -> Iterator[Finding]:
        """What is wrong, one finding of each kind."""
        if bad := list(self.missing):
            yield Finding.error(
                f"{code}-missing-tensors",
                f"{are(self.missing.count, 'tensor')} missing. vLLM does not report that and serves uninitialised "
                f"weights. First: {bad[0]}",
                named(bad),
                fix or "download the checkpoint again; if that does not help, quantize the model again",
            )
        if bad := list(self.misshapen):
            yield Finding.error(
                f"{code}-wrong-shape",
                f"{have(self.misshapen.count, 'tensor')} the wrong shape. First: {bad[0]}",
                named(bad),
                fix or "use the config.json that belongs to these files, or quantize the model again",
            )
        if bad := list(self.mistyped):
            yield Finding.error(
                f"{code}-wrong-dtype",
                f"{have(self.mistyped.count, 'tensor')} the wrong dtype. vLLM converts without a message. "
                f"First: {bad[0]}",
                named(bad),
                fix or "convert the tensors, or quantize the model again",
            )
        if bad := list(self.unexpected):
            yield Finding.error(
                f"{code}-unexpected-tensors",
                f"{are(self.unexpected.count, 'tensor')} not in the method's format. First: {bad[0]}",
                named(bad),
                fix or "serve the files with the method, and the variant of it, that they were quantized with",
            )
        if bad := list(self.unpackable):
            yield Finding.error(
                f"{code}-packing",
                f"{counted(self.unpackable.count, 'linear')} cannot be stored in whole words and groups. "
                f"First: {bad[0]}",
                named(bad),
                "use the config.json that belongs to these files, leave these linears unquantized, or quantize with a "
                "group size that divides K",
            )


def _sized(scheme: Scheme, linear: Linear) -> tuple[dict[str, list[Wanted]], str]:
    """The parts for linears of this size, and why no file can hold such a linear, "" when one can."""
    n, k = linear.n, linear.k
    wanted = {
        suffix: [Wanted(part.sizes(n, k, linear.experts), part) for part in scheme.alternatives(suffix)]
        for suffix in scheme.parts
    }
    # An optional part, and one with alternatives, need not be stored in the way that does not fit.
    certain = [parts[0].part for parts in wanted.values() if len(parts) == 1 and not parts[0].part.optional]
    problems = [
        f"{name} {size} is not a multiple of {one.multiple}"
        for name, axis, size in (("N", "n", n), ("K", "k", k), ("N x K", "nk", n * k))
        for one in {one: None for part in certain for one in part.shape if isinstance(one, Dim)}
        if one.axis == axis and one.size(n, k) is None
    ]
    return wanted, "; ".join(dict.fromkeys(problems))


# --- the ranks --------------------------------------------------------------------------------------------


def _along(dims: Sequence[Dim], linear: Linear) -> int:
    """What a share of the split axis must be a multiple of; a flattened weight is cut between its rows of K."""
    rows = linear.parallel == "column"
    return lcm(*(d.multiple // gcd(d.multiple, linear.k) if rows and d.axis == "nk" else d.multiple for d in dims))


def _check_ranks(cuts: Sequence[Cut], ranks: int, code: str) -> Iterator[Finding]:
    """Words of codes and groups that a rank's share would cut."""
    # What becomes of the groups of experts is their kernel's business: vLLM's MoeWNA16 makes smaller ones.
    groups = [(one.linear, one.group) for one in cuts if one.linear.fused != "experts"]
    sizes = sorted({group for _, group in groups if group > 1})
    yield from shard_findings(
        lambda n: _cut(groups, n),
        ranks,
        f"{code}-group-splits-ranks",
        f"{' or '.join(map(str, sizes))} values that share a scale must stay on one rank; where vLLM does not refuse "
        "the cut, it answers with wrong tokens",
    )
    words = [(one.linear, one.word) for one in cuts]
    yield from shard_findings(
        lambda n: _cut(words, n),
        ranks,
        f"{code}-word-splits-ranks",
        "codes that share a word must stay on one rank",
    )


def _cut(linears: Sequence[tuple[Linear, int]], ranks: int) -> list[str]:
    split = [one for one in linears if one[1] > 1 and one[0].max_ranks != 1]
    problems = (misaligned(linear, linear.parallel, ranks, multiple) for linear, multiple in split)
    return [problem for problem in problems if problem] if ranks > 1 else []


def shard_findings(
    bad_for: Callable[[int], list[str]], ranks: int, code: str, why: str, fix: str = ""
) -> Iterator[Finding]:
    """The finding about linears that a number of ranks cuts badly, with the smaller one that does not.

    Args:
        bad_for: what is wrong with so many ranks, one line for each linear.
        why: what the multiple is: "a group of 128 must not straddle ranks".
        fix: replaces the proposed smaller number.
    """
    bad = bad_for(ranks)
    if not bad:
        return
    fits = [n for n in range(ranks - 1, 0, -1) if ranks % n == 0 and not bad_for(n)]
    if not fix and fits:
        fix = f"set scaling_config.num_workers (tensor parallel size) to {fits[0]}, which works"
    elif not fix:
        smaller = "no smaller tensor parallel size works either; " if ranks > 1 else ""
        fix = f"{smaller}quantize again with a fitting size, or leave these layers unquantized"
    split = f" over {ranks} ranks" if ranks > 1 else ""
    message = f"{counted(len(bad), 'layer')} cannot be served{split}: {why}. First: {bad[0]}"
    yield Finding.error(code, message, named(bad), fix)


def misaligned(linear: Linear, axis: str, ranks: int, multiple: int) -> str:
    """What is wrong with a rank's share of K (`axis` is ``row``) or of N (``column``); "" when it is a multiple."""
    share = shard_k(linear, ranks) if axis == "row" else shard_n(linear, ranks)
    if share % multiple == 0:
        return ""
    name, size = ("K", linear.k) if axis == "row" else ("N", linear.n)
    over = ""
    if linear.parallel == axis and ranks > 1:
        parts = ranks if axis == "row" else min(ranks, linear.max_ranks or ranks)
        exact = str(size // parts) if size % parts == 0 else f"{size / parts:.1f}"
        over = f"/{parts} = {exact}"
    text = f"{linear.name}: {name} {size}{over} is not a multiple of {multiple}"
    return and_experts(text, len(linear.names))
