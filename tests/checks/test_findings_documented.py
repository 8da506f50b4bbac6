"""docs/findings.md lists every code that the sources can give, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
KEBAB = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)+")
DOCUMENTED = re.compile(rf"^\| `({KEBAB.pattern}|\*(?:-[a-z]+)+)` \|", re.MULTILINE)
# Calls whose text arguments name something else.
NOT_FINDINGS = (
    "PublishedRun", "Format", "format", "replace", "_gpu", "which", "decode", "_version", "_installed", "version",
    "str",
)  # fmt: skip


def codes() -> Iterator[tuple[str, Path]]:
    """Kebab-case texts given to a call that can make a finding, with the file."""
    core = [ROOT / "core/quantserve" / name for name in ("checkpoint", "checks", "model", "planning")]
    packages = [*core, ROOT / "plugins"]
    files = [file for package in packages for file in package.rglob("*.py") if "/tests/" not in str(file)]
    files += [ROOT / "core/quantserve/predict" / name for name in ("codebook.py", "cpu_kernels.py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or ast.unparse(node.func).rpartition(".")[2] in NOT_FINDINGS:
                continue
            if ast.unparse(node.func) in ("check_schemes", "check_linears", "check_fused_groups"):
                continue  # these get a prefix
            arguments = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "code")]
            for argument in arguments:
                if isinstance(argument, ast.Constant) and KEBAB.fullmatch(str(argument.value)):
                    yield str(argument.value), file
            # f"{code}-wrong-shape" is documented as *-wrong-shape, f"{self.method}-kernel" as *-kernel.
            for argument in arguments:
                if found := re.fullmatch(r"f['\"]\{[a-z_.]+\}((?:-[a-z]+)+)['\"]", ast.unparse(argument)):
                    yield f"*{found[1]}", file


def test_every_code_is_documented() -> None:
    documented = set(DOCUMENTED.findall((ROOT / "docs/findings.md").read_text()))
    missing = sorted({f"{code} ({file.relative_to(ROOT)})" for code, file in codes() if code not in documented})
    assert not missing, f"add to docs/findings.md: {missing}"


def test_every_documented_code_exists() -> None:
    documented = DOCUMENTED.findall((ROOT / "docs/findings.md").read_text())
    assert len(documented) == len(set(documented)), "a code is documented twice"
    gone = set(documented) - {code for code, _ in codes()}
    assert not gone, f"remove from docs/findings.md: {sorted(gone)}"
