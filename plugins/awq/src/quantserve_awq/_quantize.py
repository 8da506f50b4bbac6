"""Export a Hugging Face checkpoint as AWQ "GEMM" by rounding to nearest, and back.

No activation-aware scaling or clipping: the weights are rounded as they are. The files are what AutoAWQ
writes and vLLM's own AWQ method reads. One tensor is in memory at a time, plus the shard being filled.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantserve.errors import UserError
from quantserve_awq._format import BITS, dequantize_linear, quantize_linear

# The linears of a decoder block; routers, embeddings, norms and lm_head stay as they are.
LINEAR = re.compile(r"(?:^|\.)layers\.\d+\..*_proj\.weight$")
SHARD_BYTES = 4 * 2**30
COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*")
NOT_COPIED = ("*.index.json", "*quant*config.json", "config.json")

Progress = Callable[[str, int, int], None]
"""Called before each tensor with its name, how many are done and how many there are."""


def quantize(source: Path, destination: Path, *, group_size: int = 128, progress: Progress | None = None) -> None:
    """Write an AWQ checkpoint of the float checkpoint in ``source``.

    Args:
        source: folder with config.json and safetensors in float16, bfloat16 or float32.
        destination: folder to make; it appears only when it is complete.
        group_size: inputs that share a scale and a zero point, -1 for all of them.
        progress: see `Progress`.

    Raises:
        UserError: the source cannot be quantized, or the destination exists.
    """
    config = read_config(source)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "an unnamed method")
        raise UserError(f"{source} is already quantized ({method})\n  fix: quantize the float checkpoint it came from")
    if not any(LINEAR.search(name) for name in tensor_files(source)):
        raise UserError(f"{source} has no linear to quantize: no tensor is named like ...layers.0....q_proj.weight")
    with new_folder(destination) as folder:
        writer = ShardWriter(folder)
        for name, tensor in tensors(source, progress):
            if not LINEAR.search(name) or tensor.ndim != 2:
                writer.add(name, as_float16(name, tensor))
                continue
            try:
                packed = quantize_linear(tensor, group_size)
            except ValueError as error:
                raise UserError(f"{name} of {source} cannot be packed: {error}") from error
            module = name.removesuffix(".weight")
            for part, value in packed._asdict().items():
                writer.add(f"{module}.{part}", as_float16(f"{module}.{part}", value))
        writer.finish()
        config["quantization_config"] = {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": group_size,
            "zero_point": True,
            "version": "gemm",
        }
        write_config(folder, config, "float16")
        copy_other_files(source, folder)


def dequantize_checkpoint(source: Path, destination: Path, *, progress: Progress | None = None) -> None:
    """Write the float32 checkpoint that the AWQ checkpoint in ``source`` means.

    Raises:
        UserError: ``source`` is no AWQ checkpoint, or the destination exists.
    """
    config = read_config(source)
    if (config.pop("quantization_config", None) or {}).get("quant_method") != "awq":
        raise UserError(f"{source} is no AWQ checkpoint: quantization_config of its config.json does not say awq")
    with new_folder(destination) as folder:
        writer = ShardWriter(folder)
        packed: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors(source, progress):
            module, _, part = name.rpartition(".")
            if part not in ("qweight", "qzeros", "scales"):
                writer.add(name, tensor.to(torch.float32))
                continue
            parts = packed.setdefault(module, {})
            parts[part] = tensor
            if len(parts) == 3:
                writer.add(f"{module}.weight", dequantize_linear(**packed.pop(module)))
        if packed:
            raise UserError(
                f"{source}: incomplete linears, each needs qweight, qzeros and scales: {sorted(packed)[:5]}"
            )
        writer.finish()
        write_config(folder, config, "float32")
        copy_other_files(source, folder)


# --- reading ------------------------------------------------------------------------------------------


def read_config(source: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder."""
    path = source / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path}: {error}\n  fix: give a folder with config.json and safetensors"
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a {type(config).__name__}, not an object")
    return config


def tensor_files(source: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file, in file order; the index decides which files count, where there is one."""
    index = source / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [source / Path(name).name for name in names]
    else:
        files = sorted(source.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{source} holds no safetensors weights\n  fix: convert .bin or .pt weights to safetensors first"
        )
    out: dict[str, Path] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                out |= dict.fromkeys(file.keys(), path)
        except Exception as error:  # safetensors raises its own class and OSError, by version
            raise UserError(f"cannot read {path}: {error}") from error
    return out


def tensors(source: Path, progress: Progress | None) -> Iterator[tuple[str, Tensor]]:
    """All tensors, one at a time."""
    files = tensor_files(source)
    for done, (name, path) in enumerate(files.items()):
        if progress is not None:
            progress(name, done, len(files))
        with safe_open(path, framework="pt") as file:
            yield name, file.get_tensor(name)


# --- writing ------------------------------------------------------------------------------------------


class ShardWriter:
    """Collects tensors and writes them as model.safetensors, or as numbered shards with an index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pending: dict[str, Tensor] = {}
        self.bytes = 0
        self.shards: list[list[str]] = []
        self.total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; write a shard when enough bytes have come together."""
        if self.bytes >= SHARD_BYTES:
            self.flush()
        self.pending[name] = tensor.contiguous()
        self.bytes += tensor.nbytes
        self.total += tensor.nbytes

    def flush(self) -> None:
        """Write what is pending as one shard under a temporary name."""
        save_file(self.pending, self.folder / f"part-{len(self.shards)}.safetensors", metadata={"format": "pt"})
        self.shards.append(list(self.pending))
        self.pending, self.bytes = {}, 0

    def finish(self) -> None:
        """Write the rest, give the shards their names and write the index where there are several."""
        if self.pending:
            self.flush()
        count = len(self.shards)
        if count == 1:
            (self.folder / "part-0.safetensors").rename(self.folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.shards):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self.folder / f"part-{number}.safetensors").rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def as_float16(name: str, tensor: Tensor) -> Tensor:
    """The tensor in float16, integers unchanged; refuses values that float16 cannot hold."""
    if not tensor.is_floating_point():
        return tensor
    half = tensor.to(torch.float16)
    if not torch.isfinite(half).all():
        largest = tensor.to(torch.float32).abs().max().item()
        raise UserError(f"{name} does not fit float16, the dtype of AWQ files: its largest value is {largest:g}")
    return half


def write_config(folder: Path, config: dict[str, Any], dtype: str) -> None:
    """Write config.json with the dtype of the new weights."""
    config = {key: value for key, value in config.items() if key != "dtype"} | {"torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def copy_other_files(source: Path, folder: Path) -> None:
    """Copy tokenizer, generation config, chat template and licence."""
    left_out = {path for pattern in NOT_COPIED for path in source.glob(pattern)}
    for pattern in COPIED:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path not in left_out:
                shutil.copyfile(path, folder / path.name)


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A temporary folder beside ``destination`` that takes its name on success and vanishes on failure."""
    if destination.exists():
        raise UserError(f"{destination} exists already\n  fix: name another destination, or remove it first")
    destination.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp makes it private
        folder.rename(destination)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
