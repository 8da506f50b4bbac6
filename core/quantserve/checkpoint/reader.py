"""open_checkpoint: a folder, a cached snapshot or a hub repository in, a `Checkpoint` out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import PurePath

from quantserve.checkpoint import weights
from quantserve.checkpoint.configs import json_names, read_configs
from quantserve.checkpoint.containers import Reader, chosen, container_file, containers
from quantserve.checkpoint.data import Checkpoint
from quantserve.checkpoint.local import Folder, nothing_here
from quantserve.checkpoint.mistral import PARAMS, is_mistral_format, translated
from quantserve.checkpoint.places import find_source
from quantserve.checkpoint.source import Source
from quantserve.errors import CheckpointError
from quantserve.finding import Severity
from quantserve.system.homes import is_bucket, parted


def open_checkpoint(
    source: str, *, revision: str | None = None, allow_pickle: bool = False, readers: Sequence[Reader] = ()
) -> Checkpoint:
    """Read everything about a checkpoint except its weights.

    An existing path wins; otherwise `source` is a hub id, looked up in the HF cache first (a snapshot with config
    and all weight files is used as it is) and then on the hub by range requests. HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE,
    HF_HUB_CACHE and HF_HUB_DOWNLOAD_TIMEOUT are respected. The files of a bucket are read in the same way. Nothing is
    written to a cache.

    Args:
        source: a folder, ``org/name``, ``org/name@revision``, ``s3://bucket/folder`` or ``gs://bucket/folder``; with a
            reader also a file, or one of these with ``:CHOICE``.
        revision: branch, tag or commit of a hub id; of a bucket the digest of its files.
        allow_pickle: read names and shapes of ``.bin`` and ``.pt`` files, without running what is in them.
        readers: of containers other than safetensors. They are asked where a file of theirs is chosen, or where there
            are no weights that the core reads itself.

    Raises:
        CheckpointError: nothing is there, or it cannot be reached, or access is refused. A file that is damaged is no
            error but a finding in `Checkpoint.problems`.
    """
    by_suffix = {suffix: reader for reader in readers for suffix in reader.suffixes}
    place, choice = parted(source)
    if is_bucket(place) and PurePath(place).suffix in by_suffix:
        place, _, choice = place.rpartition("/")
    elif file := container_file(place, by_suffix):
        place, choice = str(file.parent), file.name
    opened = find_source(place, revision, partial(_lacking, suffixes=by_suffix, choice=choice))
    names = chosen(opened, by_suffix, choice, source)
    known = {"config.json", PARAMS} & opened.files.keys() or any(name.endswith(".gguf") for name in opened.files)
    if not known and not names and not weights.weight_names(opened.files) and isinstance(opened, Folder):
        raise CheckpointError(nothing_here(opened))
    if names:
        return _read_container(source, opened, names, by_suffix[PurePath(names[0]).suffix])
    return _read(source, opened, allow_pickle)


def _lacking(folder: Folder, suffixes: Collection[str], choice: str) -> list[str]:
    """The files that a cached snapshot lacks."""
    if choice or (containers(folder.files, suffixes) and not weights.weight_names(folder.files)):
        try:
            found = weights.missing_numbers(chosen(folder, suffixes, choice, ""))
        except CheckpointError:
            return [choice or "its config.json"]
        return [name for finding in found for name in finding.offenders]
    return weights.missing_files(folder) if "config.json" in folder.files else ["config.json"]


def _read_container(name: str, source: Source, names: tuple[str, ...], reader: Reader) -> Checkpoint:
    """Read the chosen files; what they say of config and tokenizer counts, else the JSON files beside them."""
    source.prefetch((file, source.files[file]) for file in json_names(source))
    config, quant_files, tokenizer, findings = read_configs(source)
    contents = reader.read(source, names)
    damaged = any(problem.severity is Severity.ERROR for problem in contents.problems)
    told = [
        *(["config-missing"] if contents.config or damaged else []),
        *(["tokenizer-missing"] if contents.tokenizer.get("present") or damaged else []),
    ]
    return Checkpoint(
        source=name,
        location=source.location,
        path=source.path,
        revision=source.revision,
        files=dict(source.files),
        config=contents.config or config,
        quant_files=quant_files,
        tokenizer=contents.tokenizer or tokenizer,
        tensors={tensor.name: tensor for tensor in contents.tensors},
        metadata=contents.metadata,
        container=names,
        problems=(
            *source.findings,
            *(finding for finding in findings if finding.code not in told),
            *weights.missing_numbers(names),
            *contents.problems,
        ),
    )


def _read(name: str, source: Source, allow_pickle: bool) -> Checkpoint:
    sizes: Mapping[str, int] = source.files
    wanted = json_names(source)
    wanted += [index for index in (weights.INDEX, weights.MISTRAL_INDEX, weights.PICKLE_INDEX) if index in sizes]
    source.prefetch((file, sizes[file]) for file in wanted)
    config, quant_files, tokenizer, findings = read_configs(source)
    found = weights.read_weights(source, allow_pickle)
    tensors = found.tensors
    if "config.json" not in sizes and is_mistral_format(sizes):
        tensors = {translated(old): replace(tensor, name=translated(old)) for old, tensor in tensors.items()}
    return Checkpoint(
        source=name,
        location=source.location,
        path=source.path,
        revision=source.revision,
        files=dict(sizes),
        config=config,
        quant_files=quant_files,
        tokenizer=tokenizer,
        tensors=tensors,
        other=found.other,
        metadata=found.metadata,
        problems=(*source.findings, *findings, *found.findings),
    )
