"""The SqueezeLLM tensors of a checkpoint against its settings and the tensor-parallel size."""

from __future__ import annotations

from collections.abc import Mapping

from quantserve.api import (
    Checkpoint,
    Expected,
    Finding,
    Linear,
    SkipList,
    Tensor,
    check_linears,
    check_shards,
    quantized_linears,
)
from quantserve_squeezellm.config import Settings

OFFENDERS = 8
SETS = (("rows", "cols", "vals"), ("full_rows", "full_row_indices"))
FLOATS = ("F32", "F16", "BF16")


def tensor_findings(checkpoint: Checkpoint, settings: Settings, ranks: int) -> list[Finding]:
    """Compare the tensors of every linear with the format, and with what one rank can take."""
    bits = settings.bits
    if bits is None or not any(name.endswith((".qweight", ".lookup_table")) for name in checkpoint.tensors):
        return []

    def layout(linear: Linear) -> Mapping[str, Expected]:
        return {
            "qweight": Expected((linear.k * bits // 32, linear.n), ("I32",)),
            "lookup_table": Expected((linear.n, 2**bits), FLOATS),
            "rows": Expected((linear.n + 1,), ("I32",), optional=True),
            "cols": Expected((None,), ("I32",), optional=True),
            "vals": Expected((None,), FLOATS, optional=True),
            "startrows": Expected((None,), ("I32",), optional=True),
            "full_rows": Expected((linear.k, None), FLOATS, optional=True),
            "full_row_indices": Expected((None,), ("I32",), optional=True),
        }

    findings = mixed_width_findings(checkpoint, settings)
    skipped = SkipList(settings.values.get("modules_to_not_convert"), headers="also")
    findings += check_linears(checkpoint, layout, code="squeezellm", skipped=skipped)
    quantized, _ = quantized_linears(checkpoint, layout)
    findings += expert_findings(quantized)
    findings += table_dtype_findings(checkpoint)
    findings += sparse_findings(checkpoint, settings, quantized)
    findings += packing_findings(quantized)
    if not any(finding.code == "squeezellm-packing" for finding in findings):
        multiple = 8 if bits == 4 else 32
        findings += check_shards(
            quantized,
            ranks,
            code="squeezellm-word-splits-ranks",
            why=f"{multiple} codes of {bits} bits along K must stay together in their words",
            k_multiple=multiple,
        )
    return findings


def mixed_width_findings(checkpoint: Checkpoint, settings: Settings) -> list[Finding]:
    """vLLM builds every linear of a model with one width."""
    if len(settings.table_bits) < 2:
        return []
    odd = [
        f"{name} {list(tensor.shape)}"
        for name, tensor in checkpoint.tensors.items()
        if name.endswith(".lookup_table") and tensor.shape[-1:] != (2 ** (settings.bits or 0),)
    ]
    counts = ", ".join(f"{count} linears of {bits} bits" for bits, count in sorted(settings.table_bits.items()))
    return [
        Finding.error(
            "squeezellm-mixed-widths",
            f"the checkpoint mixes {counts}; one model has one width. First: {odd[0]}",
            odd[:OFFENDERS],
            "quantize all linears with the same width",
        )
    ]


def expert_findings(quantized: list[Linear]) -> list[Finding]:
    """Our vLLM method serves linear layers, not fused experts."""
    experts = [linear.name for linear in quantized if linear.fused == "experts"]
    if not experts:
        return []
    return [
        Finding.error(
            "squeezellm-experts",
            f"{len(experts)} quantized linears are experts of a mixture, which this plugin does not serve",
            experts[:OFFENDERS],
            "serve this model with another method",
        )
    ]


def table_dtype_findings(checkpoint: Checkpoint) -> list[Finding]:
    """A lookup table in bfloat16 has lost mantissa bits before it got here."""
    narrow = [n for n, tensor in checkpoint.tensors.items() if n.endswith(".lookup_table") and tensor.dtype == "BF16"]
    if not narrow:
        return []
    return [
        Finding.warning(
            "squeezellm-table-bfloat16",
            f"{len(narrow)} lookup tables are stored in bfloat16: the centroids have 8 significant bits left",
            narrow[:OFFENDERS],
            "convert the original checkpoint again, keeping float32 tables",
        )
    ]


def sparse_findings(checkpoint: Checkpoint, settings: Settings, quantized: list[Linear]) -> list[Finding]:
    """The sparse parts must be complete, agree in length, and be there where the config promises them."""
    declared = settings.values.get("sparse")
    bad: list[str] = []
    for linear in quantized:
        for names in SETS:
            present = {name: checkpoint.tensors.get(f"{linear.name}.{name}") for name in names}
            tensors = {name: tensor for name, tensor in present.items() if tensor is not None}
            missing = [name for name in names if name not in tensors]
            if tensors and missing:
                bad.append(f"{linear.name}: has {', '.join(tensors)} without {', '.join(missing)}")
            elif tensors:
                bad += length_problems(linear, tensors)
        bad += count_problems(checkpoint, linear, declared.get(linear.name) if isinstance(declared, Mapping) else None)
    if not bad:
        return []
    return [
        Finding.error(
            "squeezellm-sparse",
            f"{len(bad)} sparse parts are incomplete or inconsistent; without them the model answers differently. "
            f"First: {bad[0]}",
            bad[:OFFENDERS],
            "convert the original checkpoint again",
        )
    ]


def length_problems(linear: Linear, tensors: Mapping[str, Tensor]) -> list[str]:
    """Tensors of one set whose lengths differ."""
    if "cols" in tensors:
        cols, vals = tensors["cols"].shape, tensors["vals"].shape
        return [] if cols == vals else [f"{linear.name}: cols {list(cols)} and vals {list(vals)} differ in length"]
    rows, indices = tensors["full_rows"].shape, tensors["full_row_indices"].shape
    if len(rows) == 2 and indices == (rows[1],):
        return []
    return [f"{linear.name}: full_rows {list(rows)} needs as many full_row_indices as columns, found {list(indices)}"]


def count_problems(checkpoint: Checkpoint, linear: Linear, declared: object) -> list[str]:
    """Counts that config.json (``sparse``) or the original file (``sparse_threshold.*``) gives against the tensors."""
    cols = checkpoint.tensors.get(f"{linear.name}.cols")
    full = checkpoint.tensors.get(f"{linear.name}.full_rows")
    nnz = cols.shape[0] if cols is not None and cols.shape else 0
    columns = full.shape[1] if full is not None and len(full.shape) == 2 else 0
    problems = []
    threshold = checkpoint.other.get(f"sparse_threshold.{linear.name}")
    if isinstance(threshold, int) and threshold != nnz:
        problems.append(f"{linear.name}: sparse_threshold says {threshold} nonzeros, cols has {nnz}")
    if isinstance(declared, Mapping):
        for key, found in (("nnz", nnz), ("full_rows", columns)):
            if isinstance(declared.get(key), int) and declared[key] != found:
                problems.append(f"{linear.name}: config.json says {key} {declared[key]}, the tensors have {found}")
    return problems


def packing_findings(quantized: list[Linear]) -> list[Finding]:
    """Shapes that no SqueezeLLM file can hold."""
    bad = [f"{linear.name}: K {linear.k} is not a multiple of 32" for linear in quantized if linear.k % 32]
    if not bad:
        return []
    return [
        Finding.error(
            "squeezellm-packing",
            f"{len(bad)} linears cannot be packed in runs of 32 codes along K. First: {bad[0]}",
            bad[:OFFENDERS],
            "leave these linears unquantized, or use the config.json that belongs to these files",
        )
    ]
