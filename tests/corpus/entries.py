"""The entries of the corpus: one JSON file per public checkpoint, or per variant of one.

Keys of such a file:

- ``model``: hub id. ``provenance``: where the config comes from. ``note``: what is worth knowing.
- ``config``: config.json, spelled as the public file spells it; absent when the repository has none.
- ``tokenizer``: ``file`` (tokenizer.json unless given; null: none), ``vocab`` (ids 0..vocab-1), ``added`` (further
  ids), ``template`` (whether there is a chat template), ``config`` (further keys of tokenizer_config.json).
- ``files``: further files; an object or list is written as JSON, a number is a file of that many bytes.
- ``shards``: number of weight files, with an index when there are several; ``weights``: their stem, ``model`` unless
  given.
- ``tensors``: pattern -> [dtype, shape]; see `corpus.patterns`. ``beside``: stem -> tensors of a further weight file.
- ``build``: how build.py makes the tensors. ``vllm``: what vLLM makes of the checkpoint, written by build.py.
- ``cases``: what `quantserve check` is expected to find; see `Case`.

A variant has ``from``, the id of another entry, and changes it: ``config`` is merged (null deletes a key), ``files``
and ``tokenizer`` too, and ``tensors`` are added or replaced. Changes that any entry may have: ``rename`` ([pattern,
replacement] pairs), ``quantize`` (a list of arguments of `corpus.quantize.quantize`), ``dtypes`` (safetensors dtype ->
another), ``drop`` (regular expressions of tensor names), in this order, and ``lose`` (names of files that are not
there).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corpus.patterns import Spec, unfold
from corpus.quantize import quantize
from helpers.checkpoints import CHAT_TEMPLATE, nbytes, write_safetensors

FOLDER = Path(__file__).parent / "models"


@dataclass(frozen=True)
class Case:
    """One way to serve an entry, and what `quantserve check` must find.

    Attributes:
        target: as for ``--target``.
        tp: tensor parallel size.
        kwargs: further engine_kwargs; ``max_model_len`` is max_total_tokens of the config.
        errors: codes of the errors, all of them; empty when the model must be served.
        warnings: codes of the warnings that must be there.
        may: codes that may be there or not.
        mentions: text that the errors must contain, whatever its case.
        why: the reason for the refusal, for the table.
        numbers: ``context``, ``kv_bytes_per_token``, ``weights``, ``dtype`` where they are not those of ``vllm``.
    """

    target: str = "h100"
    tp: int = 1
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    may: tuple[str, ...] = ()
    mentions: tuple[str, ...] = ()
    why: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        extra = "".join(f" {key}={value}" for key, value in self.kwargs.items())
        return f"{self.target} tp{self.tp}{extra}"


@dataclass(frozen=True)
class Entry:
    """One checkpoint of the corpus."""

    name: str
    data: Mapping[str, Any]
    tensors: Mapping[str, Spec]
    cases: tuple[Case, ...]

    @property
    def vllm(self) -> Mapping[str, Any]:
        """What vLLM makes of it."""
        found: Mapping[str, Any] = self.data.get("vllm") or {}
        return found

    @property
    def large(self) -> bool:
        """Whether checking it takes seconds."""
        return len(self.tensors) > 50_000

    def write(self, folder: Path) -> Path:
        """Write the checkpoint as a folder whose weight files are holes behind real headers."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.data.get("config") is not None:
            _json(folder / "config.json", self.data["config"])
        _write_tokenizer(folder, self.data.get("tokenizer") or {})
        for name, content in (self.data.get("files") or {}).items():
            if isinstance(content, int):
                with (folder / name).open("wb") as file:
                    file.truncate(content)
            elif content is not None:
                _json(folder / name, content)
        _write_weights(folder, self.tensors, self.data.get("shards", 1), self.data.get("weights", "model"))
        for stem, tensors in (self.data.get("beside") or {}).items():
            write_safetensors(folder / f"{stem}.safetensors", unfold(tensors))
        for name in self.data.get("lose", ()):
            (folder / name).unlink()
        return folder


