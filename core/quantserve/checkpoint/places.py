"""Where a name leads: a folder, a bucket, a cached snapshot or a repository on the hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from quantserve.checkpoint.local import Folder, find_folder, missing
from quantserve.checkpoint.source import Source
from quantserve.checkpoint.text import shown
from quantserve.errors import CheckpointError
from quantserve.system.homes import is_bucket

_HUB_ID: Final = re.compile(r"(?!.*(--|\.\.))\w[\w.-]{0,95}(/\w[\w.-]{0,95})?(?<![.-])", re.ASCII)


def find_source(place: str, revision: str | None, lacking: Callable[[Folder], list[str]]) -> Source:
    """The files that a name stands for; an existing path wins.

    Args:
        place: a folder, ``org/name``, ``org/name@revision``, ``s3://bucket/folder`` or ``gs://bucket/folder``.
        revision: branch, tag or commit of a hub id; of a bucket the digest of its files.
        lacking: gives the files that a cached copy lacks.

    Raises:
        CheckpointError: nothing is there, or it cannot be reached, or access is refused.
    """
    if is_bucket(place):
        from quantserve.checkpoint.bucket import open_bucket  # the libraries of object stores are heavy

        return open_bucket(place, revision, lacking)
    folder = find_folder(place)
    return Folder(folder) if folder is not None else _open_hub(place, revision, lacking)


def _open_hub(source: str, revision: str | None, lacking: Callable[[Folder], list[str]]) -> Source:
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

    return open_repository(repo, revision, lacking)
