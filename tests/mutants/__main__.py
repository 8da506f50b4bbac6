"""Put small defects into good plugins, one at a time, and see whether the conformance kit catches each.

    make mutants                          # all of them; up to half an hour on two cores
    make mutants ARGS="rtn8 --light"      # of one plugin, without those that need a process with vLLM

Prints the check that caught each, and exits 1 when fewer than 95 % are caught.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copytree

from mutants.defects import DEFECTS, Defect

ROOT = Path(__file__).parents[2]
PLUGINS = {
    "rtn8": ROOT / "examples" / "plugins" / "quantserve-rtn8",
    "fp8": ROOT / "plugins" / "fp8",
    "squeezellm": ROOT / "plugins" / "squeezellm",
}
LIGHT = (
    *("S01", "S02", "S03", "S04", "S05", "S06", "S07", "S08", "S09", "S10"),
    *("D", "V", "P01", "P02", "I01", "I02", "R", "T"),
)
"""Checks that start no vLLM."""
HEAVY = ("S11", "S12", "I03", "N", "P03", "Q")
ENOUGH = 0.95


def install(plugin: str, folder: Path, defect: Defect | None = None) -> None:
    """A copy of a plugin as an installed distribution, with a defect.

    Raises:
        ValueError: the defect's text is not in the file.
    """
    source = PLUGINS[plugin]
    package = f"quantserve_{plugin}"
    copytree(source / "src" / package, folder / package, ignore=lambda *_: ["__pycache__"])
    project = (source / "pyproject.toml").read_text()
    if defect:
        file = folder / package / defect.file
        if not defect.old:
            file.unlink()
        else:
            text = project if defect.file == "pyproject.toml" else file.read_text()
            if defect.old not in text:
                raise ValueError(f"{plugin}/{defect.file} has no {defect.old!r}")
            text = text.replace(defect.old, defect.new, 1)
            if defect.file == "pyproject.toml":
                project = text
            else:
                file.write_text(text)
    write_metadata(folder, tomllib.loads(project)["project"])


def write_metadata(folder: Path, project: dict[str, object]) -> None:
    """The dist-info of a project table."""
    name, version = str(project["name"]), str(project["version"])
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", f"Summary: {project['description']}"]
    lines += [f"License-Expression: {project['license']}"] if "license" in project else []
    lines += [f"Requires-Python: {project['requires-python']}"]
    lines += [f"Requires-Dist: {one}" for one in project["dependencies"]]  # type: ignore[attr-defined]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    groups: dict[str, dict[str, str]] = project["entry-points"]  # type: ignore[assignment]
    text = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(text))


def prepare(plugin: str, folder: Path) -> Path:
    """A case of a plugin whose checkpoint and reference are files, written once by the good plugin."""
    install(plugin, folder / "good")
    given = PLUGINS[plugin] / "tests" / "test_conformance.py"
    case = folder / "case.py"
    subprocess.run([sys.executable, "-c", _PREPARE, given, folder, case], check=True, env=environment(folder / "good"))
    return case


_PREPARE = """
import runpy, sys
from pathlib import Path
from safetensors.torch import save_file
given, folder, file = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
case = runpy.run_path(given)["CASE"]
checkpoint = case.checkpoint
if not isinstance(checkpoint, Path):
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    case.checkpoint(checkpoint)
weights = {name: weight.contiguous() for name, weight in case.reference(checkpoint).items()}
save_file(weights, folder / "reference.safetensors")
file.write_text(f'''
from pathlib import Path
from quantserve.testing import Case

def reference(folder):
    from safetensors.torch import load_file
    return load_file({str(folder / "reference.safetensors")!r})

CASE = Case({case.name!r}, checkpoint=Path({str(checkpoint)!r}), reference=reference, harmless={dict(case.harmless)!r})
''')
"""


def environment(folder: Path) -> dict[str, str]:
    """Variables with which a copy of a plugin comes before the installed one."""
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "QUANTSERVE_HOOK_TIMEOUT": "20"}


def check(plugin: str, folder: Path, case: Path, only: tuple[str, ...]) -> tuple[int, str]:
    """Exit code of the kit on an installed copy, and what it says."""
    command = [sys.executable, "-m", "quantserve", "plugin", "check", plugin, "--case", str(case), "--first", "--json"]
    options = [part for id in only for part in ("--only", id)]
    done = subprocess.run(
        [*command, *options],
        capture_output=True,
        text=True,
        env=environment(folder),
        timeout=1800,
    )
    try:
        checks = json.loads(done.stdout)["reports"][0]["checks"]
    except (ValueError, LookupError):
        return done.returncode, done.stderr.strip()[-300:]
    failed = [one for one in checks if one["outcome"] == "failed"]
    return done.returncode, f"{failed[0]['id']}: {failed[0]['problems'][0]}" if failed else ""


def caught(defect: Defect | None, plugin: str, case: Path, *, light: bool = False) -> str:
    """What the kit says of a defect, "" when it says nothing."""
    with tempfile.TemporaryDirectory() as folder:
        install(plugin, Path(folder), defect)
        for only in (LIGHT,) if light else (LIGHT, HEAVY):
            code, said = check(plugin, Path(folder), case, only)
            if code:
                return said or f"exit code {code}"
    return ""


def main() -> None:
    """Try every defect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plugins", nargs="*", metavar="PLUGIN", help=", ".join(PLUGINS))
    parser.add_argument("--light", action="store_true", help="without the checks that need a process with vLLM")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once; default 2")
    arguments = parser.parse_args()
    plugins, light, began = arguments.plugins or list(PLUGINS), arguments.light, time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        cases = {plugin: prepare(plugin, Path(folder, plugin)) for plugin in plugins}
        for plugin, case in cases.items():
            if said := caught(None, plugin, case, light=light):
                sys.exit(f"{plugin} without a defect does not pass: {said}")
        chosen = [defect for defect in DEFECTS if defect.plugin in plugins]
        verdicts = pool.map(lambda one: caught(one, one.plugin, cases[one.plugin], light=light), chosen)
        missed = []
        for defect, said in zip(chosen, verdicts, strict=True):
            name = f"{defect.plugin}/{defect.file}: {defect.old[:60]!r} -> {defect.new[:80]!r}"
            print(f"{'caught' if said else 'MISSED'}  {name}  {said[:160]}", flush=True)
            missed += [] if said else [name]
    share = 1 - len(missed) / len(chosen)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught ({share:.1%}) in {time.monotonic() - began:.0f} s")
    print(*(f"missed: {name}" for name in missed), sep="\n")
    sys.exit(0 if share >= ENOUGH else 1)


if __name__ == "__main__":
    main()
