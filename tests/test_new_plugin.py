"""`quantserve new-plugin`: every kind is a distribution that works as it is generated; what is wrong is refused."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.dists import Site
from quantserve.cli.main import run
from quantserve.new_plugin import GROUP_SIZES, KINDS, WIDTHS, Project

LONG = "a-name-of-forty-characters-which-is-long"
SUMMARY = "eighty characters, which is as many as the summary of a new plugin may have here"
PROJECTS = {
    "vllm-method": ("hums", "--vllm-name", "humming"),
    "codebook": ("x", "--bits", "3", "--group-size", "64", "--author", "Ada Ünal <ada@example.org>"),
    "custom": (LONG, "--summary", SUMMARY),
    "policy": ("house-rules",),
    "command": ("dtypes", "--license", "MIT OR Apache-2.0"),
}


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A project of every kind, and beside them ``site``, where pip has installed them."""
    base = tmp_path_factory.mktemp("projects")
    for kind, arguments in PROJECTS.items():
        assert run(["new-plugin", *arguments, f"--{kind}", "--folder", str(base / kind)]) == 0
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--target"]
    done = subprocess.run(
        [*command, base / "site", *(base / kind for kind in PROJECTS)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.name: path for path in base.iterdir()}


def ran(project: Path, *command: str, site: Path | None = None) -> str:
    """What a program prints in the project's folder; it must succeed."""
    variables = {**os.environ, "PYTHONPATH": str(site or ""), "MYPY_CACHE_DIR": str(project.parent / "mypy")}
    program = [sys.executable, "-m", *command]
    done = subprocess.run(program, capture_output=True, text=True, cwd=project, env=variables, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


def test_every_kind_is_generated() -> None:
    assert set(PROJECTS) == set(KINDS)


@pytest.mark.parametrize("kind", PROJECTS)
def test_it_lints_and_type_checks(kind: str, projects: dict[str, Path]) -> None:
    project = projects[kind]
    ran(project, "ruff", "check", "--no-cache", ".")
    ran(project, "ruff", "format", "--no-cache", "--check", ".")
    ran(project, "mypy")


@pytest.mark.parametrize("kind", ["policy", "command", pytest.param("vllm-method", marks=pytest.mark.slow)])
def test_it_passes_its_own_tests(kind: str, projects: dict[str, Path]) -> None:
    """`codebook` does in tests/packaging, filled in."""
    out = ran(projects[kind], "pytest", "-q", "-p", "no:cacheprovider", site=projects["site"])
    assert re.search(r"\d+ passed", out)
    assert "failed" not in out


@pytest.mark.slow
@pytest.mark.vllm
def test_a_linear_method_of_its_own_passes_its_own_tests(projects: dict[str, Path]) -> None:
    out = ran(projects["custom"], "pytest", "-q", "-p", "no:cacheprovider", site=projects["site"])
    assert int(re.findall(r"(\d+) passed", out)[0]) > 30


def test_what_it_is_called(projects: dict[str, Path]) -> None:
    about = tomllib.loads((projects["codebook"] / "pyproject.toml").read_text())["project"]
    assert (about["name"], about["authors"]) == ("quantserve-x", [{"name": "Ada Ünal", "email": "ada@example.org"}])
    assert about["entry-points"] == {
        "quantserve.plugins": {"x": "quantserve_x.plugin"},
        "vllm.general_plugins": {"x": "quantserve_x:register"},
    }
    assert (projects["codebook"] / ".github/workflows/test.yml").read_text().count("${{ matrix.python }}") == 1
    about = tomllib.loads((projects["command"] / "pyproject.toml").read_text())["project"]
    assert about["license"] == "MIT OR Apache-2.0"
    assert about["entry-points"] == {"quantserve.commands": {"dtypes": "quantserve_dtypes.command:command"}}


@pytest.mark.parametrize("kind", PROJECTS)
def test_nothing_of_the_templates_is_left(kind: str, projects: dict[str, Path]) -> None:
    for path in projects[kind].rglob("*"):
        if path.is_file() and path.suffix in (".py", ".md", ".toml", ".yml", ""):
            text = path.read_text()
            assert not re.search(r"^#(if|end)|\{\{\w|\.tmpl", text, re.MULTILINE), path
            assert "package" not in path.relative_to(projects[kind]).parts


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_width_and_group_encodes_what_it_decodes(bits: int, group_size: int, tmp_path: Path, site: Site) -> None:
    """The quantizer and the reference of the template agree to half a step of the codes."""
    torch = pytest.importorskip("torch")
    folder = tmp_path / "p"
    project = Project("tried", "codebook", bits=bits, group_size=group_size)
    project.write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder / "src"))
        patch.syspath_prepend(str(folder / "tests"))
        try:
            from quantserve_tried.quantize import encode
            from reference import dequantize

            weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(bits))
            found = dequantize(encode(weight))
            assert found.shape == weight.shape
            groups = weight.unflatten(1, (-1, group_size))
            steps = groups.abs().amax(-1, keepdim=True) / 2 ** (bits - 1)
            error = (found.unflatten(1, (-1, group_size)) - groups).abs() / steps
            # There is no code for the largest positive value, and a float16 scale is off by up to 2**-11 of it.
            assert error.max() < 1.1
            assert error.mean() < 0.3
        finally:
            for name in [name for name in sys.modules if name.startswith(("quantserve_tried", "reference"))]:
                del sys.modules[name]


