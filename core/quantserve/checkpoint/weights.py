"""Which weight files vLLM would read, what is in their headers, and whether they agree with the index."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from quantserve.checkpoint.configs import read_object
from quantserve.checkpoint.data import Tensor
from quantserve.checkpoint.safetensors import FIRST_READ, read_header
from quantserve.checkpoint.source import Source
from quantserve.checkpoint.text import counted, shown, some
from quantserve.finding import Finding

INDEX: Final = "model.safetensors.index.json"
MISTRAL_INDEX: Final = "consolidated.safetensors.index.json"
PICKLE_INDEX: Final = "pytorch_model.bin.index.json"
NOT_WEIGHTS: Final = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
_NUMBERED: Final = re.compile(r"(.*-)(\d{1,6})(-of-)(\d{1,6})(\.\w+)")

MAX_FILES: Final = 5_000
"""Weight files of a checkpoint; Grok-1 has 770."""

MAX_TENSORS: Final = 500_000
"""Tensors of a checkpoint, some seconds and 1 GB; Kimi-K2 in AWQ has 210,000."""

MAX_HEADERS: Final = 256 * 2**20
"""Bytes of all safetensors headers; those of Kimi-K2 in AWQ have 35 MB."""


@dataclass
class Weights:
    """What the weight files hold, and the bytes of the headers it was read from."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    other: dict[str, object] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    header_bytes: int = 0


def weight_names(files: Mapping[str, int]) -> list[str]:
    """All files of `files` that may hold weights."""
    kept = [name for name in files if name.endswith((".safetensors", ".bin", ".pt")) and not name.endswith(NOT_WEIGHTS)]
    return sorted(kept)


def missing_files(source: Source) -> list[str]:
    """Weight files that must exist, going by the index or by numbered names, and do not: is a download complete?"""
    names = weight_names(source.files)
    if not names:
        return ["its weight files"]
    probe = Weights()
    suffix = next(suffix for suffix in (".safetensors", ".bin", ".pt") if any(n.endswith(suffix) for n in names))
    kind = [name for name in names if name.endswith(suffix)]
    listed = _index(source, INDEX if suffix == ".safetensors" else PICKLE_INDEX, kind, probe)
    if listed is None:
        probe.findings += missing_numbers(kind)
    return [name for finding in probe.findings if finding.code == "shard-missing" for name in finding.offenders]


def read_weights(source: Source, allow_pickle: bool, among: Collection[str] | None = None) -> Weights:
    """Read the headers of the files vLLM would choose: safetensors, else ``.bin``, else ``.pt``.

    Args:
        source: the files.
        allow_pickle: whether ``.bin`` and ``.pt`` may be read.
        among: the files to choose from; default all.
    """
    names = weight_names(source.files if among is None else {name: source.files[name] for name in among})
    safetensors = [name for name in names if name.endswith(".safetensors")]
    pickles = [n for n in names if n.endswith(".bin")] or [n for n in names if n.endswith(".pt")]
    weights = Weights()
    if len(names) > MAX_FILES:
        weights.findings.append(_too_large(f"{len(names):,} weight files, the limit is {MAX_FILES:,}"))
    elif safetensors:
        _read_safetensors(source, safetensors, weights)
        beside = [name for name in names if name not in safetensors]
        if beside:
            weights.findings.append(
                Finding.info(
                    "pickle-ignored", f"vLLM does not read {counted(len(beside), 'pickle file')} beside safetensors",
                    some(beside), "delete them to save space",
                )
            )  # fmt: skip
    elif pickles:
        _read_pickles(source, pickles, weights, allow_pickle)
    else:
        weights.findings.append(_nothing(source))
    return weights


def _too_large(what: str) -> Finding:
    fix = "take the files of one model only, or merge its shards"
    return Finding.error("checkpoint-too-large", f"the checkpoint has {what}; the rest was not read", (), fix)


def _full(weights: Weights) -> bool:
    """Whether more has been read than a checkpoint may have; then there is a finding about it."""
    if len(weights.tensors) > MAX_TENSORS:
        weights.findings.append(_too_large(f"more than {MAX_TENSORS:,} tensors"))
    elif weights.header_bytes > MAX_HEADERS:
        weights.findings.append(_too_large(f"more than {MAX_HEADERS:,} bytes of headers"))
    else:
        return False
    return True


def _nothing(source: Source) -> Finding:
    if INDEX in source.files or PICKLE_INDEX in source.files:
        return Finding.error(
            "shard-missing", "there is an index of weight files but none of the files", (), "download the model again"
        )
    pth = sorted(name for name in source.files if name.endswith(".pth"))
    if pth:
        return Finding.error(
            "weights-missing",
            f"the weights are only in *.pth files ({', '.join(some(pth[:3]))}), which vLLM does not look for",
            some(pth),
            "use the version of this model in transformers' format, with *.safetensors files",
        )
    gguf = [name for name in source.files if name.endswith(".gguf")]
    if gguf:
        return Finding.error(
            "weights-missing",
            f"the weights are in the GGUF format ({', '.join(some(gguf[:3]))}), which no installed plugin reads",
            some(gguf),
            "`pip install 'quantserve[gguf]'`, or use the safetensors version of this model; `quantserve list` shows "
            "the plugins that failed",
        )
    return Finding.error(
        "weights-missing",
        f"no weights: none of {counted(len(source.files), 'file')} is *.safetensors, *.bin or *.pt",
        some(source.files),
        "add the weight files, or name another folder",
    )


