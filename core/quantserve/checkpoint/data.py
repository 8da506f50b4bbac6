"""The plain data of a checkpoint. Tests and plugins may construct it directly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

from quantserve.families import completed
from quantserve.finding import Finding
from quantserve.once import once

Location = Literal["local", "cache", "hub", "bucket"]
EMPTY: Final[Mapping[str, Any]] = MappingProxyType({})

DTYPE_BITS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
        "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
    }
)  # fmt: skip
"""Bits per element of every dtype a safetensors file may name."""

UNREADABLE_CODES: Final = frozenset(
    {
        "file-unreadable", "header-invalid", "header-oversized", "header-truncated", "lfs-pointer", "pickle-invalid",
        "pickle-legacy", "pickle-unsafe", "pickle-weights", "shard-missing", "tensor-invalid", "weights-missing",
        "path-escape", "shard-subfolder", "checkpoint-too-large",
    }
)  # fmt: skip
"""Errors after which `Checkpoint.tensors` is known to be incomplete."""

_TORCH_DTYPES: Final = {"half": "float16", "float": "float32", "double": "float64"}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a weight file, without its data.

    Attributes:
        name: key in the state dict, ``model.layers.0.self_attn.q_proj.qweight``.
        dtype: safetensors name: ``F16``, ``BF16``, ``F32``, ``I32``, ...; other containers have names of their own.
        shape: as stored; a linear's ``weight`` is [n, k] with n = out_features, k = in_features.
        file: the weight file that holds it.
        stored: bytes of data, where dtype and shape do not tell them, as of block formats; None where they do.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str = "model.safetensors"
    stored: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of data; 0 where neither `stored` nor the dtype tells."""
        if self.stored is not None:
            return self.stored
        return prod(self.shape) * DTYPE_BITS.get(self.dtype, 0) // 8


@once
def completed_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """`Checkpoint.text_config`, computed once."""
    return completed(checkpoint.config)


