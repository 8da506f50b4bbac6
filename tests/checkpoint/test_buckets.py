"""`s3://` and `gs://`: headers by ranges, downloads that go on, and a message for every failure."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.buckets import Buckets, serve_buckets
from helpers.checkpoints import make_llama
from quantserve.checkpoint import open_checkpoint
from quantserve.checkpoint.bucket import CHUNK, cache_folder, download
from quantserve.checkpoint.downloads import fetch, wanted
from quantserve.config import load_object
from quantserve.errors import CheckpointError
from quantserve.planning.compose import compose
from quantserve.planning.plan import make_plan
from quantserve.plugins.registry import Registry
from quantserve.target import find_target

SCHEMES = ("s3", "gs")
SECRET = "do-not-show-this-key"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Buckets]:
    """A stand-in for both stores, with credentials and an empty cache."""
    with serve_buckets() as served:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_SKIP_SIGNATURE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_ENDPOINT_URL", served.endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("AWS_REGION", "eu-north-1")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", served.endpoint)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        served.folders["models"] = tmp_path / "bucket"
        make_llama(tmp_path / "bucket" / "team" / "m", method="awq", shards=2)
        (tmp_path / "bucket" / "team" / "m" / "onnx").mkdir()
        (tmp_path / "bucket" / "team" / "m" / "onnx" / "model.safetensors").write_bytes(b"not the model")
        yield served


@pytest.fixture
def folder(store: Buckets) -> Path:
    return store.folders["models"] / "team" / "m"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_headers_are_read_by_ranges(store: Buckets, folder: Path, scheme: str) -> None:
    store.page = 3  # obstore asks for the other pages
    local, remote = open_checkpoint(str(folder)), open_checkpoint(f"{scheme}://models/team/m")
    assert (remote.tensors, remote.config, remote.tokenizer) == (local.tensors, local.config, local.tokenizer)
    assert remote.files == local.files
    assert (remote.location, remote.path, remote.problems) == ("bucket", None, ())
    assert store.sent < sum(local.files.values())
    asked = [seen for seen in store.seen if seen.path.endswith(".safetensors")]
    assert len(asked) == 2
    assert all(seen.range and seen.range.startswith("bytes=0-") and seen.if_match for seen in asked)
    assert all(bool(seen.authorization) == (scheme == "s3") for seen in store.seen)  # an emulator has no accounts


def test_the_revision_follows_the_files(store: Buckets, folder: Path) -> None:
    first = open_checkpoint("s3://models/team/m/").revision
    assert open_checkpoint("gs://models/team/m").revision == first
    assert open_checkpoint("s3://models/team/m", revision=first).revision == first
    (folder / "README.md").write_text("new")
    second = open_checkpoint("s3://models/team/m").revision
    assert second != first
    with pytest.raises(CheckpointError, match=rf"not those of revision {first}: theirs is {second}\n  fix: check"):
        open_checkpoint("s3://models/team/m", revision=first)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_check_plan_and_download_see_the_same_files(store: Buckets, folder: Path, scheme: str) -> None:
    url = f"{scheme}://models/team/m"
    (folder / "pytorch_model.bin").write_bytes(b"not needed")
    app = load_object({"models": [{"engine_config": {"model_id": "m", "hf_model_id": url}}]}, "test")
    plan = make_plan(compose(app.models[0], Registry.load(), find_target("a100-80g")))
    (files,) = plan.downloads
    assert plan.engine_args["model"] == files["folder"] == str(cache_folder(url, files["revision"]))
    assert "revision" not in plan.engine_args
    said: list[str] = []
    fetch(files, said.append)
    there = Path(files["folder"])
    assert {path.name for path in there.iterdir() if path.name[0] != "."} == set(files["files"])
    assert "pytorch_model.bin" not in files["files"]
    assert all((there / name).read_bytes() == (folder / name).read_bytes() for name in files["files"])
    assert said[0].startswith(f"Downloading {url} (")
    assert said[-1] == f"  100 % of {url}"
    requests = len(store.seen)
    fetch(files, said.append)
    assert len(store.seen) == requests  # nothing is asked again
    cached = open_checkpoint(url)
    assert (cached.location, cached.path, cached.revision) == ("cache", there, files["revision"])
    assert wanted(cached) is not None
    requests = len(store.seen)
    assert open_checkpoint(url, revision=files["revision"]).path == there
    assert len(store.seen) == requests  # a given revision needs no network


def test_a_cut_download_goes_on(store: Buckets, folder: Path) -> None:
    big = folder / "model-big.safetensors"
    big.write_bytes(bytes(range(256)) * (CHUNK // 128))  # two requests
    opened = open_checkpoint("s3://models/team/m")
    files = {"model-big.safetensors": big.stat().st_size}
    revision = str(opened.revision)
    store.refuse = {"model-big.safetensors": (403, "AccessDenied")}
    with pytest.raises(CheckpointError, match="access is denied"):
        download("s3://models/team/m", revision, files, lambda line: None)
    partial = cache_folder("s3://models/team/m", revision) / ".model-big.safetensors.partial"
    partial.write_bytes(big.read_bytes()[:CHUNK])  # as it is after the first of two requests
    store.refuse, store.seen = {}, []
    store.cut_after, store.cuts = 1000, 1  # obstore asks for the rest itself
    there = download("s3://models/team/m", revision, files, lambda line: None)
    assert (there / big.name).read_bytes() == big.read_bytes()
    assert not partial.exists()
    assert {seen.range for seen in store.key(big.name)} >= {f"bytes={CHUNK}-{2 * CHUNK - 1}"}
    assert not any(str(seen.range).startswith("bytes=0-") for seen in store.key(big.name))


def test_what_is_left_of_another_file_is_not_kept(store: Buckets) -> None:
    files = wanted(open_checkpoint("s3://models/team/m"))
    assert files is not None
    there = Path(files["folder"])
    there.mkdir(parents=True)
    (there / ".config.json.partial").write_bytes(b"x" * 1_000_000)
    store.refuse = {"tokenizer.json": (404, "NoSuchKey")}
    with pytest.raises(CheckpointError, match=r"tokenizer\.json of .*: the file is gone since it was listed"):
        fetch(files, lambda line: None)
    store.refuse = {}
    fetch(files, lambda line: None)
    assert (there / "config.json").read_bytes() == (store.folders["models"] / "team/m/config.json").read_bytes()


def test_files_that_change_between_check_and_download(store: Buckets, folder: Path) -> None:
    opened = open_checkpoint("s3://models/team/m")
    files = wanted(opened)
    assert files is not None
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("512", "256"))
    with pytest.raises(CheckpointError, match="are not those of revision"):
        fetch(files, lambda line: None)
    assert not (Path(files["folder"]) / "config.json").exists()


def test_a_full_disk_is_known_before(store: Buckets, monkeypatch: pytest.MonkeyPatch) -> None:
    files = wanted(open_checkpoint("s3://models/team/m"))
    assert files is not None
    monkeypatch.setattr("quantserve.checkpoint.bucket.free_bytes", lambda folder: 1000)
    store.seen.clear()
    with pytest.raises(CheckpointError, match=r"needs .* more in .*, and .* are free\n  fix: free some space"):
        fetch(files, lambda line: None)
    assert store.sent == 0


@pytest.mark.parametrize(
    ("refuse", "said", "fix"),
    [
        ({"list": (404, "NoSuchBucket")}, "has no bucket models", "correct the name"),
        ({"list": (403, "AccessDenied")}, "access is denied (AccessDenied)", "rights to list the bucket"),
        ({"json": (403, "AccessDenied")}, "cannot read config.json", "rights to list the bucket"),
        ({"list": (403, "InvalidAccessKeyId")}, "the credentials are refused (InvalidAccessKeyId)", "AWS_PROFILE"),
        ({"list": (403, "SignatureDoesNotMatch")}, "the credentials are refused", "AWS_SECRET_ACCESS_KEY"),
        ({"list": (400, "ExpiredToken")}, "the credentials are refused (ExpiredToken)", "set AWS_ACCESS_KEY_ID"),
        ({"list": (400, "AuthorizationHeaderMalformed")}, "another region than the request", "set AWS_REGION"),
        ({"list": (500, "InternalError")}, "the server answered HTTP 500 (InternalError)", "try again"),
        ({"config.json": (412, "PreconditionFailed")}, "has changed since it was listed", "check the model again"),
    ],
)
def test_failures(store: Buckets, refuse: dict[str, tuple[int, str]], said: str, fix: str) -> None:
    store.refuse = refuse
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint("s3://models/team/m")
    message, _, advice = str(raised.value).partition("\n  fix: ")
    assert said in message
    assert fix in advice
    assert SECRET not in str(raised.value)


def test_another_region(store: Buckets) -> None:
    store.redirect = True
    with pytest.raises(CheckpointError, match="another region than the request went to\n  fix: set AWS_REGION"):
        open_checkpoint("s3://models/team/m")


def test_a_passing_failure_is_tried_again(store: Buckets) -> None:
    store.failures = {"list": 1, "config.json": 1}
    assert open_checkpoint("s3://models/team/m").problems == ()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_answers(store: Buckets, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setenv("QUANTSERVE_BUCKET_TIMEOUT", "0.2")
    store.delay = 5.0
    with pytest.raises(CheckpointError, match=r"no answer within 0\.2 s\n  fix: .*QUANTSERVE_BUCKET_TIMEOUT"):
        open_checkpoint(f"{scheme}://models/team/m")
    for name in ("AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"no connection to .*\n  fix: check the network"):
        open_checkpoint(f"{scheme}://models/team/m")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("s3://models/team/none", "holds no files\n  fix: name the folder that holds config.json"),
        ("s3://", "names no folder of a bucket"),
        ("s3://Upper/x", "names no folder of a bucket"),
        ("gs://nobody/x", "Google Cloud Storage has no bucket nobody"),
    ],
)
def test_what_is_not_there(store: Buckets, source: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(source)


def test_a_file_that_is_gone_is_a_finding(store: Buckets) -> None:
    store.refuse = {"00001-of-00002.safetensors": (404, "NoSuchKey")}
    assert {one.code for one in open_checkpoint("s3://models/team/m").problems} >= {"file-unreadable"}


def test_no_credentials(store: Buckets, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(CheckpointError, match="no credentials are found\n  fix: set AWS_ACCESS_KEY_ID"):
        open_checkpoint("s3://models/team/m")


def test_keys_of_a_profile(store: Buckets, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text("[work]\naws_access_key_id = AKWORK\naws_secret_access_key = x\n")
    (tmp_path / "config").write_text("[profile work]\nregion = eu-west-3\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert open_checkpoint("s3://models/team/m").problems == ()
    assert "Credential=AKWORK/" in str(store.seen[0].authorization)
    assert "/eu-west-3/s3/" in str(store.seen[0].authorization)


def test_without_the_package(store: Buckets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(CheckpointError, match=r"needs the package obstore\n  fix: pip install 'quantserve\[gs\]'"):
        open_checkpoint("gs://models/team/m")


@pytest.mark.parametrize("choice", ["m.gguf", "m", ""])
def test_a_container_in_a_bucket(store: Buckets, choice: str) -> None:
    made = Path(__file__).parents[2] / "plugins" / "gguf" / "tests" / "data"
    files = sorted(made.rglob("*.gguf")) if made.is_dir() else []
    if not files:
        pytest.skip("no GGUF file is in the tests of the plugin")
    target = store.folders["models"] / "gguf" / "m.gguf"
    target.parent.mkdir()
    shutil.copy(files[0], target)
    readers = Registry.load().readers
    source = {"m.gguf": "s3://models/gguf/m.gguf", "m": "s3://models/gguf:m", "": "s3://models/gguf"}[choice]
    remote = open_checkpoint(source, readers=readers)
    assert remote.tensors == open_checkpoint(str(target), readers=readers).tensors
    files_of = wanted(remote)
    assert files_of is not None
    assert (files_of["source"], set(files_of["files"])) == ("s3://models/gguf", {"m.gguf"})