def _read_safetensors(source: Source, names: list[str], weights: Weights) -> None:
    findings = weights.findings
    consolidated = [name for name in names if name.startswith("consolidated")]
    others = [name for name in names if name not in consolidated]
    chosen = others or consolidated
    if others and consolidated:
        findings.append(
            Finding.info(
                "mistral-format",
                f"the model is here in two formats; it is served from {counted(len(others), 'file')} in transformers' "
                f"format, and {', '.join(some(consolidated))} in Mistral's are not read",
                some(consolidated),
                "delete the consolidated files to save space, or set engine_kwargs load_format, config_format and "
                "tokenizer_mode to mistral to serve from them",
            )
        )
    index = INDEX if others else MISTRAL_INDEX
    listed = _index(source, index, names, weights)
    if listed is not None:
        named = set(listed.values())
        chosen = [name for name in names if name in named]
        stray = [name for name in others if name not in chosen]
        if stray:
            findings.append(
                Finding.warning(
                    "stray-weights",
                    f"{counted(len(stray), 'safetensors file')} not in {index}, which vLLM does not read",
                    some(stray),
                    "delete them, or correct the index if they belong to the model",
                )
            )
    elif len(chosen) > 1 and index not in source.files:
        findings.append(
            Finding.warning(
                "index-missing",
                f"{counted(len(chosen), 'safetensors file')} without {index}: vLLM reads them all",
                some(chosen),
                f"add {index}, and delete files that do not belong to the model",
            )
        )
    if listed is None:
        findings += missing_numbers(chosen)
    source.prefetch((name, FIRST_READ) for name in chosen)
    readable = _read_files(source, chosen, weights)
    if listed is not None:
        _compare(listed, readable, weights)


def _read_files(source: Source, names: list[str], weights: Weights) -> set[str]:
    """Read every header into `weights`; returns the files that could be read."""
    readable: set[str] = set()
    twice: list[str] = []
    for name in names:
        try:
            with source.open(name) as file:
                tensors, found, metadata = read_header(file, name, source.files[name])
                weights.header_bytes += file.tell()
        except OSError as error:
            weights.findings.append(_unreadable(name, error))
            continue
        weights.findings += found
        weights.metadata = {**metadata, **weights.metadata}
        if tensors or not found:
            readable.add(name)
        _merge(tensors, weights, twice)
        if _full(weights):
            break
    _report_twice(twice, weights)
    return readable


def _merge(tensors: dict[str, Tensor], weights: Weights, twice: list[str]) -> None:
    if weights.tensors.keys() & tensors.keys():
        twice += [
            f"{shown(name)} in {shown(weights.tensors[name].file)} and {shown(tensor.file)}"
            for name, tensor in tensors.items()
            if name in weights.tensors
        ]
    weights.tensors |= tensors


def _report_twice(twice: list[str], weights: Weights) -> None:
    if twice:
        weights.findings.append(
            Finding.error(
                "duplicate-tensor",
                f"{counted(len(twice), 'tensor')} in two files, and vLLM keeps whichever it reads last: {twice[0]}",
                some(twice),
                "delete the files that do not belong to the model",
            )
        )


def _unreadable(name: str, error: OSError) -> Finding:
    return Finding.error(
        "file-unreadable",
        f"{shown(name)} cannot be read: {error.strerror or error}",
        some([name]),
        "check the permissions of the file, or download it again",
    )


def _index(source: Source, index: str, names: list[str], weights: Weights) -> dict[str, str] | None:
    """Tensor -> file of an index whose file names are sound; None without a usable index."""
    value, found = read_object(source, index, "index-invalid", f"download {index} again")
    weights.findings += found
    if value is None:
        return None
    table, there = value.get("weight_map"), frozenset(names)
    if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
        what = "has no weight_map object" if not isinstance(table, dict) else "maps tensors to what are no file names"
        bad = [] if not isinstance(table, dict) else [k for k, file in table.items() if not isinstance(file, str)]
        weights.findings.append(Finding.error("index-invalid", f"{index} {what}", some(bad), f"download {index} again"))
        return None
    if len(table) > MAX_TENSORS:
        what = f"{index} names {len(table):,} tensors, the limit is {MAX_TENSORS:,}"
        weights.findings.append(Finding.error("index-invalid", what, (), f"download {index} again"))
        return None
    files = sorted(set(table.values()))
    escaping = [file for file in files if _escapes(file)]
    nested = [file for file in files if "/" in file and not _escapes(file)]
    absent = [file for file in files if "/" not in file and not _escapes(file) and file not in there]
    if escaping:
        weights.findings.append(
            Finding.error(
                "path-escape",
                f"{index} names files outside the folder: {', '.join(some(escaping))}; they were not opened",
                some(escaping),
                "take the model from a source you trust",
            )
        )
    if nested:
        weights.findings.append(
            Finding.error(
                "shard-subfolder",
                f"{index} names files in sub-folders, where vLLM does not look: {', '.join(some(nested))}",
                some(nested),
                "move the files beside config.json and correct the index",
            )
        )
    if absent:
        whole = "model.safetensors"
        stale = f", or delete {index} if {whole} is the whole model" if whole in there and whole not in files else ""
        weights.findings.append(
            Finding.error(
                "shard-missing",
                f"{len(absent)} of {counted(len(files), 'file')} in {index} missing: {', '.join(some(absent[:5]))}",
                some(absent),
                f"download the missing files{stale}",
            )
        )
    return table


