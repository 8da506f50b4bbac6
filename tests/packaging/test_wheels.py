"""The distributions as users get them: what is inside, and that they work in an empty environment."""

from __future__ import annotations

import json
import shutil
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from helpers.checkpoints import make_llama
from helpers.environments import PLUGINS, PROJECTS, ROOT, Environment

pytestmark = pytest.mark.slow

HEAVY = ("torch", "vllm", "ray", "transformers", "numpy")
NO_INDEX = ("NewConnectionError", "Temporary failure in name resolution", "Network is unreachable", "ConnectTimeout")


def wheel(dist: Path, name: str) -> zipfile.ZipFile:
    (path,) = dist.glob(f"{name.replace('-', '_')}-[0-9]*.whl")
    return zipfile.ZipFile(path)


def read(archive: zipfile.ZipFile, name: str) -> str:
    (path,) = (entry for entry in archive.namelist() if entry.endswith(f".dist-info/{name}"))
    return archive.read(path).decode()


def metadata(dist: Path, name: str) -> Message:
    return Parser().parsestr(read(wheel(dist, name), "METADATA"))


@pytest.mark.parametrize("name", PROJECTS)
def test_wheel_holds_the_package_and_nothing_else(dist: Path, name: str) -> None:
    archive = wheel(dist, name)
    package = name.replace("-", "_")
    inside = [entry for entry in archive.namelist() if ".dist-info/" not in entry]
    assert all(entry.startswith(f"{package}/") for entry in inside)
    assert f"{package}/py.typed" in inside
    assert f"{package}/__init__.py" in inside
    # new_plugin's templates have tests of the plugins to come.
    tests = [entry for entry in inside if "tests/" in entry and "/new_plugin/templates/" not in entry]
    assert not [*tests, *(entry for entry in inside if "__pycache__" in entry)]
    assert "Apache License" in read(archive, "licenses/LICENSE")
    source = next(path for path in (PROJECTS[name] / "core", PROJECTS[name] / "src") if path.is_dir())
    modules = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    assert modules == {entry for entry in inside if entry.endswith(".py")}


@pytest.mark.parametrize("name", PROJECTS)
def test_metadata_is_what_an_index_shows(dist: Path, name: str) -> None:
    about = metadata(dist, name)
    assert about["Name"] == name
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.11"
    assert len(about["Summary"]) > 20
    assert about["Description-Content-Type"] == "text/markdown"
    assert name in str(about.get_payload())


