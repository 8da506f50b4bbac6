"""The hub, over real HTTP, against a server that behaves and misbehaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from helpers.checkpoints import LLAMA_70B, make_llama, write_header
from helpers.hub import COMMIT, Hub
from quantserve.checkpoint import Checkpoint, open_checkpoint
from quantserve.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

REPO = "org/model"


def codes(checkpoint: Checkpoint) -> list[str]:
    return [problem.code for problem in checkpoint.problems]


def refused(source: str = REPO, **kwargs: Any) -> str:
    """The message of the CheckpointError, checked for what every message must be."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source, **kwargs)
    message = str(caught.value)
    assert "fix:" in message
    assert "://" not in message.replace("https://HOST", "")
    assert "Traceback" not in message
    return message


@pytest.fixture
def model(hub: Hub, tmp_path: Path) -> Path:
    folder = make_llama(tmp_path / "remote", "awq", shards=3)
    hub.repos[REPO] = folder
    return folder


def test_reads_the_same_as_locally(hub: Hub, model: Path) -> None:
    remote, local = open_checkpoint(REPO), open_checkpoint(str(model))
    assert remote.location == "hub"
    assert remote.revision == COMMIT
    assert remote.path is None
    assert remote.tensors == local.tensors
    assert remote.config == local.config
    assert remote.tokenizer == local.tokenizer
    assert remote.problems == local.problems == ()


def test_70b_takes_one_request_per_file_and_little_traffic(hub: Hub, tmp_path: Path) -> None:
    hub.repos[REPO] = make_llama(tmp_path / "remote", "awq", **LLAMA_70B)
    checkpoint = open_checkpoint(REPO)
    assert checkpoint.weight_bytes > 30e9
    assert len([seen for seen in hub.seen if seen.server == "cdn"]) == 15
    assert hub.sent < 5_000_000


def test_a_header_longer_than_the_first_read(hub: Hub, tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "remote", layers=300)
    assert int.from_bytes((folder / "model.safetensors").open("rb").read(8), "little") > 200_000
    hub.repos[REPO] = folder
    assert open_checkpoint(REPO).tensors == open_checkpoint(str(folder)).tensors


