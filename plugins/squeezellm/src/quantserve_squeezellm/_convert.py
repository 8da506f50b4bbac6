"""Turn the original SqueezeLLM `.pt` files into a safetensors checkpoint that vLLM serves with this plugin."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantserve.errors import CheckpointError, UsageError
from quantserve_quantize.draft import must_be_new, write_folder
from quantserve_quantize.source import Weights, companions, natural
from quantserve_squeezellm._packing import (
    CSR,
    DENSE,
    FULL,
    PROJECTIONS,
    SUFFIXES,
    bits_of,
    k_multiple,
    projection_shapes,
    quantization_config,
    sparse_problem,
)
from quantserve_squeezellm._pickle import load_state

Progress = Callable[[str, int, int], None]
THRESHOLD = "sparse_threshold."
# Buffers that old transformers saved; computed from the config today.
DERIVED = (".inv_freq", ".cos_cached", ".sin_cached")


@dataclass
class _Source:
    """The state dict of a `.pt` file, sorted into quantized layers, plain tensors and nonzero counts."""

    path: Path
    layers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)
    nonzeros: dict[str, int] = field(default_factory=dict)


def convert(
    source: Path,
    destination: Path,
    *,
    base: Path | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the checkpoint of a `.pt` file as a safetensors folder, with `quantization_config` in its config.json.

    Args:
        source: the `.pt` file, or the folder with it (and its config.json, quant_config.json and tokenizer).
        destination: a folder that does not exist yet; it appears whole or not at all.
        base: folder of the unquantized model; supplies whatever the file lacks (LLaMA-1 and Vicuna v1.1 files hold
            the quantized linears only).
        allow_pickle: must be True: `.pt` files are pickles. They are read with torch's restricted unpickler.
        progress: called as (what, done, total) while tensors are written.

    Raises:
        UsageError: pickles not allowed, destination exists, or a base is needed.
        CheckpointError: the file is broken, refused, or does not fit its config.
    """
    source, destination = Path(source), Path(destination)
    path = _weights_file(source)
    if not allow_pickle:
        raise UsageError(
            f"{path} is a pickle, and pickles are read only when you say so\n"
            "  fix: pass --allow-pickle (torch's restricted unpickler reads it: tensors only, no code)"
        )
    must_be_new(destination)
    found = _sort(path)
    bits = _bits(found)
    config = _config(path, base)
    _check_layers(found, bits, config)
    plain = _Plain(found, base, allow_pickle)
    plain.check(config)
    sparse = {module: counts for module in found.layers if (counts := _sparse_counts(found, module))}
    config["quantization_config"] = quantization_config(bits, sparse)

    folders = [folder for folder in (base, path.parent) if folder is not None]
    copies = {file.name: file for folder in folders for file in companions(folder)}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    write_folder(destination, _tensors(found, plain, progress), {"config.json": text}, copies.values())