@pytest.mark.parametrize("name", PROJECTS)
def test_sdist_is_complete_and_small(dist: Path, name: str) -> None:
    (path,) = dist.glob(f"{name.replace('-', '_')}-[0-9]*.tar.gz")
    with tarfile.open(path) as archive:
        names = {entry.partition("/")[2] for entry in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO"} <= names
    assert not [
        entry
        for entry in names
        if "__pycache__" in entry or ".mypy" in entry or entry.startswith((".venv", "examples"))
    ]
    assert path.stat().st_size < 4_000_000  # files that quantizers wrote, for the tests, do not shrink


def test_the_kernels_come_compiled_or_say_why_not(dist: Path) -> None:
    names = wheel(dist, "quantserve-kernels").namelist()
    (name,) = (entry for entry in names if entry.startswith(("quantserve_kernels/_C.", "quantserve_kernels/build-")))
    assert name.endswith(".so" if shutil.which("c++") else "/build-failure.txt")


def test_the_kernels_sdist_can_be_compiled_and_tested(dist: Path) -> None:
    (path,) = dist.glob("quantserve_kernels-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {entry.partition("/")[2] for entry in archive.getnames()}
    project = PROJECTS["quantserve-kernels"]
    sources = {*project.glob("csrc/*.*"), *project.glob("tests/*.py"), project / "setup.py"}
    assert {str(source.relative_to(project)) for source in sources} <= names
    assert not [entry for entry in names if entry.endswith((".so", ".o", "build-failure.txt"))]


def test_the_kernels_wheel_multiplies(dist: Path, tmp_path: Path) -> None:
    environment = Environment.make(tmp_path / "environment")
    (path,) = dist.glob("quantserve_kernels-*.whl")
    installed = environment.pip("install", "--no-deps", "--no-index", path)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    environment.see_packages_of_this_python()
    code = """
import torch
import quantserve_kernels as kernels
weight = kernels.pack(torch.randint(0, 16, (96, 64), dtype=torch.uint8), torch.randn(96, 16), bits=4)
x = torch.randn(5, 64)
torch.testing.assert_close(kernels.linear(x, weight), x @ weight.dequantize().t(), rtol=1e-4, atol=1e-4)
print(kernels.__file__, kernels.status().native, kernels.instruction_set())
"""
    done = environment.run("python", "-c", code)
    assert done.returncode == 0, done.stderr
    file, native, used = done.stdout.split()
    assert file.startswith(str(environment.path))
    assert (native, used == "torch") == (("True", False) if shutil.which("c++") else ("False", True))


def test_every_plugin_has_its_entry_points(dist: Path) -> None:
    for name in PLUGINS:
        points = read(wheel(dist, f"quantserve-{name}"), "entry_points.txt")
        assert f"[quantserve.plugins]\n{name} = quantserve_{name.replace('-', '_')}.plugin" in points
    points = read(wheel(dist, "quantserve-squeezellm"), "entry_points.txt")
    assert "[vllm.general_plugins]\nsqueezellm = quantserve_squeezellm:register" in points
    bench = read(wheel(dist, "quantserve-bench"), "entry_points.txt")
    assert "[quantserve.commands]\nbench = quantserve_bench.command:command" in bench
    assert "quantserve = quantserve.cli.main:main" in read(wheel(dist, "quantserve"), "entry_points.txt")


def test_the_page_travels_in_its_wheel(dist: Path) -> None:
    archive = wheel(dist, "quantserve-explorer")
    assert "[quantserve.pages]\nexplorer = quantserve_explorer.app:page" in read(archive, "entry_points.txt")
    static = PROJECTS["quantserve-explorer"] / "src" / "quantserve_explorer" / "static"
    files = {f"quantserve_explorer/static/{path.relative_to(static)}" for path in static.rglob("*") if path.is_file()}
    assert files == {entry for entry in archive.namelist() if "/static/" in entry and ".dist-info/" not in entry}
    assert "quantserve_explorer/static/index.html" in files
    libraries = {path.name for path in (static / "vendor").iterdir()}
    licensed = {
        entry.split("/")[-2] for entry in archive.namelist() if entry.endswith("/LICENSE") and "/licenses/src/" in entry
    }
    assert licensed == libraries


def test_extras_lead_to_distributions_that_exist(dist: Path) -> None:
    about = metadata(dist, "quantserve")
    extras = set(about.get_all("Provides-Extra") or [])
    assert extras == {*PLUGINS, "kernels", "all", "bench", "quantize", "client", "explorer", "s3", "gs", "cpu", "cuda"}
    required = [Requirement(text) for text in about.get_all("Requires-Dist") or []]
    versions = {name: metadata(dist, name)["Version"] for name in PROJECTS}
    pins = dict(
        line.split("==")
        for path in (ROOT / "constraints").glob("*.txt")
        for line in path.read_text().splitlines()
        if not line.startswith("#")
    )
    for requirement in required:
        known = versions | pins
        assert requirement.name in known
        assert requirement.specifier.contains(known[requirement.name]), requirement
    for extra, expected in {
        "all": {*PLUGINS, "bench", "quantize", "client", "explorer"},
        "bench": {"bench"},
        "awq": {"awq"},
        "kernels": {"kernels"},
    }.items():
        named = {r.name for r in required if r.marker and r.marker.evaluate({"extra": extra})}
        assert named == {f"quantserve-{name}" for name in expected}


def test_versions_agree() -> None:
    versions = {
        tomllib.loads((path / "pyproject.toml").read_text())["project"]["version"] for path in PROJECTS.values()
    }
    assert len(versions) == 1
    assert f'__version__ = "{versions.pop()}"' in (ROOT / "core" / "quantserve" / "__init__.py").read_text()


def test_wheels_work_in_an_empty_environment(dist: Path, tmp_path: Path) -> None:
    """No engine there: listing, checking, planning and the schema need none."""
    environment = Environment.make(tmp_path / "environment")
    pins = ROOT / "constraints" / "cpu.txt"
    installed = environment.pip("install", "--find-links", dist, "--constraint", pins, "quantserve[all]")
    if installed.returncode and any(sign in installed.stdout + installed.stderr for sign in NO_INDEX):
        pytest.skip("no package index can be reached for pydantic, click and the other light dependencies")
    assert installed.returncode == 0, installed.stdout + installed.stderr
    absent = environment.run(
        "python", "-c", f"import importlib.util as u; print([n for n in {HEAVY} if u.find_spec(n)], end='')"
    )
    assert absent.stdout == "[]"

    listed = environment.run("quantserve", "list", "--json")
    assert listed.returncode == 0, listed.stderr
    report = json.loads(listed.stdout)
    assert {plugin["name"]: plugin["distribution"] for plugin in report["plugins"]} == {
        name: f"quantserve-{name}" for name in PLUGINS
    }
    assert report["failures"] == []
    assert [(row["name"], row["state"]) for row in report["commands"]] == [
        ("bench", "ok"),
        ("chat", "ok"),
        ("evaluate", "ok"),
        ("models", "ok"),
        ("quality", "ok"),
        ("quantize", "ok"),
        ("query", "ok"),
    ]
    heavy = environment.run("quantserve", "quantize", "model", "--method", "awq", "--out", "out")
    assert heavy.returncode == 2, heavy.stderr
    assert "fix: pip install 'quantserve[cpu]'" in heavy.stderr
    unreachable = environment.run("quantserve", "bench", "--url", "http://127.0.0.1:9", "--no-plots")
    assert unreachable.returncode == 4, unreachable.stderr
    assert environment.pip("uninstall", "--yes", "quantserve-bench").returncode == 0
    missing = environment.run("quantserve", "bench", "--url", "http://127.0.0.1:9")
    assert missing.returncode == 2
    assert "quantserve-bench is not installed\n  fix: pip install 'quantserve[bench]'" in missing.stderr

    for method in ("fp16", "awq", "squeezellm"):
        model = make_llama(tmp_path / method, method)
        checked = environment.run("quantserve", "check", model, "--target", "a100-80g", "--json")
        assert checked.returncode == 0, checked.stdout + checked.stderr
        assert json.loads(checked.stdout)["models"][0]["method"] == method
    assert environment.run("quantserve", "plan", model, "--target", "cpu").returncode == 0
    schema = environment.run("quantserve", "schema")
    assert json.loads(schema.stdout)["$schema"]

    served = environment.run("quantserve", "serve", tmp_path / "fp16", "--target", "cpu")
    assert served.returncode != 0
    assert "pip install" in served.stderr
    assert "Traceback" not in served.stderr
