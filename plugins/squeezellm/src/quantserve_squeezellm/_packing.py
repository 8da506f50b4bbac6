"""The SqueezeLLM tensors in plain torch: what converter, quantizer, engine and tests share beside `format`.

One linear layer with N = out_features and K = in_features, b bits per weight:

    qweight          int32   [K*b/32, N]  codes, packed along K
    lookup_table     float32 [N, 2**b]    one codebook per output channel
    rows, cols, vals int32 [N+1], int32 [nnz], float32 [nnz]     optional CSR matrix [N, K], added to the dense part
    full_rows, full_row_indices   float32 [K, X], int32 [X]      optional: column j is added to channel indices[j]

`W = lookup_table[n, code[n, k]] + CSR + full rows`; `startrows` only balances GPU threads and carries no weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantserve_kernels import unpack_stream
from quantserve_squeezellm.format import BITS, SPARSE

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DENSE = ("qweight", "lookup_table")
CSR, FULL = SPARSE.values()
SUFFIXES = (*DENSE, *CSR, *FULL, "startrows")


def k_multiple(bits: int) -> int:
    """How many consecutive input features end on a word border: K (per rank) must be a multiple of it."""
    return 8 if bits == 4 else 32


def bits_of(lookup_table_columns: int) -> int | None:
    """The width whose codebook has this many entries, or None when there is none."""
    return {2**bits: bits for bits in BITS}.get(lookup_table_columns)


def to_csr(matrix: Tensor) -> dict[str, Tensor]:
    """The nonzeros of a matrix [n, k] as `rows` [n+1], `cols` [nnz] (int32) and `vals` [nnz] (float32)."""
    n_index, k_index = matrix.nonzero(as_tuple=True)
    return csr(n_index, k_index, matrix[n_index, k_index], matrix.shape[0])


def csr(n_index: Tensor, k_index: Tensor, values: Tensor, n: int) -> dict[str, Tensor]:
    """Entries [nnz] in rising order of n as `rows` [n+1], `cols` [nnz] (int32) and `vals` [nnz] (float32)."""
    rows = torch.zeros(n + 1, dtype=torch.int64, device=n_index.device)
    rows[1:] = torch.bincount(n_index, minlength=n).cumsum(0)
    return {"rows": rows.to(torch.int32), "cols": k_index.to(torch.int32), "vals": values.to(torch.float32)}


def csr_problem(rows: Tensor, cols: Tensor, vals: Tensor, n: int, k: int) -> str | None:
    """Why these tensors are not a CSR matrix [n, k], in one sentence with the numbers; None when they are one."""
    if rows.shape != (n + 1,):
        return f"rows has shape {list(rows.shape)}, expected [{n + 1}] (out_features + 1)"
    if cols.ndim != 1 or cols.shape != vals.shape:
        return f"cols has shape {list(cols.shape)} and vals {list(vals.shape)}; they must be equal and one-dimensional"
    nnz = cols.numel()
    if int(rows[0]) != 0 or int(rows[-1]) != nnz:
        return f"rows runs from {int(rows[0])} to {int(rows[-1])}, expected 0 to nnz = {nnz}"
    if bool((rows.diff() < 0).any()):
        return "rows decreases somewhere; row pointers must not"
    if nnz and not (int(cols.min()) >= 0 and int(cols.max()) < k):
        return f"cols holds {int(cols.min())}..{int(cols.max())}, expected 0..{k - 1} (in_features {k})"
    return None


def full_rows_problem(full_rows: Tensor, indices: Tensor, n: int, k: int) -> str | None:
    """Why these tensors are not full rows of a matrix [n, k]; None when they are."""
    if full_rows.ndim != 2 or indices.ndim != 1 or full_rows.shape != (k, indices.numel()):
        return (
            f"full_rows has shape {list(full_rows.shape)} and full_row_indices {list(indices.shape)}, "
            f"expected [{k}, X] (in_features first) and [X]"
        )
    if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < n):
        return f"full_row_indices holds {int(indices.min())}..{int(indices.max())}, expected 0..{n - 1}"
    return None


def sparse_problem(tensors: Mapping[str, Tensor], n: int, k: int) -> str | None:
    """Why the sparse sets among these tensors, each complete, do not belong to a linear [n, k]; None when they do."""
    problem = None
    if "rows" in tensors:
        problem = csr_problem(tensors["rows"], tensors["cols"], tensors["vals"], n, k)
    if "full_rows" in tensors and not problem:
        problem = full_rows_problem(tensors["full_rows"], tensors["full_row_indices"], n, k)
    return problem


def checked_coordinates(tensors: Mapping[str, Tensor], n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`coordinates` of tensors from a file; ValueError where they do not belong to a linear [n, k]."""
    if problem := sparse_problem(tensors, n, k):
        raise ValueError(problem)
    return coordinates(tensors)


def coordinates(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The optional parts of one layer as entries: output channels and input features (int64), values (float32).

    Full rows lose their zeros, so the all-zero placeholder some packers write vanishes. Positions may repeat; they add.
    """
    none = torch.empty(0, dtype=torch.int64, device=tensors["qweight"].device if "qweight" in tensors else "cpu")
    n_parts, k_parts, v_parts = [none], [none], [none.float()]
    if "rows" in tensors:
        rows = tensors["rows"].to(torch.int64)
        n_parts.append(torch.repeat_interleave(torch.arange(rows.numel() - 1, device=rows.device), rows.diff()))
        k_parts.append(tensors["cols"].to(torch.int64))
        v_parts.append(tensors["vals"].to(torch.float32))
    if "full_rows" in tensors:
        full = tensors["full_rows"].to(torch.float32)
        k_index, j = full.nonzero(as_tuple=True)
        n_parts.append(tensors["full_row_indices"].to(torch.int64)[j])
        k_parts.append(k_index)
        v_parts.append(full[k_index, j])
    return torch.cat(n_parts), torch.cat(k_parts), torch.cat(v_parts)


def dequantize(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight [n, k] of one layer, from its tensors by suffix (`qweight`, `lookup_table`, ...).

    Raises:
        ValueError: the codebook has no known size.
    """
    table = tensors["lookup_table"].to(dtype)
    bits = bits_of(table.shape[1])
    if bits is None:
        raise ValueError(f"lookup_table has {table.shape[1]} columns; 8 (3-bit) and 16 (4-bit) are known")
    weight = torch.gather(table, 1, unpack_stream(tensors["qweight"], bits).to(torch.int64))
    n_index, k_index, values = coordinates(tensors)
    return weight.index_put_((n_index, k_index), values.to(dtype), accumulate=True)


def quantization_config(bits: int, sparse: Mapping[str, Mapping[str, int]]) -> dict[str, object]:
    """What config.json says about the checkpoint; `sparse` maps a module to its `nnz` and number of `full_rows`."""
    config: dict[str, object] = {"quant_method": "squeezellm", "wbits": bits}
    return {**config, "sparse": sparse} if sparse else config


def projection_shapes(config: Mapping[str, object]) -> dict[str, tuple[int, int]]:
    """(n, k) of the seven decoder projections, from a Llama-like config.json; empty when it lacks the numbers."""

    def number(key: str) -> int | None:
        value = config.get(key)
        return value if isinstance(value, int) else None

    hidden, inner, heads = number("hidden_size"), number("intermediate_size"), number("num_attention_heads")
    if not hidden or not inner or not heads:
        return {}
    head = number("head_dim") or hidden // heads
    q, kv = heads * head, (number("num_key_value_heads") or heads) * head
    return {
        "q_proj": (q, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, q),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