def _tensors(found: _Source, plain: _Plain, progress: Progress | None) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the checkpoint, one by one."""
    names = sorted([*plain.names, *found.layers], key=natural)
    for done, name in enumerate(names, start=1):
        if name in found.layers:
            yield from ((f"{name}.{suffix}", tensor) for suffix, tensor in found.layers[name].items())
        else:
            yield name, plain.get(name)
        if progress:
            progress("writing", done, len(names))


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError when it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _weights_file(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.is_dir():
        what = "neither a file nor a folder" if source.exists() else "no such file or folder"
        raise CheckpointError(f"{source}: {what}")
    files = sorted(source.glob("*.pt"))
    if not files and any(source.glob("*.safetensors")):
        raise CheckpointError(
            f"{source}: nothing to convert: it holds safetensors files and no .pt\n  fix: `quantserve check {source}`"
        )
    if len(files) != 1:
        listing = ", ".join(file.name for file in files) or "none"
        raise CheckpointError(f"{source}: expected exactly one .pt file, found {listing}\n  fix: name the file itself")
    return files[0]


def _sort(path: Path) -> _Source:
    state = load_state(path)
    found = _Source(path)
    modules = {name.removesuffix(".qweight") for name in state if name.endswith(".qweight")}
    if not modules:
        raise CheckpointError(
            f"{path}: no tensor ends in .qweight, so this is no SqueezeLLM file ({len(state)} entries)"
        )
    for name, value in state.items():
        module, _, suffix = name.rpartition(".")
        if name.startswith(THRESHOLD):
            found.nonzeros[name.removeprefix(THRESHOLD)] = int(value)
        elif not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: entry {name} is a {type(value).__name__}, expected a tensor")
        elif name.endswith(DERIVED) or (module in modules and suffix == "startrows"):
            continue
        elif module in modules and suffix in SUFFIXES:
            found.layers.setdefault(module, {})[suffix] = value
        elif suffix in SUFFIXES:
            raise CheckpointError(f"{path}: {name} has no {module}.qweight beside it; the file is incomplete")
        else:
            found.plain[name] = value
    return found


def _bits(found: _Source) -> int:
    """The width: what quant_config.json says and every layer shows."""
    widths: dict[int | None, str] = {}
    for module, tensors in found.layers.items():
        table = tensors.get("lookup_table")
        if table is None or table.ndim != 2:
            raise CheckpointError(
                f"{found.path}: {module} has no lookup_table [out_features, 2**bits] beside its qweight"
            )
        widths.setdefault(bits_of(table.shape[1]), f"{module}.lookup_table {list(table.shape)}")
    if len(widths) > 1 or None in widths:
        listing = "; ".join(widths.values())
        raise CheckpointError(f"{found.path}: every lookup_table must have 8 or every one 16 columns, found {listing}")
    ((bits, example),) = widths.items()
    assert bits is not None
    quant_config = found.path.parent / "quant_config.json"
    if quant_config.is_file():
        declared = _read_json(quant_config).get("wbits", bits)
        if declared != bits:
            raise CheckpointError(
                f"{quant_config}: wbits is {declared!r}, but the tensors hold {bits}-bit codes ({example}). "
                "Fix: correct wbits, or put the right file beside it"
            )
    return bits


def _config(path: Path, base: Path | None) -> dict[str, Any]:
    for folder in (path.parent, base):
        if folder is not None and (folder / "config.json").is_file():
            return _read_json(folder / "config.json")
    raise UsageError(
        f"{path}: no config.json beside it"
        + (f" and none in {base}" if base else "")
        + "\n  fix: pass --base with the folder of the unquantized model"
    )


def _check_layers(found: _Source, bits: int, config: Mapping[str, Any]) -> None:
    """Every layer against the format, and against the sizes in config.json."""
    shapes = projection_shapes(config)
    for module, tensors in found.layers.items():
        for suffix in ("lookup_table", *CSR, *FULL):
            group = next((group for group in (DENSE, CSR, FULL) if suffix in group), ())
            if suffix not in tensors and any(other in tensors for other in group):
                raise CheckpointError(f"{found.path}: {module}.{suffix} is missing beside {', '.join(sorted(tensors))}")
        words, table = tensors["qweight"], tensors["lookup_table"]
        if words.ndim != 2 or words.dtype != torch.int32:
            raise CheckpointError(
                f"{found.path}: {module}.qweight is {words.dtype} {list(words.shape)}, expected int32 [rows, N]"
            )
        n, k = table.shape[0], words.shape[0] * 32 // bits
        if words.shape[1] != n or words.shape[0] * 32 % bits or k % k_multiple(bits):
            raise CheckpointError(
                f"{found.path}: {module}.qweight {list(words.shape)} and lookup_table {list(table.shape)} do not make "
                f"a {bits}-bit layer; expected [K*{bits}/32, N] and [N, {2**bits}]"
            )
        expected = shapes.get(module.rpartition(".")[2])
        if expected and expected != (n, k):
            raise CheckpointError(
                f"{found.path}: {module} is [{n}, {k}] (out, in), but config.json makes it {list(expected)}. "
                "Fix: the config.json (or --base) must be of the same model"
            )
        if problem := sparse_problem(tensors, n, k):
            raise CheckpointError(f"{found.path}: {module}: {problem}")
        nnz = tensors["cols"].numel() if "cols" in tensors else 0
        if found.nonzeros.get(module, nnz) != nnz:
            raise CheckpointError(
                f"{found.path}: {THRESHOLD}{module} says {found.nonzeros[module]} nonzeros, the tensors hold {nnz}; "
                "the file is damaged or incomplete"
            )
    orphans = sorted(set(found.nonzeros) - set(found.layers))
    if orphans:
        raise CheckpointError(f"{found.path}: {THRESHOLD}{orphans[0]} counts a layer that the file does not hold")
    if shapes and isinstance(config.get("num_hidden_layers"), int):
        _check_projections(found, config["num_hidden_layers"])


def _check_projections(found: _Source, layers: int) -> None:
    expected = {
        f"model.layers.{i}.{'self_attn' if projection in PROJECTIONS[:4] else 'mlp'}.{projection}"
        for i in range(layers)
        for projection in PROJECTIONS
    }
    kept = {name.removesuffix(".weight") for name in found.plain}
    missing = sorted(expected - set(found.layers) - kept, key=natural)
    extra = sorted(set(found.layers) - expected, key=natural)
    for what, names in (("lacks", missing), ("has unexpected", extra)):
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise CheckpointError(
                f"{found.path} {what} {len(names)} of the {len(expected)} linears that config.json describes "
                f"({layers} layers): {shown}"
            )


def _sparse_counts(found: _Source, module: str) -> dict[str, int]:
    tensors = found.layers[module]
    counts = {"nnz": tensors["cols"].numel()} if "cols" in tensors else {}
    return {**counts, "full_rows": tensors["full_row_indices"].numel()} if "full_rows" in tensors else counts


class _Plain:
    """The unquantized tensors: the file's own, and the base model's for what it lacks."""

    def __init__(self, found: _Source, base: Path | None, allow_pickle: bool) -> None:
        self.found = found
        self.base = base
        self.states: dict[str, Tensor] = {}
        self.folder: Weights | None = None
        base_names: list[str] = []
        if base is not None:
            if not base.is_dir():
                raise UsageError(f"--base {base}: no such folder; give the folder of the unquantized model")
            pickles = sorted(base.glob("pytorch_model*.bin"))
            if pickles and allow_pickle and not list(base.glob("*.safetensors")):
                for path in pickles:
                    self.states.update(load_state(path))
                base_names = list(self.states)
            else:
                self.folder = Weights(base)
                base_names = self.folder.names
        quantized = {f"{module}.weight" for module in found.layers}
        self.names = [*found.plain]
        self.names += [
            name
            for name in base_names
            if name not in found.plain and name not in quantized and not name.endswith(DERIVED)
        ]

    def check(self, config: Mapping[str, Any]) -> None:
        """UsageError naming the base when the model would not be complete."""
        layers = config.get("num_hidden_layers")
        needed = ["model.embed_tokens.weight", "model.norm.weight"]
        needed += [] if config.get("tie_word_embeddings") else ["lm_head.weight"]
        for i in range(layers if isinstance(layers, int) else 0):
            needed += [f"model.layers.{i}.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")]
        missing = [name for name in needed if name not in set(self.names)]
        if missing and self.base is None:
            raise UsageError(
                f"{self.found.path} holds quantized linears without {len(missing)} other tensors the model needs "
                f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); "
                "LLaMA-1 and Vicuna v1.1 files are like that. "
                "Fix: pass --base with the folder of the unquantized model"
            )
        if missing:
            raise CheckpointError(f"neither {self.found.path} nor {self.base} holds {', '.join(missing[:5])}")
        embedding, vocabulary = self.get("model.embed_tokens.weight"), config.get("vocab_size")
        if isinstance(vocabulary, int) and embedding.shape[0] != vocabulary:
            raise CheckpointError(
                f"model.embed_tokens.weight has {embedding.shape[0]} rows, but config.json says vocab_size {vocabulary}"
            )

    def get(self, name: str) -> Tensor:
        """One tensor, from the file or else from the base."""
        if name in self.found.plain:
            return self.found.plain[name]
        return self.states[name] if self.folder is None else self.folder.get(name)
