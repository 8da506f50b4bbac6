"""A folder that vLLM can open as a model, made of a .gguf file: links to the files, config and tokenizer.

It is made once for each file, in vLLM's cache, and appears whole. The weights stay where they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from quantserve.api import Checkpoint, Reader, Severity
from quantserve.checkpoint import open_checkpoint
from quantserve_gguf.header import Header, read_header
from quantserve_gguf.reader import read

READER = Reader((".gguf",), read)
VERSION = "1"
"""Of what is written; another version makes another folder."""
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt")


def folder_of(model: str, revision: str | None, cache: Path) -> Path | None:
    """The folder of a model in GGUF; None where `model` is none.

    Args:
        model: a file, or a folder or hub id that has one, perhaps with ``:CHOICE``.
        revision: of a hub id.
        cache: where folders are made.

    Raises:
        ValueError: the file cannot be served; the message lists what is wrong.
        CheckpointError: nothing is there, or several files fit.
    """
    checkpoint = open_checkpoint(model, revision=revision, readers=(READER,))
    if not checkpoint.container:
        return None
    errors = [problem for problem in checkpoint.problems if problem.severity is Severity.ERROR]
    if errors:
        raise ValueError("; ".join(problem.message for problem in errors))
    files = _files(checkpoint)
    marks = [(str(file), os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    key = sha256(json.dumps([VERSION, marks, dict(checkpoint.config)], default=str).encode()).hexdigest()[:24]
    folder = cache / key
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=cache))
    try:
        _write(draft, checkpoint, files)
        with contextlib.suppress(OSError):  # another process was first
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    if not folder.is_dir():
        raise ValueError(f"{folder} cannot be made")
    return folder


def _files(checkpoint: Checkpoint) -> list[Path]:
    """The files on this machine; fetched where they are on the hub."""
    if checkpoint.path is not None:
        return [(checkpoint.path / name).absolute() for name in checkpoint.container]
    from huggingface_hub import hf_hub_download

    repository = checkpoint.source.rpartition(":")[0] or checkpoint.source
    return [
        Path(hf_hub_download(repository.partition("@")[0], name, revision=checkpoint.revision))
        for name in checkpoint.container
    ]


def _write(folder: Path, checkpoint: Checkpoint, files: Sequence[Path]) -> None:
    for file in files:
        (folder / file.name).symlink_to(file)
    with files[0].open("rb") as opened:
        header = read_header(opened)
    (folder / "config.json").write_text(json.dumps(dict(checkpoint.config), indent=2, default=dict) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(_generation(header), indent=2) + "\n")
    if "tokenizer.ggml.model" in header.metadata:
        _write_tokenizer(folder, header, files[0])
        return
    for pattern in TOKENIZER_FILES:
        for file in files[0].parent.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def _generation(header: Header) -> dict[str, Any]:
    """Where generation ends: at the end of the text, and of a turn where the file names another token for that."""
    tokens = [header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom")]
    ends = list(dict.fromkeys(token for token in tokens[1:] if type(token) is int))
    made: dict[str, Any] = {"eos_token_id": ends} if ends else {}
    return {"bos_token_id": tokens[0], **made} if type(tokens[0]) is int else made


def _write_tokenizer(folder: Path, header: Header, file: Path) -> None:
    """The tokenizer of the header, as transformers builds it, with the start token where the file asks for one."""
    from tokenizers.processors import Sequence as Processors
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, described, special = get_gguf_tokenizer(str(file))
    backend, _ = convert_gguf_tokenizer(architecture, described)
    start, number = special.get("bos_token"), header.metadata.get("tokenizer.ggml.bos_token_id")
    if start is not None and type(number) is int and _starts(header):
        pair = f"{start} $A {start} $B"
        begin = TemplateProcessing(single=f"{start} $A", pair=pair, special_tokens=[(start, number)])
        before = backend.post_processor
        backend.post_processor = begin if before is None else Processors([before, begin])
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def _starts(header: Header) -> bool:
    """Whether texts begin with the start token: as the file says, else as llama.cpp does by itself."""
    said = header.metadata.get("tokenizer.ggml.add_bos_token")
    if isinstance(said, bool):
        return said
    kind, rule = (header.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    return kind == "llama" or rule in ("llama3", "llama-v3", "llama-bpe", "tekken")