def names() -> list[str]:
    """Names of all entries."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read(name: str) -> Entry:
    """One entry, by its name or hub id."""
    data, tensors = _resolved(name.replace("/", "--"))
    cases = tuple(_case(case) for case in data.get("cases", ()))
    return Entry(name.replace("/", "--"), data, tensors, cases)


def _case(data: Mapping[str, Any]) -> Case:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    return Case(**values)


def raw(name: str) -> dict[str, Any]:
    """The file of an entry as it is."""
    data: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return data


def dump(data: Mapping[str, Any]) -> str:
    """An entry as text: a key a line, and a tensor, case or layer a line."""

    def line(value: object) -> str:
        return json.dumps(value, ensure_ascii=False, separators=(", ", ": "))

    lines = []
    for key, value in data.items():
        if key in ("tensors", "vllm", "config") and value:
            inner = ",\n".join(f"    {line(k)}: {line(v)}" for k, v in value.items())
            lines.append(f"  {line(key)}: {{\n{inner}\n  }}")
        elif key == "cases" and value:
            inner = ",\n".join(f"    {line(v)}" for v in value)
            lines.append(f"  {line(key)}: [\n{inner}\n  ]")
        else:
            lines.append(f"  {line(key)}: {line(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def forget() -> None:
    """Read entries anew: their files have changed."""
    _resolved.cache_clear()


@functools.cache
def _resolved(name: str) -> tuple[dict[str, Any], dict[str, Spec]]:
    data = raw(name)
    if "from" not in data:
        return data, _changed(name, unfold(data.get("tensors") or {}), data)
    base, tensors = _resolved(data["from"].replace("/", "--"))
    merged = {**base, "cases": (), "lose": (), "vllm": None, **data}
    if data.get("config", {}) is not None:
        merged["config"] = _merge(base["config"], data.get("config") or {})
    for key in ("files", "tokenizer"):
        merged[key] = _merge(base.get(key) or {}, data.get(key) or {})
    return merged, _changed(name, tensors, data) | unfold(data.get("tensors") or {})


def _changed(name: str, tensors: dict[str, Spec], data: Mapping[str, Any]) -> dict[str, Spec]:
    for pattern, replacement in data.get("rename", ()):
        tensors = {re.sub(pattern, replacement, tensor): spec for tensor, spec in tensors.items()}
    for step in data.get("quantize", ()):
        options = dict(step)
        tensors = quantize(tensors, options.pop("method"), **options)
    if dtypes := data.get("dtypes"):
        tensors = {tensor: (dtypes.get(spec[0], spec[0]), spec[1]) for tensor, spec in tensors.items()}
    for pattern in data.get("drop", ()):
        kept = {tensor: spec for tensor, spec in tensors.items() if not re.search(pattern, tensor)}
        assert len(kept) < len(tensors), f"{name}: drop {pattern!r} matches no tensor"
        tensors = kept
    return tensors


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, objects in objects likewise; null deletes."""
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        elif value is None:
            merged.pop(key, None)
        else:
            merged[key] = value
    return merged


def _json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def _write_tokenizer(folder: Path, tokenizer: Mapping[str, Any]) -> None:
    file = tokenizer.get("file", "tokenizer.json")
    config = dict(tokenizer.get("config") or {})
    if tokenizer.get("template", True):
        config.setdefault("chat_template", CHAT_TEMPLATE)
    if file is None:
        return
    _json(folder / "tokenizer_config.json", config)
    if file != "tokenizer.json":
        (folder / file).write_bytes(b"\n" if file.endswith(".txt") else b"{}" if file.endswith(".json") else b"")
        if added := tokenizer.get("added"):
            _json(folder / "added_tokens.json", {f"<{number}>": number for number in added})
        return
    vocab = int(tokenizer.get("vocab", 1000))
    ids = range(vocab) if tokenizer.get("dense") else (0, vocab - 1)
    _json(
        folder / file,
        {
            "version": "1.0",
            "added_tokens": [{"id": n, "content": f"<{n}>", "special": True} for n in tokenizer.get("added", ())],
            "model": {"type": "BPE", "vocab": {f"t{n}": n for n in ids}, "merges": []},
        },
    )


def _write_weights(folder: Path, tensors: Mapping[str, Spec], shards: int, stem: str) -> None:
    if not tensors:
        return
    shards = min(shards, len(tensors))
    if shards == 1:
        write_safetensors(folder / f"{stem}.safetensors", tensors)
        return
    listed = list(tensors.items())
    parts = [dict(listed[len(listed) * i // shards : len(listed) * (i + 1) // shards]) for i in range(shards)]
    named = {f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors": part for i, part in enumerate(parts)}
    total = sum(map(nbytes, tensors.values()))
    for file_name, file in named.items():
        write_safetensors(folder / file_name, file)
    weight_map = {name: file_name for file_name, file in named.items() for name in file}
    _json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