@dataclass(frozen=True)
class Checkpoint:
    """Everything that can be known about a checkpoint without reading weights.

    Attributes:
        source: what the user named: a folder, ``org/name`` or ``s3://bucket/folder``.
        location: ``local`` folder, ``cache`` of the hub or of buckets, the ``hub`` itself or a ``bucket``.
        path: the folder, None on the hub and in a bucket.
        revision: commit of a cached or remote checkpoint; of a bucket the digest of its files' names, sizes and tags.
        files: top-level file name -> bytes; -1 when a hub mirror does not say.
        config: config.json; empty when it is missing or invalid (then ``problems`` says so).
        quant_files: top-level ``*quant*.json`` files that parse, by name.
        tokenizer: ``present`` (bool), ``max_token_id`` (int, added tokens included, or None when unknown) and
            ``has_chat_template`` (bool).
        tensors: name -> tensor, of all files vLLM would read.
        other: entries of a pickled state dict that are not tensors (``sparse_threshold.*``): name -> int, float,
            bool, str, or a short description of anything else.
        metadata: ``__metadata__`` of the safetensors files; of a key in several files the first value.
        container: the files that a plugin's reader read; empty where the core read safetensors or pickles.
        problems: what reading found wrong; reading never raises for a single bad file.
    """

    source: str
    location: Location = "local"
    path: Path | None = None
    revision: str | None = None
    files: Mapping[str, int] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    quant_files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    other: Mapping[str, object] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    container: tuple[str, ...] = ()
    problems: tuple[Finding, ...] = ()

    @classmethod
    def from_tensors(
        cls,
        config: Mapping[str, Any] | None = None,
        tensors: Mapping[str, tuple[str, Iterable[int]]] | None = None,
        *,
        quant_files: Mapping[str, Mapping[str, Any]] | None = None,
        files: Mapping[str, int] | None = None,
        tokenizer: Mapping[str, Any] | None = None,
        other: Mapping[str, object] | None = None,
        metadata: Mapping[str, str] | None = None,
        problems: Iterable[Finding] = (),
        source: str = "in-memory",
    ) -> Checkpoint:
        """A checkpoint for a plugin's own tests; ``tensors`` maps name -> (dtype, shape).

        All tensors are in ``model.safetensors``; ``files`` defaults to that file and the JSON files given.
        """
        made = {name: Tensor(name, dtype, tuple(shape)) for name, (dtype, shape) in (tensors or {}).items()}
        if files is None:
            files = {"config.json": 1, **dict.fromkeys(quant_files or {}, 1)}
            if made:
                files = {**files, "model.safetensors": sum(tensor.nbytes for tensor in made.values())}
        return cls(
            source=source,
            files=files,
            config=config or {},
            quant_files=quant_files or {},
            tokenizer=tokenizer or {"present": False, "max_token_id": None, "has_chat_template": False},
            tensors=made,
            other=other or {},
            metadata=metadata or {},
            problems=tuple(problems),
        )

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The config of the language model as transformers completes it, defaults of its class included.

        Of a multimodal config the section of the language model (``text_config`` and its like), else the config itself.
        """
        return completed_config(self)

    @property
    def quantization_config(self) -> Mapping[str, Any] | None:
        """The quantization config vLLM would find without an argument; None when it would find none.

        In vLLM's order: ``quantization_config`` of config.json, else hf_quant_config.json, else
        ``compression_config``, else the same keys of ``text_config``. An empty object counts as none.
        ``quant_method`` is in lower case and ``compressed_tensors`` has its hyphen, as vLLM reads them; a file of
        ModelOpt, which has none, gets one.
        """
        candidates = (
            self.config.get("quantization_config"),
            self.quant_files.get("hf_quant_config.json"),
            self.config.get("compression_config"),
            self.text_config.get("quantization_config"),
            self.text_config.get("compression_config"),
        )
        found = next((value for value in candidates if isinstance(value, Mapping) and value), None)
        method = found.get("quant_method") or _modelopt(found) if found else None
        if found is None or not isinstance(method, str):
            return found
        name = method.strip().lower().replace("compressed_tensors", "compressed-tensors")
        return found if name == found.get("quant_method") else {**found, "quant_method": name}

    @property
    def torch_dtype(self) -> str | None:
        """``float16``, ``bfloat16`` or ``float32`` as config.json says, else None."""
        for config in (self.config, self.text_config):
            for key in ("dtype", "torch_dtype"):
                value = config.get(key)
                if isinstance(value, str):
                    name = value.removeprefix("torch.")
                    return _TORCH_DTYPES.get(name, name)
        return None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def tensors_complete(self) -> bool:
        """False when a weight file could not be read, so that a missing name in ``tensors`` means nothing."""
        return not any(problem.code in UNREADABLE_CODES for problem in self.problems)

    def to_json(self) -> dict[str, object]:
        """Plain data for ``--json``; tensors as ``{name: {dtype, shape, file}}``."""
        return {
            "source": self.source,
            "location": self.location,
            "path": None if self.path is None else str(self.path),
            "revision": self.revision,
            "files": dict(self.files),
            "config": dict(self.config),
            "quant_files": {name: dict(value) for name, value in self.quant_files.items()},
            "tokenizer": dict(self.tokenizer),
            "weight_bytes": self.weight_bytes,
            "tensors": {
                t.name: {"dtype": t.dtype, "shape": list(t.shape), "file": t.file} for t in self.tensors.values()
            },
            "other": dict(self.other),
            "metadata": dict(self.metadata),
            "container": list(self.container),
            "problems": [problem.to_json() for problem in self.problems],
        }


def _modelopt(config: Mapping[str, Any]) -> str | None:
    """The method that vLLM reads out of ModelOpt's hf_quant_config.json; None where it stops at the algorithm."""
    producer, inner = config.get("producer"), config.get("quantization")
    if not isinstance(producer, Mapping) or producer.get("name") != "modelopt" or not isinstance(inner, Mapping):
        return None
    algorithm = str(inner.get("quant_algo")).upper()
    known = dict.fromkeys(("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO"), "modelopt") | {"NVFP4": "modelopt_fp4"}
    return known.get(algorithm)


def overridden(checkpoint: Checkpoint, overrides: object) -> Checkpoint:
    """The checkpoint with ``hf_overrides`` in its config, as vLLM applies them: a mapping replaces field by field."""
    if not isinstance(overrides, Mapping) or not overrides:
        return checkpoint
    return replace(checkpoint, config=_merged(checkpoint.config, overrides))


def _merged(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(config)
    for key, value in overrides.items():
        present = made.get(key)
        nested = isinstance(value, Mapping) and isinstance(present, Mapping) and key.endswith("_config")
        made[key] = _merged(present, value) if nested else value  # type: ignore[arg-type]
    return made
