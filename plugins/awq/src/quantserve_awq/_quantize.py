"""Export a Hugging Face checkpoint as AWQ "GEMM" by rounding to nearest, and back.

No activation-aware scaling or clipping: the weights are rounded as they are. The files are what AutoAWQ
writes and vLLM's own AWQ method reads. One tensor is in memory at a time, plus the shard being filled.
"""

from __future__ import annotations

import json
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

from quantserve.api import Linear, quantizable, refuses_float16
from quantserve.checkpoint import open_checkpoint
from quantserve.errors import UserError
from quantserve_awq._format import BITS, PER_WORD, dequantize_linear, quantize_linear

GROUPS = (128, 64, 32)  # that vLLM's fast kernels take
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

    The attention and MLP projections of the decoder are quantized, experts included; routers, lm_head, vision and audio
    towers stay. Everything is written in float16, in bfloat16 for model types that vLLM does not run in float16.

    Raises:
        UserError: the source cannot be quantized, or the destination exists.
    """
    config = read_config(source)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "an unnamed method")
        raise UserError(f"{source} is already quantized ({method})\n  fix: quantize the float checkpoint it came from")
    targets = {f"{linear.name}.weight" for linear in checked(source, group_size)}
    dtype = torch.bfloat16 if refuses_float16(open_checkpoint(str(source))) else torch.float16
    with new_folder(destination) as folder:
        writer = ShardWriter(folder)
        for name, tensor in tensors(source, progress):
            if name not in targets:
                writer.add(name, narrowed(name, tensor, dtype))
                continue
            module = name.removesuffix(".weight")
            for part, value in quantize_linear(tensor, group_size, dtype)._asdict().items():
                writer.add(f"{module}.{part}", narrowed(f"{module}.{part}", value, dtype))
        writer.finish()
        config["quantization_config"] = {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": group_size,
            "zero_point": True,
            "version": "gemm",
        }
        write_config(folder, config, str(dtype).removeprefix("torch."))
        copy_other_files(source, folder)


def checked(source: Path, group_size: int) -> tuple[Linear, ...]:
    """The linears to quantize.

    Raises:
        UserError: there are none, or their weights are missing or do not fit 8 codes a word and the group size.
    """
    present = tensor_files(source)
    checkpoint = open_checkpoint(str(source))
    chosen = quantizable(checkpoint)
    if not chosen:
        raise UserError(f"{source} has no linear to quantize: no tensor is named like ...layers.0....q_proj.weight")
    absent = [linear.name for linear in chosen if f"{linear.name}.weight" not in present]
    if absent:
        raise UserError(
            f"{source} has no weight of {len(absent)} linears that config.json describes. First: {absent[0]}\n"
            "  fix: use the whole checkpoint; experts must be stored one by one, not stacked in one tensor"
        )
    for linear in chosen:
        found = checkpoint.tensors[f"{linear.name}.weight"].shape
        if found != (linear.n, linear.k):
            raise UserError(
                f"{linear.name}.weight of {source} is {list(found)}; config.json makes it [{linear.n}, {linear.k}]"
            )
        if linear.n % PER_WORD:
            raise UserError(
                f"{linear.name}.weight of {source}: out_features {linear.n} is not a multiple of {PER_WORD}, the codes "
                "in one int32 word\n  fix: serve this model with another method"
            )
    wrong = [linear for linear in chosen if group_size < -1 or group_size == 0 or linear.k % group_size]
    if group_size != -1 and wrong:
        fitting = [str(group) for group in GROUPS if not any(linear.k % group for linear in chosen)]
        fix = f"give group_size {' or '.join(fitting)}" if fitting else "give group_size -1, one group for a whole row"
        raise UserError(
            f"{wrong[0].name}.weight of {source}: in_features {wrong[0].k} is not a multiple of group_size "
            f"{group_size}\n  fix: {fix}, which works for all {len(chosen)} linears"
        )
    return chosen


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


def narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in float16 or bfloat16, integers unchanged; refuses values that the dtype cannot hold."""
    if not tensor.is_floating_point():
        return tensor
    narrow = tensor.to(dtype)
    if not torch.isfinite(narrow).all():
        largest = tensor.to(torch.float32).abs().max().item()
        kind = str(dtype).removeprefix("torch.")
        raise UserError(f"{name} does not fit {kind}, the dtype of the export: its largest value is {largest:g}")
    return narrow


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