def test_token_goes_to_the_hub_only(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    open_checkpoint(REPO)
    assert {seen.authorization for seen in hub.seen if seen.server == "hub"} == {"Bearer hf_secret"}
    assert {seen.authorization for seen in hub.seen if seen.server == "cdn"} == {None}


@pytest.mark.parametrize("method", ["fp16", "awq"])
def test_server_that_ignores_ranges_is_not_drained(hub: Hub, tmp_path: Path, method: str) -> None:
    folder = make_llama(tmp_path / "remote", method, **LLAMA_70B)
    hub.repos[REPO] = folder
    hub.ignore_ranges = True
    assert open_checkpoint(REPO).tensors == open_checkpoint(str(folder)).tensors
    time.sleep(0.2)
    assert hub.sent < 150e6  # what 15 sockets buffer, of more than 30 GB


def test_sizes_come_from_the_range_when_the_listing_has_none(hub: Hub, model: Path) -> None:
    with (model / "model-00002-of-00003.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 1000)
    hub.hide_sizes = True
    checkpoint = open_checkpoint(REPO)
    assert len(checkpoint.tensors) == len(open_checkpoint(str(model)).tensors)
    assert checkpoint.files["config.json"] == (model / "config.json").stat().st_size
    assert codes(checkpoint) == ["file-truncated"]


def test_damaged_remote_files_are_findings(hub: Hub, model: Path) -> None:
    write_header(model / "model-00001-of-00003.safetensors", b"not json at all")
    (model / "model-00002-of-00003.safetensors").write_bytes(b"")
    (model / "config.json").write_text("{")
    assert codes(open_checkpoint(REPO)) == ["config-invalid", "header-invalid", "header-truncated"]


def test_a_file_that_vanished_is_a_finding(hub: Hub, model: Path) -> None:
    hub.status["model-00002-of-00003.safetensors"] = (404, "EntryNotFound")
    checkpoint = open_checkpoint(REPO)
    assert codes(checkpoint) == ["file-unreadable"]
    assert checkpoint.tensors
    assert not checkpoint.tensors_complete


def test_shards_missing_from_the_repository(hub: Hub, model: Path) -> None:
    (model / "model-00003-of-00003.safetensors").unlink()
    assert codes(open_checkpoint(REPO)) == ["shard-missing"]


def test_pickles_are_read_by_ranges(hub: Hub, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder = tmp_path / "remote"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    state = {"w": torch.zeros(1000, 1000), "v": torch.zeros(3, dtype=torch.bfloat16), "sparse_threshold.w": 12}
    torch.save(state, folder / "sq-llama.pt")
    hub.repos[REPO] = folder
    assert "pickle-weights" in codes(open_checkpoint(REPO))
    checkpoint = open_checkpoint(REPO, allow_pickle=True)
    assert {t.name: (t.dtype, t.shape) for t in checkpoint.tensors.values()} == {
        "w": ("F32", (1000, 1000)),
        "v": ("BF16", (3,)),
    }
    assert checkpoint.other == {"sparse_threshold.w": 12}
    assert hub.sent < 500_000


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_unknown_repository(hub: Hub) -> None:
    message = refused("org/modle")
    assert "org/modle" in message
    assert "no token" in message


def test_unknown_revision(hub: Hub, model: Path) -> None:
    assert "'v9'" in refused(f"{REPO}@v9")
    assert "'v9'" in refused(REPO, revision="v9")
    hub.revisions = ("main", "refs/pr/1")
    assert open_checkpoint(f"{REPO}@refs/pr/1").revision == COMMIT
    assert "different revisions" in refused(f"{REPO}@a", revision="b")


@pytest.mark.parametrize("status", [401, 403])
def test_gated(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    hub.status[".json"] = (status, "GatedRepo")
    assert "with no token" in refused()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    message = refused()
    assert "with the token in use" in message
    assert "ask for access" in message
    assert "hf_secret" not in message


def test_rate_limit(hub: Hub, model: Path) -> None:
    hub.status["config.json"] = (429, "")
    assert "429" in refused()


def test_server_errors_pass_or_are_told(hub: Hub, model: Path) -> None:
    hub.failures["config.json"] = 2
    assert codes(open_checkpoint(REPO)) == []
    hub.failures["config.json"] = 99
    message = refused()
    assert "config.json" in message
    assert "503" in message


def test_cut_connections_pass_or_are_told(hub: Hub, model: Path) -> None:
    hub.cut_after, hub.cuts = 100, 2
    assert codes(open_checkpoint(REPO)) == []
    hub.cuts = -1
    assert "cut after 100 bytes" in refused()


def test_slow_and_dripping_servers_end_in_time(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.delay = 1.0
    assert "no answer within 0.3 s" in refused()
    hub.delay, hub.drip = 0.0, 0.1
    assert "too slow" in refused()


def test_redirect_circle(hub: Hub, model: Path) -> None:
    hub.loop = True
    assert "circle" in refused()


def test_wrong_range(hub: Hub, model: Path) -> None:
    hub.shift_range = 8
    assert "another range" in refused()


def test_something_that_is_no_hub(hub: Hub, model: Path) -> None:
    hub.garbage = True
    assert "HF_ENDPOINT" in refused()


def test_no_connection(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = refused()
    assert "127.0.0.1:9" in message
    assert "no connection" in message


@pytest.mark.parametrize("endpoint", ["huggingface.co", "http://", "ftp://x", "http://a:99999", "http://[::1"])
def test_senseless_endpoint(hub: Hub, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    with pytest.raises(CheckpointError, match="HF_ENDPOINT"):
        open_checkpoint(REPO)


def test_token_that_is_no_header(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ü")
    assert "HF_TOKEN" in refused()


@pytest.mark.parametrize(
    "source", ["", "org/na--me", "org/..", "-x/y", "a b/c", "org/name@", "x" * 300, "a\0b", "é\n/x"]
)
def test_senseless_names(hub: Hub, source: str) -> None:
    refused(source)
    assert hub.seen == []


# --- cache and environment --------------------------------------------------------------------------------------------


def cache(tmp_path: Path, model: Path, *leave_out: str) -> Path:
    """Put `model` into the HF cache as a download would: blobs, and links to them."""
    root = tmp_path / "cache" / "models--org--model"
    snapshot = root / "snapshots" / COMMIT
    for folder in (snapshot, root / "blobs", root / "refs"):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(model.iterdir())):
        if file.name not in leave_out:
            blob = root / "blobs" / f"{number:040x}"
            os.link(file, blob)
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_complete_snapshot_needs_no_network(hub: Hub, model: Path, tmp_path: Path) -> None:
    snapshot = cache(tmp_path, model)
    checkpoint = open_checkpoint(REPO)
    assert (checkpoint.location, checkpoint.path, checkpoint.revision) == ("cache", snapshot, COMMIT)
    assert checkpoint.problems == ()
    assert open_checkpoint(f"{REPO}@{COMMIT}").location == "cache"
    assert open_checkpoint(str(snapshot)).problems == ()
    assert hub.seen == []


@pytest.mark.parametrize("lacking", ["config.json", "model-00002-of-00003.safetensors"])
def test_incomplete_snapshot_is_read_from_the_hub(hub: Hub, model: Path, tmp_path: Path, lacking: str) -> None:
    cache(tmp_path, model, lacking)
    checkpoint = open_checkpoint(REPO)
    assert checkpoint.location == "hub"
    assert checkpoint.problems == ()


@pytest.mark.parametrize("lacking", ["config.json", "model-00002-of-00003.safetensors", "all"])
def test_offline_without_a_complete_snapshot(
    hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if lacking != "all":
        cache(tmp_path, model, lacking)
    message = refused()
    assert "HF_HUB_OFFLINE" in message
    assert lacking in message or "not in the HF cache" in message
    assert hub.seen == []


def test_numbered_shards_without_index_are_no_complete_snapshot(hub: Hub, model: Path, tmp_path: Path) -> None:
    cache(tmp_path, model, "model.safetensors.index.json", "model-00001-of-00003.safetensors")
    assert open_checkpoint(REPO).location == "hub"


def test_environment_is_respected(hub: Hub, model: Path, tmp_path: Path) -> None:
    """In a fresh process, where huggingface_hub reads the environment itself."""
    program = (
        "import json, sys; from quantserve.checkpoint import open_checkpoint; c = open_checkpoint('org/model');"
        "heavy = sorted({'torch', 'numpy', 'vllm', 'ray', 'transformers'} & set(sys.modules));"
        "print(json.dumps([c.location, len(c.tensors), heavy]))"
    )
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_env",
        "HF_HUB_OFFLINE": "0",
    }
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["hub", len(open_checkpoint(str(model)).tensors), []]
    assert "Bearer hf_env" in {seen.authorization for seen in hub.seen}
    offline = subprocess.run(
        run, env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=300
    )
    assert offline.returncode == 1
    assert "HF_HUB_OFFLINE is set and it is not in the HF cache" in offline.stderr
