"""Checks of quantized linears that every method needs: a plugin gives shapes, these give findings.

A finding's code is the plugin's prefix and what went wrong (``awq-missing-tensors``); see
docs/findings.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from quantserve.finding import Finding
from quantserve.layers import Linear, linears, modules, shard_k, shard_n

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint, Tensor

FLOATS = ("F16", "BF16", "F32")
NAMED = 8


class Expected(NamedTuple):
    """What a tensor must look like.

    ``shape`` has None where any size will do; ``dtypes`` are safetensors names.
    """

    shape: tuple[int | None, ...]
    dtypes: tuple[str, ...]
    optional: bool = False


Layout = Callable[[Linear], Mapping[str, Expected]]


def named(offenders: Sequence[str]) -> tuple[str, ...]:
    """The first offenders, and how many more there are."""
    more = len(offenders) - NAMED
    return tuple(offenders[:NAMED]) + ((f"and {more} more",) if more > 0 else ())


def shown(tensor: Tensor) -> str:
    """Name and shape of a tensor in at most some 250 characters, whatever the file says."""
    shape = ", ".join(str(size) for size in tensor.shape[:8]) + (", ..." if len(tensor.shape) > 8 else "")
    return f"{tensor.name if len(tensor.name) <= 160 else tensor.name[:157] + '...'} [{shape}]"


def counted(count: int, singular: str) -> str:
    """``1 tensor``, ``3 tensors``."""
    return f"{count} {singular}" if count == 1 else f"{count} {singular}s"


def quantized_linears(checkpoint: Checkpoint, layout: Layout) -> tuple[list[Linear], list[Linear]]:
    """Split the model's linears into those stored quantized and those stored as a plain ``.weight``.

    A linear counts as quantized when the file has any tensor of its layout, or has nothing of it.
    """
    present = modules(checkpoint)
    quantized: list[Linear] = []
    dense: list[Linear] = []
    for linear in linears(checkpoint):
        suffixes = present.get(linear.name, {})
        plain = "weight" in suffixes and "weight" not in layout(linear)
        (dense if plain and not layout(linear).keys() & suffixes.keys() else quantized).append(linear)
    return quantized, dense


def check_linears(
    checkpoint: Checkpoint,
    layout: Layout,
    *,
    code: str,
    skipped: Iterable[str] = (),
    fix: str = "",
) -> list[Finding]:
    """Compare every decoder linear of the files with the layout of a method.

    Args:
        layout: gives each linear's tensors: suffix (``qweight``) -> ``Expected``.
        code: prefix of the codes: ``-missing-tensors``, ``-wrong-shape``, ``-wrong-dtype``,
            ``-unexpected-tensors``, ``-partly-quantized``, ``-skip-list``.
        skipped: ``modules_to_not_convert``: substrings of the paths of linears stored as ``.weight``.
            When given, files and list have to agree, as in vLLM; when empty, vLLM takes whatever the
            safetensors headers say, and so does this.
        fix: what to do about a file that is not in the layout.

    Missing tensors are errors because vLLM does not notice them: it serves whatever the parameter's
    memory held. A bias is not the method's business; the core checks it against config.json.
    """
    present = modules(checkpoint)
    missing: list[str] = []
    misshapen: list[str] = []
    mistyped: list[str] = []
    unexpected: list[str] = []
    quantized, dense = quantized_linears(checkpoint, layout)
    for linear in quantized:
        suffixes = present.get(linear.name, {})
        wanted = layout(linear)
        required = {suffix for suffix, what in wanted.items() if not what.optional}
        missing += [f"{linear.name}.{suffix}" for suffix in wanted if suffix in required - suffixes.keys()]
        for suffix, tensor in suffixes.items():
            what = wanted.get(suffix)
            if what is None:
                if suffix not in ("bias", *CACHE_SCALES):
                    unexpected.append(shown(tensor))
                continue
            _compare(tensor, what, misshapen, mistyped)
    for linear in dense:
        _compare(present[linear.name]["weight"], Expected((linear.n, linear.k), FLOATS), misshapen, mistyped)
    if not checkpoint.tensors_complete:
        missing = []  # a file could not be read, which is the one thing to say
    findings = list(_tensor_findings(code, fix, missing, misshapen, mistyped, unexpected))
    findings += check_fused_groups([linear.name for linear in dense], linears(checkpoint), code=code)
    findings += _check_skip_list(code, tuple(skipped), quantized, dense)
    return findings


# vLLM reads these beside a quantized attention; they scale the KV cache, not the weights.
CACHE_SCALES = ("k_scale", "v_scale", "kv_scale", "q_scale", "output_scale")


def check_fused_groups(dense: Iterable[str], all_linears: Iterable[Linear], *, code: str) -> list[Finding]:
    """Find fused modules (q/k/v, gate/up, experts) of which only a part is quantized.

    Args:
        dense: names of the linears stored unquantized.
        all_linears: every linear of the model.
        code: prefix of the code ``-partly-quantized``.
    """
    plain = set(dense)
    groups: dict[str, list[Linear]] = {}
    for linear in all_linears:
        if linear.fused:
            groups.setdefault(linear.group, []).append(linear)
    split: list[str] = []
    for group, members in groups.items():
        unquantized = [member.name.rpartition(".")[2] for member in members if member.name in plain]
        if 0 < len(unquantized) < len(members):
            split.append(
                f"{group}: {', '.join(unquantized[:4])} unquantized, the other {len(members) - len(unquantized)} not"
            )
    if not split:
        return []
    return [
        Finding.error(
            f"{code}-partly-quantized",
            f"{counted(len(split), 'fused module')} quantized in part; vLLM builds each as one layer of one kind. "
            f"First: {split[0]}",
            named(split),
            "quantize the whole group, or leave all its parts unquantized and list them in modules_to_not_convert",
        )
    ]


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
            f"{counted(len(missing), 'tensor')} missing, and vLLM would not notice: it serves uninitialised weights. "
            f"First: {missing[0]}",
            named(missing),
            fix or "download the checkpoint again; if they were never there, quantize the model again",
        )
    if misshapen:
        yield Finding.error(
            f"{code}-wrong-shape",
            f"{counted(len(misshapen), 'tensor')} of the wrong shape. First: {misshapen[0]}",
            named(misshapen),
            fix or "use the config.json that belongs to these files, or quantize the model again",
        )
    if mistyped:
        yield Finding.error(
            f"{code}-wrong-dtype",
            f"{counted(len(mistyped), 'tensor')} of the wrong dtype, which vLLM casts silently. First: {mistyped[0]}",
            named(mistyped),
            fix or "convert the tensors, or quantize the model again",
        )
    if unexpected:
        yield Finding.error(
            f"{code}-unexpected-tensors",
            f"{counted(len(unexpected), 'tensor')} the method does not know. First: {unexpected[0]}",
            named(unexpected),
            fix or "the file is of another method or variant: serve it with the method that wrote it",
        )


def _check_skip_list(
    code: str, skipped: tuple[str, ...], quantized: list[Linear], dense: list[Linear]
) -> list[Finding]:
    if not skipped:
        return []
    unlisted = [linear.name for linear in dense if not any(part in linear.name for part in skipped)]
    listed = [linear.name for linear in quantized if any(part in linear.name for part in skipped)]
    findings: list[Finding] = []
    if unlisted:
        findings.append(
            Finding.error(
                f"{code}-skip-list",
                f"{counted(len(unlisted), 'linear')} stored unquantized but not in modules_to_not_convert. "
                f"First: {unlisted[0]}",
                named(unlisted),
                "add them to modules_to_not_convert of the quantization config, or empty it: vLLM then reads headers",
            )
        )
    if listed:
        findings.append(
            Finding.error(
                f"{code}-skip-list",
                f"{counted(len(listed), 'linear')} stored quantized but named by modules_to_not_convert. "
                f"First: {listed[0]}",
                named(listed),
                "remove them from modules_to_not_convert in the quantization config",
            )
        )
    return findings
