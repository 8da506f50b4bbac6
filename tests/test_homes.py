"""Folders that cannot be used are replaced, with a note, before a library uses them."""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path

import pytest

from quantserve.cli.main import run
from quantserve.errors import EngineError
from quantserve.system import homes
from quantserve.system.homes import look, settle

DEMO = str(Path(__file__).parents[1] / "examples" / "demo-model" / "checkpoint")


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> str:
    """A user without an entry in /etc/passwd, as OpenShift makes them; returns the folder that stands in."""

    def unknown(number: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    return f"/tmp/quantserve-{os.getuid()}"


def usable(folder: str) -> bool:
    return homes._fault(folder) == ""


BAD_HOMES = {
    "unset": None,
    "empty": "",
    "relative": "home",
    "a file": "/etc/hostname",
    "below a file": "/etc/hostname/home",
    "pseudo file system": "/proc",
    "below a pseudo file system": "/proc/home",
    "longer than any path": "/" + 5000 * "x",
}


QUICK = (["check", DEMO], ["plan", DEMO], ["doctor", "--quick"], ["list"], ["schema"])
SLOWER = (["profile", DEMO], ["recommend", DEMO])
CASES = [(command, home) for command in QUICK for home in BAD_HOMES]
CASES += [(command, home) for command in SLOWER for home in ("unset", "below a file")]


@pytest.mark.parametrize(("command", "name"), CASES, ids=[f"{command[0]}-{name}" for command, name in CASES])
def test_no_command_fails_without_a_home(
    command: list[str], name: str, nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HOME", "QUANTSERVE_CALIBRATION", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    if (home := BAD_HOMES[name]) is not None:
        monkeypatch.setenv("HOME", home)
    assert run(command) == 0


@pytest.mark.parametrize("home", BAD_HOMES.values(), ids=BAD_HOMES)
def test_a_bad_home_is_replaced_and_named(home: str | None, nobody: str) -> None:
    found = look({} if home is None else {"HOME": home})
    assert found.changes["HOME"] == nobody
    assert found.notes[0].startswith("HOME ")
    assert found.notes[0].endswith(f": {nobody} is used")
    assert all(usable(folder) for folder in found.folders.values())
    assert len(found.notes) == 1  # what follows HOME is not repeated


def test_torch_finds_a_user_name_where_there_is_none(nobody: str) -> None:
    assert look({"HOME": "/tmp"}).changes == {"USER": f"uid{os.getuid()}"}
    assert "USER" not in look({"HOME": "/tmp", "LOGNAME": "me"}).changes


def test_good_folders_stay(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "TMPDIR": "/tmp", "HF_HOME": str(tmp_path / "hf"), "USER": "me"}
    found = look(environ)
    assert (found.changes, found.notes) == ({}, ())
    assert found.folders["VLLM_CACHE_ROOT"] == str(tmp_path / ".cache/vllm")
    assert found.cache == tmp_path / ".cache" / "quantserve"
    assert list(tmp_path.iterdir()) == []  # looking writes nothing


NAMES = ["XDG_CACHE_HOME", "XDG_CONFIG_HOME", *(name for name, _ in homes._FOLDERS), "HF_HOME"]


@pytest.mark.parametrize("name", dict.fromkeys(NAMES))
def test_every_variable_that_names_a_bad_folder_is_replaced(name: str, tmp_path: Path) -> None:
    found = look({"HOME": str(tmp_path), "USER": "me", name: "/proc/cache"})
    assert usable(found.changes[name])
    assert f"{name} /proc/cache cannot be made" in found.notes[0]
    assert all(usable(folder) for folder in found.folders.values())


@pytest.mark.parametrize("name", ["XDG_CACHE_HOME", "XDG_CONFIG_HOME"])
def test_relative_xdg_folders_are_not_used(name: str, tmp_path: Path) -> None:
    found = look({"HOME": str(tmp_path), "USER": "me", name: "cache"})
    assert found.changes[name].startswith(str(tmp_path))
    assert f"{name} cache is no absolute path" in found.notes[0]


@pytest.mark.parametrize("name", ["XDG_CACHE_HOME", "HF_HOME", "VLLM_CACHE_ROOT", "TMPDIR"])
def test_an_empty_variable_counts_as_unset(name: str, tmp_path: Path) -> None:
    empty, unset = look({"HOME": str(tmp_path), name: ""}), look({"HOME": str(tmp_path)})
    assert empty.folders == unset.folders
    assert empty.changes[name] == unset.folders[name]  # vLLM and Hugging Face would take "" for a folder
    assert empty.notes == ()


def test_other_relative_folders_and_the_tilde_are_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = look({"HOME": str(tmp_path), "HF_HOME": "hf", "VLLM_CACHE_ROOT": "~/vllm"})
    assert found.changes["HF_HOME"] == str(tmp_path / "hf")
    assert found.changes["VLLM_CACHE_ROOT"] == str(tmp_path / "vllm")


def test_models_in_a_home_that_cannot_be_written_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / ".cache" / "huggingface"
    (cache / "hub" / "models--org--name").mkdir(parents=True)
    access = os.access
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode: access(path, mode) and not (mode & os.W_OK and str(path).startswith(str(tmp_path))),
    )
    found = look({"HOME": str(tmp_path), "USER": "me"})
    assert found.folders["HOME"] == found.spare
    assert found.changes["HF_HOME"] == str(cache)
    assert found.folders["HF_HUB_CACHE"] == str(cache / "hub")
    assert usable(found.changes["HF_MODULES_CACHE"])
    assert "the models in it are used" in found.notes[-1]


@pytest.mark.parametrize("folder", ["/nonexistent", "relative", "/proc", "/etc/hostname", "/dev/shm/" + 90 * "x"])
def test_a_bad_temporary_folder_is_replaced(folder: str, tmp_path: Path) -> None:
    found = look({"HOME": str(tmp_path), "USER": "me", "TMPDIR": folder})
    assert found.changes["TMPDIR"] == "/tmp"
    assert found.folders["RAY_TMPDIR"] == "/tmp"  # Ray takes TMPDIR
    assert found.notes[0].startswith(f"TMPDIR {folder} ")


def test_sockets_of_ray_and_vllm_fit_the_temporary_folder(tmp_path: Path) -> None:
    for length in range(10, 120):
        folder = (str(tmp_path) + "/" + length * "x")[: max(length, len(str(tmp_path)) + 2)]
        Path(folder).mkdir(exist_ok=True)
        found = look({"HOME": str(tmp_path), "USER": "me", "TMPDIR": folder})
        ray = f"{found.folders['RAY_TMPDIR']}/ray/session_2026-11-29_18-20-22_123456_4194304/sockets/plasma_store"
        vllm = f"{found.folders['TMPDIR']}/d9428888-122b-11e1-b85c-61cd3cbb3210"
        assert max(len(ray), len(vllm)) <= 107
        assert (len(folder) > 39) == any("bytes long" in note for note in found.notes)
        Path(folder).rmdir()


def test_length_is_counted_in_bytes() -> None:
    assert "is 40 bytes long" in homes.ray_fault("/" + 13 * "模")


def test_settling_twice_changes_nothing(nobody: str) -> None:
    environ = {"HOME": "/proc", "TMPDIR": "/nonexistent", "XDG_CACHE_HOME": "rel", "HF_HOME": "/proc/hf"}
    assert len(settle(environ)) == 4
    assert stat.S_IMODE(Path(environ["HOME"]).stat().st_mode) & 0o077 == 0
    before = dict(environ)
    assert settle(environ) == ()
    assert environ == before


def test_a_folder_that_somebody_else_made_in_advance_is_not_trusted(tmp_path: Path) -> None:
    made = tmp_path / f"quantserve-{os.getuid()}"
    made.mkdir(mode=0o700)
    assert homes._own(str(tmp_path)) == str(made)
    made.chmod(0o777)
    assert homes._own(str(tmp_path)) != str(made)
    made.rmdir()
    made.symlink_to("/tmp")
    assert homes._own(str(tmp_path)) != str(made)


def test_no_folder_at_all_is_an_error_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(homes, "_TEMPORARY", ("/proc",))
    found = look({"HOME": "/proc", "TMPDIR": "/nonexistent"})
    assert found.spare == ""
    with pytest.raises(EngineError, match=r"TMPDIR /nonexistent does not exist.*\n  fix: mount one"):
        settle({"HOME": "/proc", "TMPDIR": "/nonexistent"})


def test_no_folder_that_is_short_enough_for_ray_is_an_error_with_a_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = pytest.importorskip("quantserve.serve.driver.ray_cluster")
    monkeypatch.setattr(homes, "_TEMPORARY", ("/proc",))
    monkeypatch.setattr(homes, "RAY_SOCKET_BYTES", homes.SOCKET_BYTES - 3)
    monkeypatch.setattr(homes, "VLLM_SOCKET_BYTES", 0)
    for name, folder in (("HOME", tmp_path), ("TMPDIR", tmp_path), ("RAY_TMPDIR", "")):
        monkeypatch.setenv(name, str(folder))
    with pytest.raises(EngineError, match=r"RAY_TMPDIR .* bytes long, 3 at most .*\n  fix: set RAY_TMPDIR to a short"):
        cluster.start_ray()
