"""Run the matrix, as far as it has no results, and print the table.

    make matrix                                # 160 engines, an hour on two cores
    make matrix ARGS="--only fp8 --minutes 5"  # cases by a part of their names, for so long
    make matrix ARGS=--quick                   # two engines for each case
    make matrix ARGS="--again --write"         # forget the results; put the table into docs/formats.md

Every engine runs as `quantserve plan` says, apart from dtype and mode. Its tokens are held against transformers on the
dequantized weights in float32, which continues the engine's own text, wherever the two best logits are clearly apart.
Results are kept in build/matrix.json. Exit code 1 when an engine fails or a clear token differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from itertools import product
from pathlib import Path

from helpers.composed import composed, errors
from helpers.engines import PROMPTS, compare, run
from matrix.checkpoints import CASES, Case

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "build" / "matrix.json", ROOT / "docs" / "formats.md"
BEGIN, END = "<!-- matrix: begin -->\n", "<!-- matrix: end -->\n"
RANKS, EAGER = (1, 2), (True, False)
QUICK = (("float16", 1, True), ("bfloat16", 2, False))
"""Every dtype, number of ranks and mode once."""
CLEAR = {"float16": 0.1, "bfloat16": 0.3}
"""By how much the two best logits differ where a token counts."""
CLOSE = {"float16": 0.1, "bfloat16": 0.4}
"""How far the log-probability of a token may lie from that of transformers."""
SHARE = 0.2
"""Of the tokens that must count."""


def cell(case: Case, quantized: Path, plain: Path, dtype: str, ranks: int, eager: bool) -> str:
    """Run one engine: ``equal``, or what went wrong."""
    composition = composed(quantized, "cpu", ranks)
    if found := [code for code in errors(composition) if code != "tokenizer-missing"]:
        return f"refused: {', '.join(found)}"
    vocabulary = json.loads((plain / "config.json").read_text())["vocab_size"]
    prompts = [[token % vocabulary for token in prompt] for prompt in PROMPTS]
    kwargs = {key: setting.value for key, setting in composition.engine_kwargs.items()}
    kwargs |= {"dtype": dtype, "enforce_eager": eager, "tensor_parallel_size": ranks}
    try:
        environment = {**composition.environment, **composition.engine_environment}
        ended = run(quantized, environment, prompts=prompts, **kwargs)
    except RuntimeError as error:
        (ROOT / "build" / "matrix-failed.log").write_text(str(error))
        return "failed: " + next((line for line in str(error).splitlines()[::-1] if "Error" in line), "?")[-160:]
    try:
        compare(plain, ended.generations, clear=CLEAR[dtype], close=CLOSE[dtype], share=SHARE)
    except AssertionError as error:
        return f"differs: {' '.join(str(error).split())[:160]}"
    return "equal"


def key_of(name: str, dtype: str, ranks: int, eager: bool) -> str:
    """Of a cell in the results."""
    return f"{name} {dtype} tp{ranks} {'eager' if eager else 'compiled'}"


def table(results: dict[str, str]) -> str:
    """As Markdown: a row for each checkpoint and dtype with results."""
    modes = list(product(RANKS, EAGER))
    head = [
        f"{'one rank' if ranks == 1 else 'two ranks'}, {'eager' if eager else 'compiled'}" for ranks, eager in modes
    ]
    lines = [f"| plugin | checkpoint | dtype | {' | '.join(head)} |", "|---" * (3 + len(modes)) + "|"]
    for name, case in CASES.items():
        for dtype in case.dtypes:
            cells = [results.get(key_of(name, dtype, *mode), "") for mode in modes]
            if any(cells):
                lines.append(f"| {case.plugin} | {case.what} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Exit code 1 when an engine fails or a clear token differs."""
    parser = argparse.ArgumentParser(prog="matrix")
    parser.add_argument("--only", default="", help="parts of the names of cases, with commas between")
    parser.add_argument("--minutes", type=float, default=600, help="begin no engine after so long")
    parser.add_argument("--quick", action="store_true", help="two engines for each case")
    parser.add_argument("--again", action="store_true", help="forget the results of these cases")
    parser.add_argument("--write", action="store_true", help="put the table into docs/formats.md")
    options = parser.parse_args(arguments)
    results: dict[str, str] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    names = [name for name in CASES if any(part in name for part in options.only.split(","))]
    if options.again:
        results = {
            key: value for key, value in results.items() if not any(key.startswith(f"{name} ") for name in names)
        }
    RESULTS.parent.mkdir(exist_ok=True)
    last = time.monotonic() + 60 * options.minutes
    for name in names:
        case = CASES[name]
        wanted = QUICK if options.quick else product(case.dtypes, RANKS, EAGER)
        cells = [one for one in wanted if one[0] in case.dtypes and key_of(name, *one) not in results]
        if not cells or time.monotonic() > last:
            continue
        with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
            quantized, plain = case.write(Path(folder))
            for dtype, ranks, eager in cells:
                if time.monotonic() > last:
                    break
                key = key_of(name, dtype, ranks, eager)
                results[key] = cell(case, quantized, plain, dtype, ranks, eager)
                print(f"{key}: {results[key]}", flush=True)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    if options.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + table(results) + END + rest.partition(END)[2])
    print(dict(Counter(value.partition(":")[0] for value in results.values())))
    return any(value.startswith(("failed", "differs")) for value in results.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