# --- refused -----------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["new-plugin", *arguments, "--no-input"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "fix: " in printed.err or "Usage: " in printed.err
    return printed.err


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Foo_Bar", "fix: use 'foo-bar'"),
        ("a b", "fix: use 'a-b'"),
        ("4bit", "fix: use a word such as 'mymethod'"),
        ("a--b", "fix: use 'a-b'"),
        ("-a", "No such option"),
        ("naïve", "cannot name a plugin"),
        ("../up", "fix: use 'up'"),
        ("x\x1b[2J", r"'x\x1b[2J' cannot name"),
        ("x" * 41, "a name of 41 characters; at most 40"),
        ("quantserve-mine", "fix: use 'mine'; quantserve- is put before it"),
        ("core", "reserved for quantserve itself"),
        ("kernels", "reserved for quantserve itself"),
        ("awq", "is a method of quantserve itself"),
        ("check", "is a command of quantserve itself"),
        ("bench", "is a command of quantserve itself"),
        ("exl2", "the name of a format that exists (EXL2)"),
        ("fp-quant", "the name of a format that exists"),
        ("awq-marlin", "the name of a format that exists"),
        ("", "a name is missing"),
    ],
)
def test_a_name_that_cannot_be(name: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(capsys, name, "--codebook", "--folder", str(tmp_path / "p"))
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "a name is missing"),
        (["mine"], "no kind is given\n  fix: give one of --vllm-method, --codebook"),
        (["mine", "--custom", "--policy"], "--custom and --policy exclude each other"),
        (["mine", "--policy", "--bits", "4"], "--bits goes with --codebook and --vllm-method, not --policy"),
        (["mine", "--codebook", "--vllm-name", "fp8"], "--vllm-name goes with --vllm-method"),
        (["mine", "--codebook", "--bits", "5"], "'5' is not one of"),
        (["mine", "--vllm-method"], "vLLM 0.32: unknown method 'mine'"),
        (["mine", "--vllm-method", "--vllm-name", "hummin"], "did you mean 'humming'"),
        (["mine", "--policy", "--summary", 'a "quoted" one'], "without quotes"),
        (["mine", "--policy", "--summary", "x" * 81], "at most 80 characters"),
        (["mine", "--policy", "--summary", "two\nlines"], "one line"),
        (["mine", "--policy", "--author", "<a@b>"], "is no author"),
        (["mine", "--policy", "--author", 'a"b'], "is no author"),
        (["mine", "--policy", "--license", '"MIT"'], "is no SPDX expression"),
    ],
)
def test_wrong_options(arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(capsys, *arguments, "--folder", str(tmp_path / "p"))
    assert not (tmp_path / "p").exists()


def test_a_folder_that_exists_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    assert "exists already" in refused(capsys, "mine", "--policy", "--folder", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert "cannot create" in refused(capsys, "mine", "--policy", "--folder", str(tmp_path / "mine.txt" / "p"))


def test_nothing_is_left_of_a_project_that_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def full(path: Path, text: str, **kwargs: object) -> int:
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device", str(path))
        return len(text)

    monkeypatch.setattr(Path, "write_text", full)
    assert run(["new-plugin", "mine", "--policy", "--folder", str(tmp_path / "p")]) == 2
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    "install",
    [
        lambda site: site.install("quantserve-mine", "", name="other"),
        lambda site: site.install("third", "", name="mine"),
        lambda site: site.command("third", "", name="mine"),
        lambda site: site.method("third", "first", ("mine",)),
        lambda site: (site.path / "quantserve_mine.py").write_text(""),
    ],
    ids=["distribution", "plugin", "command", "alias", "package"],
)
def test_a_name_that_something_installed_has(
    install: Callable[[Site], object], site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(site)
    assert "uninstall it first" in refused(capsys, "mine", "--codebook", "--folder", str(tmp_path / "p"))


def test_whose_files_they_are_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["new-plugin", "mine", "--vllm-method", "--vllm-name", "fp8", "--folder", str(tmp_path / "p")]) == 0
    assert "files that declare 'fp8' belong to fp8 (quantserve-fp8" in capsys.readouterr().err


# --- asked -------------------------------------------------------------------------------------------


def test_questions_on_a_terminal(tmp_path: Path) -> None:
    """What is not given is asked for; a name that cannot be is asked for again."""
    command = [sys.executable, "-m", "quantserve", "new-plugin", "--folder", str(tmp_path / "p"), "--bits", "8"]
    here, there = pty.openpty()
    program = subprocess.Popen(command, stdin=there, stdout=there, stderr=there, close_fds=True)
    os.close(there)
    answers = iter([b"Not_This\n", b"mine\n", b"codebook\n", b"64\n", b"\n", b"Ada\n"])
    shown = b""
    while True:
        try:
            read = os.read(here, 4096)
        except OSError:  # the terminal is gone with the program
            break
        if not read:
            break
        shown += read
        if re.search(rb": $", shown) and (answer := next(answers, b"")):
            os.write(here, answer)
    os.close(here)
    assert program.wait(timeout=60) == 0, shown.decode()
    about = tomllib.loads((tmp_path / "p" / "pyproject.toml").read_text())["project"]
    assert about["name"] == "quantserve-mine"
    assert about["description"] == "8-bit weights with a scale for 64 inputs"
    assert about["authors"] == [{"name": "Ada"}]
    assert "GROUP_SIZE = 64" in (tmp_path / "p/src/quantserve_mine/format.py").read_text()


def test_nothing_is_asked_without_a_terminal(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "quantserve", "new-plugin"]
    done = subprocess.run(command, input="mine\n", capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "a name is missing" in done.stderr


def test_a_plan_follows_the_policy(projects: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    model = {"engine_config": {"model_id": "m", "hf_model_id": str(tmp_path)}, "plugins": ["house-rules"]}
    (tmp_path / "m.json").write_text(json.dumps(model))
    variables = {**os.environ, "PYTHONPATH": str(projects["site"])}
    command = [sys.executable, "-m", "quantserve", "check", str(tmp_path / "m.json"), "--target", "a100-80g", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert "house-rules" in json.loads(done.stdout)["models"][0]["plugins"]
