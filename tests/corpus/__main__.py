"""Check the whole corpus and print the table.

    PYTHONPATH=tests .venv/bin/python -m corpus [--wrong] [--quick] [NAME...]

``--wrong`` prints only what is judged wrongly, ``--quick`` leaves out the checkpoints of more than 50,000 tensors, NAME
is a part of a name.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from corpus import entries
from corpus.judge import judge, table
from quantserve.plugins.registry import Registry


def main(arguments: list[str]) -> int:
    """Exit code 1 when something is judged wrongly."""
    wanted = [argument.replace("/", "--") for argument in arguments if not argument.startswith("--")]
    registry = Registry.load()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in entries.names():
            if wanted and not any(part in name for part in wanted):
                continue
            entry = entries.read(name)
            if entry.large and "--quick" in arguments:
                continue
            where = entry.write(Path(folder) / name)
            rows += [judge(entry, case, where, registry) for case in entry.cases]
    print(table(rows, everything="--wrong" not in arguments))
    return any(row.differences for row in rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
