"""A model repository on the Hugging Face hub: its cached snapshot, or byte ranges of its files over HTTP.

Sessions, tokens, offline mode and the cache layout are huggingface_hub's; the requests are made here, because a header
needs the first kilobytes of a file of gigabytes, within a bounded time, from servers that may ignore ranges. The client
drops the token when a redirect leaves the host.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

from huggingface_hub import constants, get_session, get_token, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import build_hf_headers, validate_repo_id  # type: ignore[attr-defined]

from quantserve.checkpoint.local import Folder
from quantserve.checkpoint.ranges import Remote
from quantserve.checkpoint.text import shown, some
from quantserve.errors import CheckpointError

TransportError: Final[type[Exception]] = HfHubHTTPError.__bases__[0]
"""The base of all errors of the HTTP library huggingface_hub uses (httpx or its successor)."""

ATTEMPTS: Final = 3
MAX_LISTING: Final = 32 * 2**20
MAX_SKIPPED: Final = 110 * 2**20
"""Bytes read and thrown away when a server ignores ranges; anything further into a file is refused."""


def open_repository(repo: str, revision: str | None, lacking: Callable[[Folder], list[str]]) -> Folder | Repository:
    """The cached snapshot when it is complete, else the repository on the hub.

    Args:
        lacking: gives the files that a snapshot lacks.

    Raises:
        CheckpointError: neither can be had.
    """
    folder = _cached(repo, revision)
    lacks = lacking(folder) if folder else []
    if folder is not None and not lacks:
        return folder
    if constants.HF_HUB_OFFLINE:
        name = repo if revision is None else f"{repo}@{revision}"
        have = f"its cached snapshot lacks {', '.join(some(lacks[:5]))}" if folder else "it is not in the HF cache"
        raise CheckpointError(
            f"cannot open {name}: HF_HUB_OFFLINE is set and {have}\n"
            f"  fix: unset HF_HUB_OFFLINE, or run `hf download {repo}` once with network access"
        )
    return Repository.listed(repo, revision)


def _cached(repo: str, revision: str | None) -> Folder | None:
    """The snapshot in the cache."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise CheckpointError(f"{shown(repo)!r} is no hub id: {error}\n  fix: name a model as org/name") from None
    cache = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"))
    commit = revision or "main"
    try:
        if commit in {ref.relative_to(cache / "refs").as_posix() for ref in (cache / "refs").rglob("*")}:
            commit = (cache / "refs" / commit).read_text().strip()
        if commit not in {path.name for path in (cache / "snapshots").iterdir()}:
            return None
    except (OSError, ValueError):
        return None
    path = cache / "snapshots" / commit
    return Folder(path, location="cache", revision=path.name)


@dataclass
class Repository(Remote):
    """The top-level files of a repository at one commit. See `Source`."""

    repo: str = ""

    @classmethod
    def listed(cls, repo: str, revision: str | None) -> Repository:
        """Ask the hub for the commit and its files. Raises CheckpointError."""
        endpoint = _endpoint()
        url = f"{endpoint}/api/models/{repo}/revision/{quote(revision or 'main', safe='')}?blobs=true"
        raw, _ = _Request(repo, revision, "the list of files", url).read(0, MAX_LISTING)
        try:
            listing = json.loads(raw)
            commit, siblings = listing["sha"], listing["siblings"]
            files = {str(item["rfilename"]): item.get("size") for item in siblings}
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise CheckpointError(
                f"{_host()} does not answer like the Hugging Face hub when asked for {repo}\n"
                "  fix: check HF_ENDPOINT and any proxy in between"
            ) from None
        sizes = {name: size if type(size) is int and size >= 0 else -1 for name, size in files.items()}
        return cls(
            repo=repo,
            location="hub",
            revision=commit if isinstance(commit, str) else revision,
            files={name: sizes[name] for name in sorted(sizes) if "/" not in name and "\0" not in name},
        )

    def ranges(self, name: str) -> _Request:
        """One of `files`."""
        url = hf_hub_url(self.repo, name, revision=self.revision)
        return _Request(self.repo, self.revision, name, url)


