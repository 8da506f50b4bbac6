"""Quantize a Llama-like checkpoint to SqueezeLLM by plain k-means, one codebook per output channel."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from quantserve.api import quantizable
from quantserve.checkpoint import open_checkpoint
from quantserve.errors import CheckpointError, UsageError
from quantserve_squeezellm._files import (
    Progress,
    SafetensorsFolder,
    ShardWriter,
    copy_companions,
    must_be_new,
    new_folder,
    read_json,
    write_json,
)
from quantserve_squeezellm._kmeans import codebooks, encode
from quantserve_squeezellm._packing import PROJECTIONS, k_multiple, pack, quantization_config, to_csr
from quantserve_squeezellm.format import BITS

# Weights clustered at once: bounds the float64 working copies to some hundred MB.
CHUNK = 4_000_000


def quantize(
    source: Path,
    destination: Path,
    *,
    bits: int = 4,
    sparsity: float = 0.0,
    experts: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a SqueezeLLM checkpoint of `source`: the projections of its decoder quantized, all else copied.

    Routers, lm_head, vision and audio towers are copied. The k-means is unweighted: every weight counts the
    same.

    Args:
        source: folder of an unquantized Hugging Face checkpoint in safetensors.
        destination: a folder that does not exist yet; it appears whole or not at all.
        bits: 3 or 4.
        sparsity: percent of each matrix, the largest magnitudes, kept exactly in a sparse part; 0.45 is usual.
        experts: whether to quantize the experts of mixtures too, which are then served on CPUs only.
        progress: called as (what, done, total) while tensors are written.

    Raises:
        UsageError: an option out of range, or the destination exists.
        CheckpointError: the source is unreadable, quantized already, or a projection cannot be packed.
    """
    source, destination = Path(source), Path(destination)
    if bits not in BITS:
        raise UsageError(f"bits is {bits}; SqueezeLLM knows 3 and 4")
    if not 0 <= sparsity < 100:
        raise UsageError(f"sparsity is {sparsity} percent; expected 0 or more and less than 100 (0.45 is usual)")
    must_be_new(destination)
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder")
    config = read_json(source / "config.json")
    reader = SafetensorsFolder(source)
    names = reader.names()
    if config.get("quantization_config") or any(name.endswith(".qweight") for name in names):
        raise CheckpointError(f"{source} is quantized already\n  fix: give the unquantized model")
    chosen = quantizable(open_checkpoint(str(source)), experts=experts)
    targets = {f"{linear.name}.weight" for linear in chosen}
    if absent := sorted(targets - set(names)):
        raise CheckpointError(
            f"{source} has no weight of {len(absent)} linears that config.json describes. First: {absent[0]}\n"
            "  fix: use the whole checkpoint"
        )
    if not targets:
        raise CheckpointError(f"{source}: no decoder block with {', '.join(PROJECTIONS)} found")
    for name in sorted(targets):
        k = reader.shape(name)[1]
        if k % 32:
            raise CheckpointError(
                f"{name} has {k} in_features; SqueezeLLM packs 32 at a time, so K must be a multiple of 32\n"
                "  fix: serve this model with another method"
            )

    sparse: dict[str, dict[str, int]] = {}
    with new_folder(destination) as folder:
        copy_companions(source, folder)
        writer = ShardWriter(folder)
        for done, name in enumerate(names, start=1):
            if name in targets:
                module = name.removesuffix(".weight")
                tensors = quantize_matrix(reader.get(name), bits, sparsity)
                if "cols" in tensors:
                    sparse[module] = {"nnz": tensors["cols"].numel()}
                for suffix, tensor in tensors.items():
                    writer.add(f"{module}.{suffix}", tensor)
            else:
                writer.add(name, reader.get(name))
            if progress:
                progress("quantizing", done, len(names))
        writer.close()
        write_json(folder / "config.json", {**config, "quantization_config": quantization_config(bits, sparse)})


def quantize_matrix(weight: Tensor, bits: int, sparsity: float = 0.0) -> dict[str, Tensor]:
    """The SqueezeLLM tensors of one weight [n, k], by suffix.

    With sparsity the largest magnitudes leave the dense part before clustering and stay exact: the sparse value is
    what the codebook entry nearest zero leaves over, so adding both parts gives the weight back.

    Raises:
        CheckpointError: the weight holds NaN or infinity.
    """
    weight = weight.to(torch.float32)
    if not bool(torch.isfinite(weight).all()):
        raise CheckpointError(f"a weight {list(weight.shape)} holds NaN or infinity and cannot be quantized")
    n, k = weight.shape
    count = round(n * k * sparsity / 100)
    outlier = torch.zeros(n * k, dtype=torch.bool)
    if count:
        outlier[weight.abs().view(-1).topk(count).indices] = True
    outlier = outlier.view(n, k)
    dense = weight.masked_fill(outlier, 0.0)
    tables, codes = [], []
    step = max(1, CHUNK // k)
    for start in range(0, n, step):
        part = slice(start, start + step)
        table = codebooks(dense[part], 2**bits, (~outlier[part]).to(torch.float32) if count else None)
        tables.append(table)
        codes.append(encode(dense[part], table))
    table, code = torch.cat(tables), torch.cat(codes)
    tensors = {"qweight": pack(code, bits), "lookup_table": table}
    if count:
        rest = weight - table.gather(1, code.to(torch.int64))
        tensors |= to_csr(torch.where(outlier, rest, 0.0))
    assert k % k_multiple(bits) == 0
    return tensors
