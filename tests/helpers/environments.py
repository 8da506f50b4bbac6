"""Built distributions and the virtual environments they are installed into."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLUGINS = {path.parent.name: path.parent for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))}
"""Every method of this project by name, and its folder."""
PROJECTS = {
    "quantserve": ROOT,
    "quantserve-bench": ROOT / "bench",
    "quantserve-quantize": ROOT / "quantize",
    "quantserve-client": ROOT / "client",
    "quantserve-explorer": ROOT / "explorer",
    "quantserve-kernels": ROOT / "kernels",
    **{f"quantserve-{name}": path for name, path in PLUGINS.items()},
}


def build(project: Path, out: Path) -> None:
    """Build the sdist of a project, and its wheel from that sdist; the kernels' C++ takes a minute or two."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(project)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr


@dataclass
class Environment:
    """A virtual environment without pip of its own; the pip of these tests installs into it."""

    path: Path

    @classmethod
    def make(cls, path: Path) -> Environment:
        """A new, empty one."""
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(path)], check=True, timeout=300)
        return cls(path)

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    @property
    def site(self) -> Path:
        return next((self.path / "lib").glob("python*/site-packages"))

    def see_packages_of_this_python(self) -> None:
        """Let it import what runs these tests (the engine); its own packages come first."""
        outer = sysconfig.get_path("purelib")
        (self.site / "zz_outer.pth").write_text(f"import site; site.addsitedir({outer!r})\n")

    def pip(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run pip on this environment."""
        command = [sys.executable, "-m", "pip", "--python", str(self.python), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    def variables(self, **extra: str) -> dict[str, str]:
        """The environment variables of its programs: this process's, without its Python paths."""
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return {**kept, "PATH": f"{self.path / 'bin'}{os.pathsep}{os.environ['PATH']}", **extra}

    def run(self, program: str, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run one of its programs, away from the checkout."""
        return subprocess.run(
            [str(self.path / "bin" / program), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=self.path,
            env=self.variables(**variables),
        )
