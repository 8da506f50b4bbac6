"""open_checkpoint: a folder, a cached snapshot or a hub repository in, a `Checkpoint` out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from quantserve.checkpoint import weights
from quantserve.checkpoint.configs import json_names, read_configs
from quantserve.checkpoint.data import Checkpoint
from quantserve.checkpoint.local import Folder, find_folder, missing, nothing_here
from quantserve.checkpoint.mistral import PARAMS, is_mistral_format, translated
from quantserve.checkpoint.source import Source
from quantserve.checkpoint.text import shown
from quantserve.errors import CheckpointError

_HUB_ID: Final = re.compile(r"(?!.*(--|\.\.))\w[\w.-]{0,95}(/\w[\w.-]{0,95})?(?<![.-])", re.ASCII)


def open_checkpoint(source: str, *, revision: str | None = None, allow_pickle: bool = False) -> Checkpoint:
    """Read everything about a checkpoint except its weights.

    An existing folder wins; otherwise `source` is a hub id, looked up in the HF cache first (a snapshot with config
    and all weight files is used as it is) and then on the hub by range requests. HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE,
    HF_HUB_CACHE and HF_HUB_DOWNLOAD_TIMEOUT are respected; nothing is written to the cache.

    Args:
        source: a folder, ``org/name`` or ``org/name@revision``.
        revision: branch, tag or commit of a hub id.
        allow_pickle: read names and shapes of ``.bin`` and ``.pt`` files, without running what is in them.

    Raises:
        CheckpointError: nothing is there, or it cannot be reached, or access is refused. A file that is damaged is no
            error but a finding in `Checkpoint.problems`.
    """
    folder = find_folder(source)
    if folder is not None:
        opened: Source = Folder(folder)
        known = {"config.json", PARAMS} & opened.files.keys() or any(name.endswith(".gguf") for name in opened.files)
        if not known and not weights.weight_names(opened.files):
            raise CheckpointError(nothing_here(Folder(folder)))
    else:
        opened = _open_hub(source, revision)
    return _read(source, opened, allow_pickle)


def _open_hub(source: str, revision: str | None) -> Source:
    repo, at, named = source.partition("@")
    if at:
        if not named or revision not in {None, named}:
            raise CheckpointError(
                f"{shown(source)!r} and revision {revision!r} name different revisions\n  fix: give the revision once"
            )
        revision = named
    if not _HUB_ID.fullmatch(repo):
        if not repo:
            raise CheckpointError("the name of the model is empty\n  fix: name a folder or a hub id, org/name")
        raise CheckpointError(missing(source, Path(source)))
    from quantserve.checkpoint.hub import open_repository  # huggingface_hub takes 0.3 s to import

    return open_repository(repo, revision)


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