def _escapes(file: str) -> bool:
    parts = file.replace("\\", "/").split("/")
    return not file or ".." in parts or parts[0] == "" or ":" in parts[0] or "\\" in file or "\0" in file


def missing_numbers(names: Iterable[str]) -> list[Finding]:
    """Without an index, the names themselves (``model-00001-of-00003``) tell which files are missing."""
    families: dict[tuple[str, str, str], set[int]] = {}
    for name in names:
        if found := _NUMBERED.fullmatch(name):
            families.setdefault((found[1], found[4], found[5]), set()).add(int(found[2]))
    findings = []
    for (stem, total, suffix), numbers in families.items():
        missing = int(total) - len(numbers)
        if missing > 0:
            absent = islice((n for n in range(1, int(total) + 1) if n not in numbers), 20)
            offenders = [f"{stem}{n:0{len(total)}d}-of-{total}{suffix}" for n in absent]
            findings.append(
                Finding.error(
                    "shard-missing",
                    f"{missing} of {int(total)} files missing: {', '.join(some(offenders[:5]))}",
                    some(offenders),
                    "download the missing files",
                )
            )
    return findings


def _compare(listed: dict[str, str], readable: set[str], weights: Weights) -> None:
    """The index against the headers. vLLM reads whole files, so only a tensor that is nowhere is an error."""
    tensors = weights.tensors
    absent = [name for name, file in listed.items() if name not in tensors and file in readable]
    moved = [name for name, file in listed.items() if name in tensors and tensors[name].file != file]
    unlisted = [name for name in tensors if name not in listed]
    if absent:
        first = f"{shown(absent[0])} in {shown(listed[absent[0]])}"
        weights.findings.append(
            Finding.error(
                "index-tensor-missing",
                f"{counted(len(absent), 'tensor')} named in {INDEX} but absent from the file: {first}",
                some(absent),
                "download the files again; index and shards are of different versions",
            )
        )
    if moved:
        first = f"{shown(moved[0])} is in {shown(tensors[moved[0]].file)}, not {shown(listed[moved[0]])}"
        weights.findings.append(
            Finding.warning(
                "index-mismatch",
                f"{counted(len(moved), 'tensor')} in another file than {INDEX} says: {first}",
                some(moved),
                "write the index again",
            )
        )
    if unlisted:
        weights.findings.append(
            Finding.warning(
                "index-tensor-unlisted",
                f"{counted(len(unlisted), 'tensor')} not named in {INDEX}, which vLLM loads all the same: "
                f"{shown(unlisted[0])}",
                some(unlisted),
                "write the index again, or delete the file they come from",
            )
        )


def _read_pickles(source: Source, names: list[str], weights: Weights, allow_pickle: bool) -> None:
    if not allow_pickle:
        weights.findings.append(
            Finding.error(
                "pickle-weights",
                f"the weights are only in pickle files ({', '.join(some(names[:3]))}), which can run code when loaded",
                some(names),
                "convert them with `quantserve convert`, or set engine_config.allow_pickle: true if you trust them",
            )
        )
        return
    weights.findings.append(
        Finding.warning(
            "pickle-allowed",
            f"the weights are pickle files ({', '.join(some(names[:3]))}), allowed by allow_pickle",
            some(names),
            "convert them to safetensors with `quantserve convert`",
        )
    )
    listed = _index(source, PICKLE_INDEX, names, weights)
    if listed is None:
        weights.findings += missing_numbers(names)
    from quantserve.checkpoint.pickle_machine import Budget  # here, because `quantserve list` reads no pickle
    from quantserve.checkpoint.pickles import read_pickle

    twice: list[str] = []
    budget = Budget()
    for name in names:
        try:
            with source.open(name) as file:
                tensors, other, found = read_pickle(file, name, budget)
        except OSError as error:
            weights.findings.append(_unreadable(name, error))
            continue
        weights.findings += found
        weights.other |= other
        _merge(tensors, weights, twice)
        if budget.left < 0 or _full(weights):
            break
    _report_twice(twice, weights)
