"""``s3://bucket/folder`` and ``gs://bucket/folder``: files in an object store, listed and read by byte ranges.

The requests are obstore's. The files of a folder have a revision, the digest of their names, sizes and entity tags, and
every read asks for the tag that was listed: what `check` saw is what is downloaded, or there is an error.
"""

from __future__ import annotations

import configparser
import fcntl
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quantserve.checkpoint.local import Folder
from quantserve.checkpoint.ranges import Remote
from quantserve.checkpoint.text import shown
from quantserve.errors import CheckpointError
from quantserve.system.homes import expand, free_bytes, look
from quantserve.target import gib

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import GCSStore, S3Store

TIMEOUT: Final = "QUANTSERVE_BUCKET_TIMEOUT"
"""The variable with the seconds that a request may take."""
TIMEOUT_S: Final = 20.0
RETRIES: Final = 2
CHUNK: Final = 16 * 2**20
"""Bytes of a request of a download."""
DOWNLOAD_PATIENCE: Final = 3
"""Timeout of such a request, in timeouts of others."""
_URL: Final = re.compile(r"(s3|gs)://([a-z0-9][a-z0-9._-]{1,220})/([^\0\n]*)")
_STORES: Final = {"s3": "S3", "gs": "Google Cloud Storage"}
_BAD_KEYS: Final = (
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "RequestTimeTooSkewed",
)
_LOGIN: Final = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; "
    "for a public bucket AWS_SKIP_SIGNATURE=true",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`; "
    "for a public bucket GOOGLE_SKIP_SIGNATURE=true",
}
LISTING: Final = "the list of files"


@dataclass(frozen=True)
class _Object:
    """A file as it was listed; without an entity tag, reads cannot ask for it."""

    size: int
    tag: str | None
    changed: str

    def __str__(self) -> str:
        """What differs when the file does."""
        return f"{self.size}\0{self.tag or self.changed}"


def cache_folder(url: str, revision: str) -> Path:
    """Where the files of a bucket's folder are downloaded to: the same place for the same files."""
    place = _Place.of(url)
    name = "--".join(filter(None, [place.scheme, place.bucket, *place.prefix.split("/")]))
    kept = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)
    kept = kept if kept == name and len(kept) <= 150 else f"{kept[:130]}-{sha256(name.encode()).hexdigest()[:12]}"
    return look(os.environ).cache / "buckets" / kept / revision


def open_bucket(url: str, revision: str | None, lacking: Callable[[Folder], list[str]]) -> Folder | Bucket:
    """The downloaded files when they are complete, else those in the bucket.

    Args:
        url: of a folder.
        revision: the digest that its files must have; None for any.
        lacking: gives the files that a downloaded folder lacks.

    Raises:
        CheckpointError: the folder cannot be read, or its files have another revision.
    """
    if revision is not None and (cached := _downloaded(url, revision, lacking)):
        return cached
    bucket = Bucket.listed(url)
    if revision not in (None, bucket.revision):
        raise _changed(url, str(revision), str(bucket.revision))
    cached = _downloaded(url, str(bucket.revision), lacking)
    return cached if cached and all(bucket.files.get(name) == size for name, size in cached.files.items()) else bucket


def _downloaded(url: str, revision: str, lacking: Callable[[Folder], list[str]]) -> Folder | None:
    path = cache_folder(url, revision)
    if not re.fullmatch(r"[0-9a-f]+", revision) or not path.is_dir():
        return None
    folder = Folder(path, location="cache", revision=revision)
    folder.files = {name: size for name, size in folder.files.items() if not name.startswith(".")}
    return None if lacking(folder) else folder


def _changed(url: str, wanted: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"the files in {shown(url)} are not those of revision {shown(wanted)}: theirs is {found}\n"
        "  fix: check the model again, and correct the revision in the config if it is given there"
    )


def download(url: str, revision: str, files: Mapping[str, int], say: Callable[[str], None]) -> Path:
    """Bring files of a bucket into the cache; what is there already is kept, and a cut download goes on.

    Args:
        url: of a folder.
        revision: the digest of its files.
        files: name -> bytes.
        say: gets a line for every tenth.

    Returns:
        The folder.

    Raises:
        CheckpointError: the bucket cannot be read, has other files now, or the disk is full.
    """
    folder = cache_folder(url, revision)
    if not _absent(folder, files):
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # replicas on this machine download once
            if absent := _absent(folder, files):
                _Download(url, revision, folder, {name: files[name] for name in absent}, say).run()
    except OSError as error:
        raise CheckpointError(
            f"cannot write {shown(url)} to {folder}: {error.strerror or error}\n"
            "  fix: free some space, or name another folder in XDG_CACHE_HOME"
        ) from None
    return folder


def _absent(folder: Path, files: Mapping[str, int]) -> list[str]:
    """The files that are not there in full, weights last: what is listed without a weight file is not complete."""
    weights = (".safetensors", ".bin", ".pt", ".gguf")
    ordered = sorted(files, key=lambda name: (name.endswith(weights), name))
    return [name for name in ordered if _size(folder / name) != files[name]]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


class _Download:
    """Some files of a bucket on their way into a folder."""

    def __init__(
        self, url: str, revision: str, folder: Path, files: Mapping[str, int], say: Callable[[str], None]
    ) -> None:
        self.url, self.revision, self.folder, self.files, self.say = url, revision, folder, files, say
        self.total, self.done, self.tenth = sum(files.values()), 0, 0

    def run(self) -> None:
        bucket = Bucket.listed(self.url, DOWNLOAD_PATIENCE)
        if bucket.revision != self.revision:
            raise _changed(self.url, self.revision, str(bucket.revision))
        left = self.total - sum(max(0, _size(self._partial(name))) for name in self.files)
        free = free_bytes(self.folder)
        if left > free:
            raise CheckpointError(
                f"{shown(self.url)} needs {gib(left)} more in {self.folder}, and {gib(free)} are free\n"
                "  fix: free some space, or name another folder in XDG_CACHE_HOME"
            )
        self.say(f"Downloading {shown(self.url)} ({gib(self.total)}) to {self.folder}")
        for name, size in self.files.items():
            self._fetch(bucket.ranges(name), name, size)

    def _partial(self, name: str) -> Path:
        return self.folder / f".{name}.partial"

    def _fetch(self, ranges: _Ranges, name: str, size: int) -> None:
        partial = self._partial(name)
        if _size(partial) > size:
            partial.unlink()  # nothing that was written here
        with partial.open("ab") as file:
            self._count(file.tell())
            while (start := file.tell()) < size:
                try:
                    data, _ = ranges.read(start, min(CHUNK, size - start))
                except FileNotFoundError:
                    raise ranges.error("the file is gone since it was listed", "check the model again") from None
                file.write(data)
                self._count(len(data))
        os.replace(partial, self.folder / name)

    def _count(self, size: int) -> None:
        self.done += size
        tenth = 10 * self.done // max(1, self.total)
        if tenth > self.tenth:
            self.tenth = tenth
            self.say(f"  {10 * tenth} % of {shown(self.url)}")


@dataclass
class Bucket(Remote):
    """The files of one folder of a bucket. See `Source`."""

    url: str = ""
    objects: dict[str, _Object] = field(default_factory=dict)
    _store: Any = None
    _prefix: str = ""

    @classmethod
    def listed(cls, url: str, patience: float = 1.0) -> Bucket:
        """List the folder. Raises CheckpointError."""
        place = _Place.of(url)
        store = place.store(patience)
        objects: dict[str, _Object] = {}
        try:
            import obstore

            listed = obstore.list_with_delimiter(store, place.prefix or None)["objects"]
        except Exception as error:
            raise place.failure(LISTING, error) from None
        for meta in listed:
            name = meta["path"][len(place.prefix) :].lstrip("/")
            if name and "/" not in name:
                objects[name] = _Object(meta["size"], meta["e_tag"], f"{meta['version']} {meta['last_modified']}")
        if not objects:
            raise CheckpointError(
                f"{shown(url)} holds no files\n  fix: name the folder that holds config.json, with its whole path"
            )
        digest = sha256()
        for name in sorted(objects):
            digest.update(f"{name}\0{objects[name]}\n".encode())
        return cls(
            revision=digest.hexdigest()[:32],
            files={name: objects[name].size for name in sorted(objects)},
            location="bucket",
            url=url,
            objects=objects,
            _store=store,
            _prefix=place.prefix,
        )

    def ranges(self, name: str) -> _Ranges:
        """One of `files`."""
        key = f"{self._prefix}/{name}" if self._prefix else name
        return _Ranges(_Place.of(self.url), self._store, key, name, self.objects[name])


@dataclass(frozen=True)
class _Ranges:
    """One file of a bucket."""

    place: _Place
    client: Any
    key: str
    name: str
    listed: _Object

    def read(self, start: int, count: int) -> tuple[bytes, int | None]:
        """At most `count` bytes from `start`, and the size of the whole file.

        Raises OSError when there is no such file any more, CheckpointError for everything else.
        """
        import obstore

        count = min(count, self.listed.size - start)
        if count <= 0:
            return b"", self.listed.size
        options: GetOptions = {"range": (start, start + count)}
        if self.listed.tag:
            options["if_match"] = self.listed.tag
        try:
            data = obstore.get(self.client, self.key, options=options).bytes().to_bytes()
        except Exception as error:
            raise self.place.failure(self.name, error) from None
        if len(data) < count:
            raise self.error(f"{len(data):,} of {count:,} bytes came", "try again; the failure may pass")
        return data, self.listed.size

    def size(self) -> int:
        """Bytes of the whole file."""
        return self.listed.size

    def error(self, what: str, fix: str) -> CheckpointError:
        return self.place.error(self.name, what, fix)


@dataclass(frozen=True)
class _Place:
    """A folder of a bucket, and how failures there are told. Credentials are in no message."""

    scheme: str
    bucket: str
    prefix: str

    @classmethod
    def of(cls, url: str) -> _Place:
        """Raises CheckpointError where a URL names no folder of a bucket."""
        match = _URL.fullmatch(url if url.count("/") > 2 else url + "/")
        if not match:
            raise CheckpointError(
                f"{shown(url)!r} names no folder of a bucket\n"
                "  fix: write s3://BUCKET/FOLDER or gs://BUCKET/FOLDER; a bucket's name has a-z, 0-9, - . and _"
            )
        return cls(match[1], match[2], match[3].strip("/"))

    def store(self, patience: float) -> S3Store | GCSStore:
        """The client. Raises CheckpointError when obstore is missing or the settings are wrong."""
        try:
            from obstore.store import GCSStore, S3Store
        except ImportError:
            raise CheckpointError(
                f"reading {self.scheme}:// needs the package obstore\n  fix: pip install 'quantserve[{self.scheme}]'"
            ) from None
        seconds = patience * timeout_s()
        retry: Any = {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=seconds * RETRIES)}
        endpoint = self.endpoint
        client: Any = {
            "timeout": timedelta(seconds=seconds),
            "connect_timeout": timedelta(seconds=min(5.0, seconds)),
            "allow_http": endpoint.startswith("http://"),
        }
        try:
            if self.scheme == "gs":
                emulator: Any = {"base_url": endpoint, "skip_signature": True} if endpoint else {}
                return GCSStore(self.bucket, config=emulator, client_options=client, retry_config=retry)
            provider = _credentials_of_boto3()
            config: Any = {} if provider else _profile(os.environ)
            return S3Store(
                self.bucket, config=config, client_options=client, retry_config=retry, credential_provider=provider
            )
        except Exception as error:
            raise self.failure(LISTING, error) from None

    @property
    def endpoint(self) -> str:
        """The server, where a variable names another than the cloud's own; "" for that."""
        if self.scheme == "gs":
            host = os.environ.get("STORAGE_EMULATOR_HOST", "")
            return host if not host or "://" in host else f"http://{host}"
        return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""

    def error(self, name: str, what: str, fix: str) -> CheckpointError:
        return CheckpointError(
            f"cannot read {shown(name)} of {self.scheme}://{self.bucket}/{shown(self.prefix)}: {what}\n  fix: {fix}"
        )

    def failure(self, name: str, error: Exception) -> Exception:
        """What an exception of obstore means: OSError for a file that is gone, CheckpointError for all else."""
        if isinstance(error, CheckpointError | OSError) and not isinstance(error, FileNotFoundError):
            return error
        text, _, details = str(error).partition("Debug source:")
        no_role = "169.254." in text  # the address of a machine's own role
        text = re.sub(r"https?://\S+", "", text)
        code, status = _first(r"<Code>(\w+)</Code>", text), _first(r"status code: (\d{3})", text)
        store, here = _STORES[self.scheme], f"{self.scheme}://{self.bucket}"
        if code == "NoSuchBucket" or (status == "404" and name == LISTING):
            return CheckpointError(f"{store} has no bucket {self.bucket}\n  fix: correct the name in {here}")
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(2, f"{store} has no such file any more")
        if type(error).__name__ == "PreconditionError" or status == "412":
            return self.error(name, "the file has changed since it was listed", "check the model again")
        if "redirect" in text or code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
            fix = "set AWS_REGION to the region of the bucket"
            return self.error(name, "the bucket is in another region than the request went to", fix)
        said = f" ({code})" if code else ""
        if code in _BAD_KEYS:
            return self.error(name, f"the credentials are refused{said}", _LOGIN[self.scheme])
        if no_role or re.search(r"Missing \w*Key|token request|[Cc]redential", text):
            return self.error(name, "no credentials are found", _LOGIN[self.scheme])
        if status in ("401", "403"):
            rights = "; they need the rights to list the bucket and to read its files"
            return self.error(name, f"access is denied{said}", _LOGIN[self.scheme] + rights)
        if status:
            return self.error(name, f"the server answered HTTP {status}{said}", "try again; the failure may pass")
        if "TimedOut" in details or "Timeout" in details or "timed out" in text:
            fix = f"try again, or set {TIMEOUT} to more seconds"
            return self.error(name, f"no answer within {timeout_s():g} s", fix)
        if "HTTP error" in text or "onnect" in details:
            variable = "STORAGE_EMULATOR_HOST" if self.scheme == "gs" else "AWS_ENDPOINT_URL"
            return self.error(name, f"no connection to {store}", f"check the network, and {variable} if it is set")
        return self.error(name, f"{store} does not answer as expected", "check the endpoint and any proxy in between")


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""


def timeout_s() -> float:
    """Seconds that a request may take. Raises CheckpointError when the variable holds no such number."""
    text = os.environ.get(TIMEOUT, "")
    try:
        seconds = float(text) if text else TIMEOUT_S
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86_400:
        raise CheckpointError(f"{TIMEOUT} is {shown(text)!r}, no number of seconds\n  fix: set it to 20, or unset it")
    return seconds


def _credentials_of_boto3() -> Any:
    """The provider of boto3, which knows single sign-on and roles of profiles; None without boto3 or credentials."""
    if os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_SKIP_SIGNATURE"):
        return None
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider

        return Boto3CredentialProvider()
    except Exception:  # boto3 is not installed, or finds nothing: obstore looks itself
        return None


def _profile(environ: Mapping[str, str]) -> dict[str, str]:
    """Keys and region of AWS's profile files, which obstore does not read; what variables say counts more."""
    if environ.get("AWS_ACCESS_KEY_ID") or environ.get("AWS_SKIP_SIGNATURE"):
        return {}
    profile = environ.get("AWS_PROFILE") or "default"
    found: dict[str, str] = {}
    for variable, usual, section in (
        ("AWS_CONFIG_FILE", "~/.aws/config", profile if profile == "default" else f"profile {profile}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", profile),
    ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(expand(environ.get(variable) or usual))
            found |= dict(parser.items(section))
        except (configparser.Error, OSError, UnicodeDecodeError):
            continue
    keys = {"aws_access_key_id": "access_key_id", "aws_secret_access_key": "secret_access_key"}
    keys |= {"aws_session_token": "session_token"}
    config = {keys[key]: found[key] for key in keys if found.get(key)}
    if found.get("region") and not (environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")):
        config["region"] = found["region"]
    return config
