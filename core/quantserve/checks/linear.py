"""Checks of quantized linears that every method needs: a plugin gives shapes, these give findings.

A finding's code is the plugin's prefix and what went wrong (``awq-missing-tensors``); see
docs/findings.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from quantserve.checks.fused import check_partly_quantized, check_skip_list, fuses, is_known
from quantserve.checks.skipped import SkipList
from quantserve.checks.wording import are, counted, have, named, shown
from quantserve.finding import Finding
from quantserve.model.layers import Linear, engine_layers, linears, modules, shard_k, shard_n

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint, Tensor

FLOATS = ("F16", "BF16", "F32")


class Expected(NamedTuple):
    """What a tensor must look like.

    ``shape`` has None where any size will do; ``dtypes`` are safetensors names.
    """

    shape: tuple[int | None, ...]
    dtypes: tuple[str, ...]
    optional: bool = False


Layout = Callable[[Linear], Mapping[str, Expected]]


def quantized_linears(checkpoint: Checkpoint, layout: Layout) -> tuple[list[Linear], list[Linear]]:
    """Split the model's linears into those stored quantized and those stored as a plain ``.weight``.

    A linear counts as unquantized when its ``.weight`` is there and no other tensor of its layout is. Where the
    layout's own packed tensor is called ``weight`` (FP8, INT8, NF4), its dtype must also be a floating-point one that
    the layout does not name.
    """
    present = modules(checkpoint)
    quantized: list[Linear] = []
    dense: list[Linear] = []
    for linear in linears(checkpoint):
        (dense if _is_dense(present.get(linear.name, {}), layout(linear)) else quantized).append(linear)
    return quantized, dense


def _is_dense(tensors: Mapping[str, Tensor], layout: Mapping[str, Expected]) -> bool:
    weight, packed = tensors.get("weight"), layout.get("weight")
    if weight is None or (layout.keys() & tensors.keys()) - {"weight"} - _BESIDE:
        return False
    return packed is None or (weight.dtype in FLOATS and weight.dtype not in packed.dtypes)


def check_linears(
    checkpoint: Checkpoint,
    layout: Layout,
    *,
    code: str,
    skipped: SkipList | Iterable[str] | None = None,
    fix: str = "",
) -> list[Finding]:
    """Compare every decoder linear of the files with the layout of a method.

    Args:
        layout: gives each linear's tensors: suffix (``qweight``, ``weight.absmax``) -> ``Expected``.
        code: prefix of the codes: ``-missing-tensors``, ``-wrong-shape``, ``-wrong-dtype``,
            ``-unexpected-tensors``, ``-partly-quantized``, ``-skip-list``.
        skipped: ``SkipList`` of ``modules_to_not_convert`` or what the method calls it. Files and list have to
            agree, as in vLLM. None for a method that has no such list.
        fix: what to do about a file that is not in the layout.

    Missing tensors are errors because vLLM does not notice them: it serves whatever the parameter's
    memory held. A bias is not the method's business; the core checks it against config.json.

    Of families that core does not know, only the linears are compared that the files hold unquantized. There a
    tensor is unexpected when its suffix is one of a quantizer, and what depends on how vLLM builds the model warns.
    """
    present = modules(checkpoint)
    known = is_known(checkpoint)
    missing: list[str] = []
    misshapen: list[str] = []
    mistyped: list[str] = []
    unexpected: list[str] = []
    quantized, dense = quantized_linears(checkpoint, layout)
    plain = {linear.name for linear in dense}
    for linear in (*quantized, *dense):
        tensors = present.get(linear.name, {})
        wanted = {"weight": Expected((linear.n, linear.k), FLOATS)} if linear.name in plain else layout(linear)
        for suffix, what in wanted.items():
            if suffix in tensors:
                _compare(tensors[suffix], what, misshapen, mistyped)
            elif not what.optional:
                missing.append(f"{linear.name}.{suffix}")
        for suffix in tensors.keys() - wanted.keys() - _BESIDE:
            if known or suffix.startswith(_QUANTIZERS_SUFFIXES):
                unexpected.append(shown(tensors[suffix]))
    if not checkpoint.tensors_complete:
        missing = []  # a file could not be read, which is the one thing to say
    findings = list(_tensor_findings(code, fix, missing, misshapen, mistyped, unexpected))
    findings += check_partly_quantized(plain, engine_layers(checkpoint), code, lambda layer: fuses(checkpoint, layer))
    if skipped is not None:
        skip = skipped if isinstance(skipped, SkipList) else SkipList(skipped)
        findings += check_skip_list(checkpoint, skip, dense, code)
    return findings


# vLLM reads these beside a quantized attention; they scale the KV cache, not the weights.
CACHE_SCALES = (
    "k_scale", "v_scale", "kv_scale", "q_scale", "output_scale", "q_zero_point", "k_zero_point", "v_zero_point",
)  # fmt: skip
_BESIDE = {"bias", *CACHE_SCALES}

# What quantizers call their tensors; models of other families have parameters of other names in their linears.
_QUANTIZERS_SUFFIXES = (
    "qweight", "qzeros", "scales", "g_idx", "lookup_table", "weight_scale", "weight_packed", "weight_zero_point",
    "weight_shape", "weight_g_idx", "weight_global_scale", "input_scale", "input_global_scale", "weight.", "W_q", "SCB",
    "absmax", "quant_map", "nested_absmax",
)  # fmt: skip


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
    """Check that each linear's share of one tensor-parallel rank is a multiple of what a method needs.

    Args:
        quantized: the linears to check.
        ranks: tensor parallel size.
        code: the whole code of the finding.
        why: what the multiple is: "a group of 128 must not straddle ranks".
        k_multiple, n_multiple: required divisors of K and N per rank.
        fused_n_multiple: required divisor of N per rank summed over a fused module.
        fix: replaces the proposed smaller tensor parallel size.
    """
    every = list(quantized)
    bad = _misaligned(every, ranks, k_multiple, n_multiple, fused_n_multiple)
    if not bad:
        return []
    fits = [
        n
        for n in range(1, ranks)
        if ranks % n == 0 and not _misaligned(every, n, k_multiple, n_multiple, fused_n_multiple)
    ]
    if not fix and fits:
        fix = f"set scaling_config.num_workers (tensor parallel size) to {fits[-1]}, which works"
    elif not fix:
        smaller = "no smaller tensor parallel size works either; " if ranks > 1 else ""
        fix = f"{smaller}quantize again with a fitting size, or leave these layers unquantized"
    split = f" over {ranks} ranks" if ranks > 1 else ""
    message = f"{counted(len(bad), 'layer')} cannot be served{split}: {why}. First: {bad[0]}"
    return [Finding.error(code, message, named(bad), fix)]


def _misaligned(every: list[Linear], ranks: int, k_multiple: int, n_multiple: int, fused_n_multiple: int) -> list[str]:
    bad: list[str] = []
    fused: dict[str, int] = {}
    for linear in every:
        k, n = shard_k(linear, ranks), shard_n(linear, ranks)
        if k % k_multiple:
            bad.append(f"{linear.name}: K {linear.k}{_over(linear, 'row', ranks)} is not a multiple of {k_multiple}")
        if n % n_multiple:
            bad.append(f"{linear.name}: N {linear.n}{_over(linear, 'column', ranks)} is not a multiple of {n_multiple}")
        # Experts are separate matrices of one module; only gate and up lie side by side.
        group = linear.name if linear.fused == "experts" else linear.group
        fused[group] = fused.get(group, 0) + n
    if fused_n_multiple > 1:
        bad += [
            f"{group}: N {n} per rank is not a multiple of {fused_n_multiple}"
            for group, n in fused.items()
            if n % fused_n_multiple
        ]
    return bad


def _over(linear: Linear, split: str, ranks: int) -> str:
    if linear.parallel != split or ranks == 1:
        return ""
    size = linear.k if split == "row" else linear.n
    parts = ranks if split == "row" else min(ranks, linear.max_ranks or ranks)
    exact = str(size // parts) if size % parts == 0 else f"{size / parts:.1f}"
    return f"/{parts} = {exact}"


def _compare(tensor: Tensor, what: Expected, misshapen: list[str], mistyped: list[str]) -> None:
    fits = len(tensor.shape) == len(what.shape) and all(
        want is None or want == size for want, size in zip(what.shape, tensor.shape, strict=True)
    )
    if not fits:
        shape = ", ".join("*" if size is None else str(size) for size in what.shape)
        misshapen.append(f"{shown(tensor)}, expected [{shape}]")
    if tensor.dtype not in what.dtypes:
        mistyped.append(f"{tensor.name} {tensor.dtype}, expected {' or '.join(what.dtypes)}")


def _tensor_findings(
    code: str, fix: str, missing: list[str], misshapen: list[str], mistyped: list[str], unexpected: list[str]
) -> Iterable[Finding]:
    if missing:
        yield Finding.error(
            f"{code}-missing-tensors",
            f"{are(len(missing), 'tensor')} missing. vLLM does not report that and serves "
            f"uninitialised weights. First: {missing[0]}",
            named(missing),
            fix or "download the checkpoint again; if that does not help, quantize the model again",
        )
    if misshapen:
        yield Finding.error(
            f"{code}-wrong-shape",
            f"{have(len(misshapen), 'tensor')} the wrong shape. First: {misshapen[0]}",
            named(misshapen),
            fix or "use the config.json that belongs to these files, or quantize the model again",
        )
    if mistyped:
        yield Finding.error(
            f"{code}-wrong-dtype",
            f"{have(len(mistyped), 'tensor')} the wrong dtype. vLLM converts without a message. First: {mistyped[0]}",
            named(mistyped),
            fix or "convert the tensors, or quantize the model again",
        )
    if unexpected:
        yield Finding.error(
            f"{code}-unexpected-tensors",
            f"{are(len(unexpected), 'tensor')} not in the method's format. First: {unexpected[0]}",
            named(unexpected),
            fix or "serve the files with the method, and the variant of it, that they were quantized with",
        )
