"""Readers of other containers: what a plugin's reader must keep to, and the guard it runs under.

What a file can cause is a finding about the file: damage, a tensor named twice, sizes beyond every model. What only the
plugin can cause is its defect: a wrong type, an exception that it did not foresee.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

from quantserve.checkpoint.configs import MAX_JSON
from quantserve.checkpoint.containers import BadContainer, Contents, Reader
from quantserve.checkpoint.data import DTYPE_BITS, Location, Tensor
from quantserve.checkpoint.safetensors import AGAIN, FIRST_READ
from quantserve.checkpoint.source import Source
from quantserve.checkpoint.text import counted, shown, some
from quantserve.checkpoint.weights import MAX_FILES, MAX_HEADERS, MAX_TENSORS
from quantserve.errors import CheckpointError
from quantserve.finding import Finding
from quantserve.plugins import foreign
from quantserve.plugins.contract import LONGEST_NAME, MOST_NAMES, MOST_READ, findings_of, json_of
from quantserve.plugins.foreign import Breach

if TYPE_CHECKING:
    from quantserve.plugins.plugin import Plugin

HOOK: Final = "quantserve_reader"
PARTS: Final = 6
"""Reading may take so many times as long as a hook: a header on the hub is fetched meanwhile."""
CORES: Final = (".safetensors", ".bin", ".pt", ".json", ".yaml", ".yml")
"""Suffixes of files that the core reads itself."""
LONGEST_TENSOR_NAME: Final = 500
MOST_DIMENSIONS: Final = 16
FACTS: Final[Mapping[str, type]] = MappingProxyType(
    {
        "present": bool,
        "is_remote_code": bool,
        "has_chat_template": bool,
        "max_token_id": int,
        "max_base_token_id": int,
        "max_seq_length": int,
        "model_max_length": int,
    }
)
"""The facts of a tokenizer; numbers may be None."""

_SUFFIX: Final = re.compile(r"\.[a-z0-9_]{1,31}")


def reader_of(returned: object) -> Reader:
    """The value of ``quantserve_reader``."""
    if not isinstance(returned, Reader):
        raise Breach(f"returned {type(returned).__name__}, not Reader or None")
    if not isinstance(returned.suffixes, tuple) or not 0 < len(returned.suffixes) <= MOST_NAMES:
        raise Breach(f"Reader.suffixes must be a tuple of 1 to {MOST_NAMES} suffixes: {returned.suffixes!r:.80}")
    for suffix in returned.suffixes:
        if not isinstance(suffix, str) or not _SUFFIX.fullmatch(suffix):
            raise Breach(f"Reader.suffixes: {suffix!r:.80} must be a dot, and lower-case letters, digits and _")
        if suffix in CORES:
            raise Breach(f"Reader.suffixes: *{suffix} files are read by the core itself")
    if not callable(returned.read):
        raise Breach(f"Reader.read is {type(returned.read).__name__}, which cannot be called")
    return Reader(tuple(dict.fromkeys(map(str, returned.suffixes))), returned.read)


def guarded(plugin: Plugin) -> Reader:
    """A plugin's reader whose ``read`` gives plain data of bounded size, and findings for damaged files.

    It raises `CheckpointError` when the hub cannot be reached, and `PluginError` for a defect of the plugin.
    """
    reader = plugin.reader
    assert reader is not None

    def read(source: Source, names: tuple[str, ...]) -> Contents:
        if len(names) > MAX_FILES:
            return _damaged(names, "checkpoint-too-large", f"{len(names):,} files, the limit is {MAX_FILES:,}")
        files = _Files(source)

        def code() -> Contents | CheckpointError:
            try:
                return contents_of(reader.read(files, names), plugin, {name: files.files[name] for name in names})
            except BadContainer as error:
                return _damaged(files.opened or names, "header-invalid", str(error))
            except (OSError, CheckpointError) as error:
                if error is not files.error:
                    raise
                if isinstance(error, CheckpointError):
                    return error
                return _damaged(files.opened or names, "file-unreadable", error.strerror or str(error))

        made = plugin.run(HOOK, code, foreign.hook_seconds() * PARTS)
        if isinstance(made, CheckpointError):
            raise made
        return cast(Contents, made)

    return replace(reader, read=read)


def _damaged(names: tuple[str, ...], code: str, what: str) -> Contents:
    """Contents of which only that is known."""
    message = f"{shown(names[-1])} cannot be read: {what}"
    return Contents(problems=(Finding.error(code, message, some(names[-1:]), AGAIN),))


def contents_of(returned: object, plugin: Plugin, sizes: Mapping[str, int]) -> Contents:
    """What a reader returned, as plain data.

    Args:
        returned: by the reader.
        plugin: whose reader.
        sizes: bytes of each file that it was given, -1 where unknown.

    Raises:
        Breach: the plugin does not keep the contract.
        BadContainer: the file says something impossible.
    """
    if not isinstance(returned, Contents):
        raise Breach(f"returned {type(returned).__name__}, not Contents")
    names = [*(plugin.method.names if plugin.method else ()), plugin.name]
    problems, _ = findings_of(returned.problems, names)
    if not isinstance(returned.config, Mapping):
        raise Breach(f"Contents.config is {type(returned.config).__name__}, not a mapping")
    if not isinstance(returned.tensors, Iterable) or isinstance(returned.tensors, str | bytes | Mapping):
        raise Breach(f"Contents.tensors is {type(returned.tensors).__name__}, not tensors")
    tensors: dict[str, Tensor] = {}
    for tensor in islice(returned.tensors, MAX_TENSORS + 1):
        made = _tensor_of(tensor, sizes)
        if made.name in tensors:
            raise BadContainer(f"tensor {shown(made.name)} is in it twice")
        tensors[made.name] = made
    if len(tensors) > MAX_TENSORS:
        what = f"more than {MAX_TENSORS:,} tensors; the rest was not read"
        problems.append(Finding.error("checkpoint-too-large", f"the checkpoint has {what}", (), AGAIN))
    return Contents(
        config=json_of(dict(returned.config), "config", MAX_JSON),
        tensors=tuple(tensors.values()),
        tokenizer=_facts_of(returned.tokenizer),
        metadata=_metadata_of(returned.metadata),
        problems=(*(problem.said_by(plugin.name) for problem in problems), *_cut_off(tensors.values(), sizes)),
    )


def _tensor_of(tensor: object, sizes: Mapping[str, int]) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise Breach(f"returned {type(tensor).__name__} among its tensors, not Tensor")
    name, dtype, shape, stored = tensor.name, tensor.dtype, tensor.shape, tensor.stored
    if type(name) is not str or type(dtype) is not str or type(shape) is not tuple:
        raise Breach(
            f"Tensor {name!r:.80}: name and dtype must be text, and shape a tuple: {dtype!r:.40} {shape!r:.80}"
        )
    if tensor.file not in sizes:
        raise Breach(f"Tensor {name!r:.80}: file {tensor.file!r:.80} is none of those given to the reader")
    if not all(type(size) is int for size in shape) or not (stored is None or type(stored) is int):
        raise Breach(f"Tensor {name!r:.80}: shape and stored must be integers: {shape!r:.80}, {stored!r:.40}")
    if stored is None and dtype not in DTYPE_BITS:
        raise Breach(
            f"Tensor {name!r:.80}: dtype {dtype!r:.40} is not one of safetensors, so `stored` must give its bytes"
        )
    if not name or len(name) > LONGEST_TENSOR_NAME or len(dtype) > LONGEST_NAME:
        raise BadContainer(
            f"the name of a tensor has {len(name):,} characters, and its dtype {len(dtype):,}; the limits are "
            f"{LONGEST_TENSOR_NAME} and {LONGEST_NAME}"
        )
    elements = 1
    for size in shape[: MOST_DIMENSIONS + 1]:
        elements *= max(size, 1)
        if size < 0 or elements >= 2**56:
            raise BadContainer(f"tensor {shown(name)} has the shape {str(list(shape[:MOST_DIMENSIONS]))[:200]}")
    if len(shape) > MOST_DIMENSIONS or not 0 <= (stored or 0) < 2**63:
        raise BadContainer(f"tensor {shown(name)} has {counted(len(shape), 'dimension')} and {stored} bytes")
    return Tensor(name, dtype, shape, tensor.file, stored)


def _cut_off(tensors: Iterable[Tensor], sizes: Mapping[str, int]) -> list[Finding]:
    """The files that are smaller than the tensors in them."""
    needed = dict.fromkeys(sizes, 0)
    for tensor in tensors:
        needed[tensor.file] += tensor.nbytes
    return [
        Finding.error(
            "file-truncated",
            f"{shown(name)} is cut off: its tensors take {needed[name]:,} bytes, and it has {size:,}",
            some([name]),
            AGAIN,
        )
        for name, size in sizes.items()
        if 0 <= size < needed[name]
    ]


def _facts_of(facts: object) -> dict[str, Any]:
    if not isinstance(facts, Mapping):
        raise Breach(f"Contents.tokenizer is {type(facts).__name__}, not a mapping")
    if not facts:
        return {}
    made: dict[str, Any] = {name: False if kind is bool else None for name, kind in FACTS.items()}
    for name, value in islice(facts.items(), MOST_NAMES):
        if name not in FACTS:
            raise Breach(f"Contents.tokenizer: unknown fact {name!r:.80} (known: {', '.join(FACTS)})")
        if not (type(value) is FACTS[name] or (value is None and FACTS[name] is int)):
            raise Breach(f"Contents.tokenizer[{name!r}] must be {FACTS[name].__name__}: {value!r:.80}")
        if type(value) is int and not 0 <= value < 2**63:
            raise BadContainer(f"the tokenizer's {name} is {value!r:.40}")
        made[name] = value
    return made


def _metadata_of(metadata: object) -> dict[str, str]:
    if not isinstance(metadata, Mapping):
        raise Breach(f"Contents.metadata is {type(metadata).__name__}, not a mapping")
    made = dict(islice(metadata.items(), MOST_READ))
    if not all(type(text) is str for item in made.items() for text in item):
        raise Breach("Contents.metadata must map text to text")
    if (length := sum(len(key) + len(value) for key, value in made.items())) > MAX_JSON:
        raise BadContainer(f"its metadata have {length:,} characters, the limit is {MAX_JSON:,}")
    return made


class _Files:
    """The files of a checkpoint for a reader: 256 MiB may be read, and errors of the files are kept apart from its own.

    See `Source`.

    Attributes:
        opened: the files opened so far, the one in use last.
        error: the last error of a file or the hub.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._left = MAX_HEADERS
        self.files: Mapping[str, int] = MappingProxyType(source.files)
        self.opened: tuple[str, ...] = ()
        self.error: Exception | None = None

    @property
    def location(self) -> Location:
        """As of the source."""
        return self._source.location

    @property
    def path(self) -> Path | None:
        """As of the source."""
        return self._source.path

    @property
    def revision(self) -> str | None:
        """As of the source."""
        return self._source.revision

    @property
    def findings(self) -> list[Finding]:
        """None: the core has said what is wrong with the files themselves."""
        return []

    def prefetch(self, sizes: Iterable[tuple[str, int]]) -> None:
        """Fetch the beginnings of files, at most what may be read."""
        wanted = [(name, min(size, self._left)) for name, size in islice(sizes, MAX_FILES) if name in self.files]
        with self._watched():
            self._source.prefetch(wanted[: max(1, self._left // FIRST_READ)])

    def open(self, name: str) -> BinaryIO:
        """Open a file of `files`, buffered."""
        if name not in self.files:
            raise FileNotFoundError(2, f"the checkpoint has no file {name!r:.80}")
        self.opened = (*(other for other in self.opened if other != name), name)
        with self._watched():
            file = self._source.open(name)
        return cast(BinaryIO, io.BufferedReader(_File(file, self), FIRST_READ))

    def take(self, file: BinaryIO, size: int) -> bytes:
        """Read from a file. Raises BadContainer when all files together have given what they may."""
        if size > self._left:
            raise BadContainer(f"its header has more than {MAX_HEADERS:,} bytes")
        with self._watched():
            data = file.read(size)
        self._left -= len(data)
        return data

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except (OSError, CheckpointError) as error:
            self.error = error
            raise


class _File(io.RawIOBase):
    """One file that a reader has opened."""

    def __init__(self, file: BinaryIO, files: _Files) -> None:
        super().__init__()
        self._file, self._files = file, files

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Position of the next read."""
        return self._file.tell()

    def readinto(self, buffer: Any, /) -> int:
        """Read into a buffer."""
        data = self._files.take(self._file, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            self._file.close()
        super().close()
