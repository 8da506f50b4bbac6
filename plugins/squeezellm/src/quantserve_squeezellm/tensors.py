"""What the scheme of SqueezeLLM's tensors does not tell: mixed widths and the sparse parts."""

from __future__ import annotations

from collections.abc import Mapping

from quantserve.api import Checkpoint, Finding, Linear, Scheme, Tensor, modules, once, quantized_linears
from quantserve_squeezellm.config import NAMES, Settings, config_findings, read_settings
from quantserve_squeezellm.format import SPARSE, scheme

OFFENDERS = 8


@once
def stored_scheme(checkpoint: Checkpoint) -> Scheme | None:
    """The scheme of the quantized linears; None where the settings or the tensors are not SqueezeLLM's."""
    settings = read_settings(checkpoint)
    wrong = any(finding.code == "squeezellm-bits" for finding in config_findings(settings))
    if settings.method not in NAMES or wrong or settings.bits is None or not has_tables(checkpoint):
        return None
    return scheme(settings.bits)


def has_tables(checkpoint: Checkpoint) -> bool:
    """Whether any linear has a part of a codebook."""
    return any(name.endswith((".qweight", ".lookup_table")) for name in checkpoint.tensors)


def tensor_findings(checkpoint: Checkpoint, settings: Settings) -> list[Finding]:
    """What is wrong with the tensors beyond what their scheme tells."""
    stored = stored_scheme(checkpoint)
    quantized, _ = quantized_linears(checkpoint, lambda linear: stored)
    return [
        *mixed_width_findings(checkpoint, settings),
        *table_dtype_findings(checkpoint),
        *sparse_findings(checkpoint, settings, quantized),
    ]


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
    present = modules(checkpoint)
    bad: list[str] = []
    for linear in (each for one in quantized for each in one.each()):
        tensors_of = present.get(linear.name, {})
        for names in SPARSE.values():
            tensors = {name: tensors_of[name] for name in names if name in tensors_of}
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
        pointers = tensors["rows"].shape
        if cols != vals:
            return [f"{linear.name}: cols {list(cols)} and vals {list(vals)} differ in length"]
        if pointers != (linear.n + 1,):
            return [f"{linear.name}.rows {list(pointers)}, expected {[linear.n + 1]}"]
        return []
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
