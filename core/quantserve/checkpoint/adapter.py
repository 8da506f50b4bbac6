"""A LoRA adapter in PEFT's layout: adapter_config.json, and the header of adapter_model.safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from quantserve.checkpoint.configs import ADAPTER, read_object
from quantserve.checkpoint.data import Location, Tensor
from quantserve.checkpoint.local import Folder
from quantserve.checkpoint.places import find_source
from quantserve.checkpoint.safetensors import FIRST_READ
from quantserve.checkpoint.text import shown, some
from quantserve.checkpoint.weights import read_weights
from quantserve.errors import CheckpointError
from quantserve.finding import Finding

FILES: Final = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
"""Where vLLM looks for the weights, in its order."""


@dataclass(frozen=True)
class Adapter:
    """Everything that can be known about an adapter without reading its weights.

    Attributes:
        name: its id in the API.
        source: what the user named: a folder, ``org/name`` or ``s3://bucket/folder``.
        location: as in `Checkpoint`.
        path: the folder, None where the files are elsewhere.
        revision: commit of a cached or remote adapter; of a bucket the digest of its files.
        files: file name -> bytes, of those that vLLM reads.
        config: adapter_config.json; empty when it is missing or invalid (then `problems` says so).
        tensors: name -> tensor; ``base_model.model.<module>.lora_A.weight`` is [rank, k], ``lora_B.weight`` [n, rank].
        problems: what reading found wrong, without the adapter's name.
    """

    name: str
    source: str
    location: Location = "local"
    path: Path | None = None
    revision: str | None = None
    files: Mapping[str, int] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    problems: tuple[Finding, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_adapter(name: str, source: str, revision: str | None = None, *, allow_pickle: bool = False) -> Adapter:
    """Read everything about an adapter except its weights.

    Args:
        name: its id in the API.
        source: a folder, ``org/name``, ``org/name@revision``, ``s3://bucket/folder`` or ``gs://bucket/folder``.
        revision: branch, tag or commit of a hub id; of a bucket the digest of its files.
        allow_pickle: read names and shapes of ``adapter_model.bin``.

    Raises:
        CheckpointError: nothing is there, or it cannot be reached, or access is refused; names the adapter.
    """
    try:
        return _read(name, source, revision, allow_pickle)
    except CheckpointError as error:
        raise CheckpointError(f"adapter {shown(name)!r}: {error}") from None


def _read(name: str, source: str, revision: str | None, allow_pickle: bool) -> Adapter:
    opened = find_source(source, revision, _lacking)
    weights = [file for file in FILES if file in opened.files][:1]
    opened.prefetch((file, FIRST_READ) for file in (ADAPTER, *weights) if file in opened.files)
    config, problems = read_object(opened, ADAPTER, "adapter-invalid", f"save the adapter again, with {ADAPTER}")
    if config is None and not problems:
        holds = ", ".join(some(sorted(opened.files)[:8])) or "no files"
        message = f"{ADAPTER} is missing in {shown(source)}, which holds {holds}"
        problems = [Finding.error("adapter-invalid", message, (ADAPTER,), "name the folder that PEFT saved")]
    tensors: Mapping[str, Tensor] = {}
    if weights:
        found = read_weights(opened, allow_pickle, weights)
        tensors, problems = found.tensors, [*problems, *map(_of_adapter, found.findings)]
    else:
        message = f"no weights: none of {', '.join(FILES)} is in {shown(source)}"
        problems = [*problems, Finding.error("adapter-invalid", message, FILES[:1], "name the folder that PEFT saved")]
    return Adapter(
        name=name,
        source=source,
        location=opened.location,
        path=opened.path,
        revision=opened.revision,
        files={file: opened.files[file] for file in (ADAPTER, *weights) if file in opened.files},
        config=config or {},
        tensors=tensors,
        problems=(*(one for one in opened.findings if set(one.offenders) & {ADAPTER, *weights}), *problems),
    )


def _lacking(folder: Folder) -> list[str]:
    """The files that a cached copy lacks."""
    weights = [] if any(file in folder.files for file in FILES) else [FILES[0]]
    return weights if ADAPTER in folder.files else [ADAPTER, *weights]


def _of_adapter(finding: Finding) -> Finding:
    """A finding about weights with the fix for an adapter, which `quantserve convert` does not read."""
    if finding.code not in ("pickle-weights", "pickle-allowed"):
        return finding
    save = "save it as safetensors: `model.save_pretrained(FOLDER, safe_serialization=True)`"
    allow = ", or set engine_config.allow_pickle: true if you trust it" if finding.code == "pickle-weights" else ""
    return replace(finding, fix=save + allow)
