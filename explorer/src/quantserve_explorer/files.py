"""The page's files, read once: content, compressed content, hash."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".woff2": "font/woff2",
    ".md": "text/plain; charset=utf-8",
    "": "text/plain; charset=utf-8",
}
"""Media types by suffix; other files are not served."""
PACKED: Final = (".png", ".woff2")


@dataclass(frozen=True)
class File:
    """A file of the page.

    Attributes:
        path: of its address, ``/explorer/app.js``.
        content, compressed: its bytes, and with gzip where that is shorter.
        media_type: with the charset.
        etag: of the content, with quotes.
    """

    path: str
    content: bytes
    compressed: bytes
    media_type: str
    etag: str


def read_files(folder: Path, prefix: str) -> dict[str, File]:
    """The files of a folder by their paths below `prefix`; hidden ones are left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        names = path.relative_to(folder).parts
        if path.suffix not in TYPES or not path.is_file() or any(name.startswith(".") for name in names):
            continue
        content = path.read_bytes()
        compressed = b"" if path.suffix in PACKED else gzip.compress(content, 9, mtime=0)
        address = "/".join((prefix, *names))
        etag = f'"{sha256(content).hexdigest()[:32]}"'
        smaller = compressed if len(compressed) < len(content) else b""
        found[address] = File(address, content, smaller, TYPES[path.suffix], etag)
    return found
