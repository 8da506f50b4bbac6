"""Write the generated parts of docs/ anew: command help, config keys and patches, between markers in the Markdown.

    .venv/bin/python scripts/update_docs.py

A part begins with ``<!-- generated: KIND NAME -->`` and ends with ``<!-- end -->``. tests/test_docs.py fails when one
is out of date.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from quantserve.cli.main import cli
from quantserve.config import json_schema
from quantserve.serve.replica.vllm.patches import PATCHES
from quantserve.testing import CHECKS
from quantserve.testing.check import GROUPS
from quantserve_bench.markdown import DEFINITION_COLUMNS, definitions, table
from quantserve_bench.metrics import TOTALS

DOCS = Path(__file__).resolve().parents[1] / "docs"
PART = re.compile(r"(<!-- generated: (?P<kind>\w+) ?(?P<name>[\w-]*) -->\n).*?(<!-- end -->)", re.DOTALL)


def command_help(name: str) -> str:
    """``--help`` of a command, of a group's command (``plugin--check``), or of quantserve itself for the empty name."""
    arguments = [*(name.split("--") if name else []), "--help"]
    result = CliRunner(env={"COLUMNS": "100"}).invoke(cli, arguments, prog_name="quantserve", terminal_width=100)
    assert result.exit_code == 0, result.output
    return f"```text\n{result.output.strip()}\n```\n"


def config_keys(name: str) -> str:
    """A table of the keys of one section of the config, from its JSON Schema."""
    schema = json_schema()
    section = schema["$defs"][name]
    rows = []
    for key, spec in section["properties"].items():
        meaning = spec.get("description", "").replace("|", "\\|").replace("\n", " ")
        rows.append([f"`{key}`", " or ".join(kinds(spec)), default(key, spec, section), bounds(spec), meaning])
    header = ["key", "type", "default", "bounds", "meaning"]
    if not any(row[3] for row in rows):
        header, rows = [*header[:3], header[4]], [[*row[:3], row[4]] for row in rows]
    lines = [f"| {' | '.join(row)} |\n" for row in [header, *rows]]
    return "".join([lines[0], "|---" * len(header), "|\n", *lines[1:]])


def bounds(spec: Mapping[str, Any]) -> str:
    """The numbers that are allowed, such as ``1 to 64``."""
    spec = next((option for option in spec.get("anyOf", ()) if option.get("type") in ("integer", "number")), spec)
    low, high, above = (spec.get(name) for name in ("minimum", "maximum", "exclusiveMinimum"))
    least = "" if low is None and above is None else f"above {above:g}" if low is None else f"{low:g}"
    if high is None:
        return f"{least} or more" if least and low is not None else least
    return f"{least} to {high:,}".replace(",", " ") if least else f"at most {high:g}"


def kinds(spec: Mapping[str, Any]) -> Iterator[str]:
    """The types a value may have, in plain words."""
    if "$ref" in spec:
        name = spec["$ref"].rpartition("/")[2]
        yield f"[{name}](#{name.lower()})"
    elif "enum" in spec:
        yield ", ".join(f"`{value}`" for value in spec["enum"])
    elif "anyOf" in spec:
        yield from dict.fromkeys(kind for option in spec["anyOf"] for kind in kinds(option) if kind != "null")
    elif isinstance(spec.get("type"), list):
        yield from spec["type"]
    elif spec.get("type") == "array":
        yield f"list of {' or '.join(kinds(spec['items']))}"
    else:
        names = {"object": "mapping", "string": "text", "boolean": "true, false", "integer": "whole number"}
        yield names.get(spec.get("type", ""), spec.get("type", "any"))


def default(key: str, spec: Mapping[str, Any], section: Mapping[str, Any]) -> str:
    """The default as it would be written, ``required``, or nothing where the description tells it."""
    if key in section.get("required", ()):
        return "required"
    value = spec.get("default")
    return "" if value is None else f"`{json.dumps(value)}`"


def bench_definitions(name: str) -> str:
    """A table of what `quantserve bench` measures: per request, or of the whole run."""
    if name == "requests":
        return f"{table(DEFINITION_COLUMNS, definitions(), left=4)}\n"
    rows = [[f"`{key}`", unit, text] for key, (unit, text) in TOTALS.items()]
    return f"{table(('key', 'unit', 'definition'), rows, left=3)}\n"


def patches(name: str) -> str:
    """A table of the patches of other packages."""
    rows = [
        " | ".join((f"| `{key}`", "yes" if one.safety else "", one.changes, one.why, one.gain, f"{one.without} |"))
        for key, one in PATCHES.items()
    ]
    return "\n".join(["| patch | safety | changes | why | gain | without |", "|---|---|---|---|---|---|", *rows]) + "\n"


def conformance(name: str) -> str:
    """The checks of the conformance kit by group, from their docstrings."""
    lines = []
    for letter, group in GROUPS.items():
        lines += [f"### {letter}: {group}", ""]
        for one in CHECKS.values():
            if one.id.startswith(letter):
                needs = f" Applies to: {', '.join(sorted(one.needs - {'loaded'}))}." if one.needs - {"loaded"} else ""
                lines += [f"**`{one.id}`** {' '.join(one.text.split())}{needs} *What to do:* {one.fix}", ""]
    return "\n".join(lines)


KINDS: Mapping[str, Callable[[str], str]] = {
    "help": command_help,
    "config": config_keys,
    "bench": bench_definitions,
    "patches": patches,
    "checks": conformance,
}


def updated(text: str) -> str:
    """A document with every generated part made anew."""
    return PART.sub(lambda match: match[1] + KINDS[match["kind"]](match["name"]) + match[4], text)


def main() -> None:
    """Write what changed, and say so."""
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text()
        new = updated(text)
        if new != text:
            path.write_text(new)
            print(f"updated docs/{path.name}")


if __name__ == "__main__":
    main()