@dataclass(frozen=True)
class _Request:
    """One file (or the listing) and how its failures are told."""

    repo: str
    revision: str | None
    name: str
    url: str

    def read(self, start: int, count: int) -> tuple[bytes, int | None]:
        """At most `count` bytes from `start`, and the size of the whole file where the server says it.

        Raises OSError when the server has no such file, CheckpointError for everything else.
        """
        for attempt in range(ATTEMPTS):
            try:
                return self._read(start, count)
            except _Passing as error:
                if attempt == ATTEMPTS - 1:
                    raise self._error(str(error), "try again; the failure may pass") from None
                time.sleep(0.2 * 3**attempt)
        raise AssertionError("unreachable")

    def size(self) -> int:
        """Bytes of the whole file. Raises OSError when the server does not say."""
        _, total = self.read(0, 1)
        if total is None:
            raise OSError("the server does not say how large the file is")
        return total

    def _read(self, start: int, count: int) -> tuple[bytes, int | None]:
        headers = {
            **build_hf_headers(library_name="quantserve"),  # holds the token
            "Range": f"bytes={start}-{start + count - 1}",
            "Accept-Encoding": "identity",
        }
        patience = constants.HF_HUB_DOWNLOAD_TIMEOUT
        session = _session()
        deadline = time.monotonic() + 6 * patience
        data = bytearray()
        skip = 0
        try:
            with session.stream("GET", self.url, headers=headers, timeout=patience) as response:
                if response.status_code == 416:
                    return b"", None
                if response.status_code not in (200, 206):
                    raise self._refused(response.status_code, response.headers)
                total = self._total(response, start)
                if response.status_code == 200:
                    skip = start
                    if skip > MAX_SKIPPED:
                        raise self._error(
                            "the server ignores range requests, and the whole file would have to be fetched",
                            "download the model and name its folder",
                        )
                for chunk in response.iter_bytes():  # as received: a chunk size would wait for a full one
                    data += chunk
                    if len(data) >= skip + count:
                        break
                    if time.monotonic() > deadline:
                        raise self._error(
                            f"the server is too slow: {len(data):,} bytes in {6 * patience:g} s",
                            "try again, or set HF_HUB_DOWNLOAD_TIMEOUT to more seconds",
                        )
        except OfflineModeIsEnabled:
            raise self._error("HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE") from None
        except UnicodeError:
            raise self._error("HF_TOKEN or HF_ENDPOINT holds characters no header may have", "correct it") from None
        except TransportError as error:
            raise self._broken(error, len(data), patience) from None
        there = count if total is None else min(count, total - start)
        if len(data) - skip < there and total is not None:
            raise _Passing(f"the connection was cut after {len(data):,} bytes")
        return bytes(data[skip : skip + count]), total

    def _total(self, response: Any, start: int) -> int | None:
        """Size of the whole file from the response headers, after checking that it is the range asked for."""
        if response.status_code == 200:
            length = response.headers.get("Content-Length", "")
            return int(length) if length.isdecimal() and not response.headers.get("Content-Encoding") else None
        span, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        if span.partition("-")[0] != str(start):
            raise self._error("the server answers with another range than asked for", "check any proxy in between")
        return int(total) if total.isdecimal() else None

    def _error(self, what: str, fix: str) -> CheckpointError:
        return CheckpointError(f"cannot read {shown(self.name)} of {self.repo} from {_host()}: {what}\n  fix: {fix}")

    def _broken(self, error: Exception, got: int, patience: float) -> Exception:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if "TimeoutException" in kinds:
            return self._error(
                f"no answer within {patience:g} s", "try again, or set HF_HUB_DOWNLOAD_TIMEOUT to more seconds"
            )
        if "ConnectError" in kinds:
            return self._error(
                f"no connection ({error})",
                "check the network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to use the cache alone",
            )
        if "TooManyRedirects" in kinds:
            return self._error("it redirects in a circle", "check HF_ENDPOINT and any proxy in between")
        return _Passing(f"the connection was cut after {got:,} bytes ({type(error).__name__})")

    def _refused(self, status: int, headers: Any) -> Exception:
        """The error for a status that is no success."""
        code = headers.get("X-Error-Code", "")
        repo, host = self.repo, _host()
        token = "the token in use" if get_token() else "no token"
        login = "set HF_TOKEN, or log in with `hf auth login`"
        if code == "GatedRepo" or (status == 403 and code != "RepoNotFound"):
            return CheckpointError(
                f"access to {repo} on {host} is refused with {token} (HTTP {status}): the model is gated or private\n"
                f"  fix: ask for access on the page of the model, then {login}"
            )
        if code == "RevisionNotFound":
            return CheckpointError(
                f"{repo} on {host} has no revision {shown(self.revision or 'main')!r}\n"
                "  fix: name a branch, tag or commit of the model, or leave the revision out"
            )
        if status == 404 and self.name != "the list of files":
            return FileNotFoundError(2, f"{host} has no such file (HTTP 404)")
        if status in (401, 404) or code == "RepoNotFound":
            at = "" if self.revision is None else f" with a revision {shown(self.revision)!r}"
            return CheckpointError(
                f"no folder {repo} is here, and {host} shows no model {repo}{at} with {token} (HTTP {status})\n"
                f"  fix: check the spelling; if the model is private, {login}"
            )
        if status == 429:
            return self._error("too many requests (HTTP 429)", f"wait a few minutes; {login} for a higher limit")
        if status >= 500:
            return _Passing(f"the server failed (HTTP {status})")
        return self._error(f"the server answered HTTP {status}", "check HF_ENDPOINT and any proxy in between")


class _Passing(Exception):
    """A failure worth another attempt."""


def _session() -> Any:
    """The HTTP client of huggingface_hub. Raises CheckpointError when it cannot be made."""
    try:
        return get_session()
    except (ValueError, ImportError) as error:
        raise CheckpointError(
            f"cannot make an HTTP client: {error}\n  fix: check HTTPS_PROXY, ALL_PROXY and SSL_CERT_FILE"
        ) from None


def _endpoint() -> str:
    """HF_ENDPOINT. Raises CheckpointError when it is no URL of a server."""
    endpoint = constants.ENDPOINT
    try:
        parts = urlsplit(endpoint)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise CheckpointError(
            f"HF_ENDPOINT is {shown(endpoint)!r}, which is no address of a server\n  fix: unset it, or use https://HOST"
        )
    return endpoint


def _host() -> str:
    return urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2]
