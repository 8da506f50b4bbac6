"""Third-party plugins for tests: real dist-info folders on sys.path, so real entry points and real failures."""

from __future__ import annotations

import sys
from importlib.metadata import DistributionFinder, EntryPoints, MetadataPathFinder
from pathlib import Path
from textwrap import dedent

METHOD = """
from quantserve.api import Method, hookimpl

@hookimpl
def quantserve_method():
    return Method(name={name!r}, aliases={aliases!r}, summary="a test method", bits=(8,), vllm_name=None)
"""


class Site:
    """A folder of installed distributions; `entry_points` sees only those."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def install(
        self,
        distribution: str,
        code: str,
        *,
        name: str = "",
        version: str = "1.0",
        engine: dict[str, str] | None = None,
        module: str = "",
        requires: str = "",
    ) -> str:
        """Install a distribution with one module and one plugin entry point; returns the module's name."""
        module = module or distribution.replace("-", "_") + "_plugin"
        lines = ["[quantserve.plugins]", f"{name or distribution} = {module}"]
        if engine:
            lines += ["", "[vllm.general_plugins]", *(f"{key} = {value}" for key, value in engine.items())]
        self._write(distribution, version, requires, module, code, lines)
        return module

    def command(
        self,
        distribution: str,
        code: str,
        *,
        name: str,
        value: str = "",
        version: str = "1.0",
        requires: str = "",
    ) -> str:
        """Install a distribution with one module and one command, by default the module's `command`."""
        module = distribution.replace("-", "_") + "_command"
        lines = ["[quantserve.commands]", f"{name} = {value or f'{module}:command'}"]
        self._write(distribution, version, requires, module, code, lines)
        return module

    def page(
        self, distribution: str, code: str, *, name: str = "explorer", version: str = "1.0", requires: str = ""
    ) -> str:
        """Install a distribution with one module and the page `page` of it."""
        module = distribution.replace("-", "_") + "_page"
        lines = ["[quantserve.pages]", f"{name} = {module}:page"]
        self._write(distribution, version, requires, module, code, lines)
        return module

    def extension(
        self, distribution: str, code: str, group: str, name: str, attribute: str, *, version: str = "1.0"
    ) -> None:
        """Install a distribution with one module and one entry point of any group."""
        module = distribution.replace("-", "_") + "_extension"
        self._write(distribution, version, "", module, code, [f"[{group}]", f"{name} = {module}:{attribute}"])

    def _write(
        self, distribution: str, version: str, requires: str, module: str, code: str, entry_points: list[str]
    ) -> None:
        (self.path / f"{module}.py").write_text(dedent(code))
        info = self.path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata + (f"Requires-Dist: {requires}\n" if requires else ""))
        (info / "entry_points.txt").write_text("\n".join(entry_points) + "\n")

    def method(self, distribution: str, method: str, aliases: tuple[str, ...] = (), **kwargs: object) -> str:
        """Install a distribution that serves one method and does nothing else."""
        return self.install(distribution, METHOD.format(name=method, aliases=aliases), **kwargs)  # type: ignore[arg-type]

    def entry_points(self) -> EntryPoints:
        """The entry points installed here."""
        context = DistributionFinder.Context(path=[str(self.path)])
        found = MetadataPathFinder.find_distributions(context)
        return EntryPoints(point for dist in found for point in dist.entry_points)

    def forget(self) -> None:
        """Drop this site's modules, so that the next test imports its own."""
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(str(self.path)):
                del sys.modules[name]
