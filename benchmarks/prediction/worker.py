"""The child: a vLLM engine that serves rounds of requests and says when each token came.

Started as ``python -m benchmarks.prediction.worker MODEL ARGUMENTS CELLS`` (the last two JSON); answers with a line of
JSON. The engine runs inside this process, so no HTTP and no process boundary is measured.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.decode.engine import Engine

Clock = Callable[[], float]


def serve(engine: Engine, clock: Clock, users: int, tokens_in: int, tokens_out: int) -> dict[str, float]:
    """One round: so many requests at once, until all are answered. Milliseconds, and tokens per second of all."""
    llm = engine.llm.llm_engine
    began = clock()
    names = engine._add(users, tokens_in, tokens_out)
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    while llm.has_unfinished_requests():
        outputs = llm.step()
        now = clock()
        for output in outputs:
            if output.outputs[0].token_ids:
                first.setdefault(output.request_id, now)
                last[output.request_id] = now
    spent = clock() - began
    return {
        "ttft_ms": 1000 * sum(first[name] - began for name in names) / users,
        "tpot_ms": 1000 * sum(last[name] - first[name] for name in names) / users / (tokens_out - 1),
        "tokens_per_s": users * tokens_out / spent,
    }


def main() -> None:
    """Measure every cell some rounds; the median of each number."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    model, arguments, cells = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    engine = Engine(model, arguments)
    clock = time.process_time if cells["clock"] == "cpu" else time.perf_counter
    serve(engine, clock, 2, cells["input_tokens"], 8)
    found: dict[str, Any] = {}
    for users in cells["concurrency"]:
        runs = [
            serve(engine, clock, users, cells["input_tokens"], cells["output_tokens"]) for _ in range(cells["rounds"])
        ]
        found[str(users)] = {name: median(run[name] for run in runs) for name in runs[0]}
    out.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
