"""The load, from a process of its own: `python -m benchmarks.serving.client`, one cell per line of JSON.

The load generator is that of `quantserve bench`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any, Final

from benchmarks.console import ROOT, BenchError
from benchmarks.decode.worker import Channel
from benchmarks.serving.cells import Cell
from benchmarks.serving.models import TOKENIZER
from quantserve_bench import Closed, Request, Run, Target, measure, run, run_blocking
from quantserve_bench.prompts import Lengths, Maker, poem, random_request
from quantserve_bench.tokens import FileTokenizer, Tokenizer
from quantserve_bench.workloads import WORKLOADS

CHAT_FRAME: Final = 4
"""Tokens the demo's chat template adds."""
REQUEST_S: Final = 180.0
ERROR_SHOWN: Final = 200


# --- the parent's side


class Client:
    """The process that sends the load.

    Attributes:
        priority: whether it runs before any server's process.
    """

    def __init__(self) -> None:
        line = [sys.executable, "-m", "benchmarks.serving.client"]
        self._process = subprocess.Popen(line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.priority = bool(self._answer().get("priority"))

    def load(self, cell: Cell, targets: Sequence[Target], seed: str, salt: str) -> dict[str, Any]:
        """Send a cell's requests; its figures.

        Args:
            cell: what to send.
            targets: one per model of the cell.
            seed: the same seed and cell give the same prompts.
            salt: keeps prompts out of the prefix caches that other salts filled.

        Raises:
            BenchError: the process is gone, or failed; says why.
        """
        self.prepare(cell, seed, salt)
        return self.send(targets)

    def prepare(self, cell: Cell, seed: str, salt: str) -> None:
        """Make the prompts of the next load, which takes processor time that no server should miss."""
        self._ask({"do": "prepare", "cell": vars(cell), "seed": seed, "salt": salt})

    def send(self, targets: Sequence[Target]) -> dict[str, Any]:
        """Send what was prepared, one target per model of the cell; figures."""
        return self._ask({"do": "send", "targets": [[target.url, target.model] for target in targets]})

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(f"the client ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"the client failed: {answer['error']}")
        return answer


# --- the process


@dataclass
class Sender:
    """What the process holds between two commands."""

    tokenizer: Tokenizer
    cell: Cell | None = None
    requests: Sequence[Request] = ()

    def prepare(self, cell: dict[str, Any], seed: str, salt: str) -> dict[str, Any]:
        """Make the prompts."""
        self.cell = Cell(**{**cell, "models": tuple(cell["models"])})
        self.requests = make_requests(self.cell, self.tokenizer, seed, salt)
        return {}

    def send(self, targets: list[list[str]]) -> dict[str, Any]:
        """Send them, each target its share."""
        assert self.cell is not None
        users = max(1, self.cell.users // len(targets))
        shares = [self.requests[number :: len(targets)] for number in range(len(targets))]
        loads = [
            run(Target(url, model), share, Closed(users), timeout_s=REQUEST_S)
            for (url, model), share in zip(targets, shares, strict=True)
        ]

        async def together() -> list[Run]:
            return list(await asyncio.gather(*loads))

        return figures(merged(run_blocking(together())))


def make_requests(cell: Cell, tokenizer: Tokenizer, seed: str, salt: str) -> list[Request]:
    """The requests of a cell: prompts of exact or nearly exact length, none like another, answers of exact length."""
    workload = replace(
        WORKLOADS["random"],
        input_tokens=Lengths(cell.input_tokens),
        output_tokens=Lengths(cell.output_tokens),
        temperature=0.0,
        ignore_eos=True,
    )
    maker = Maker(workload, random.Random(seed), tokenizer, seed)
    made = []
    for number in range(cell.requests):
        maker.number = number
        request = random_request(maker) if cell.api == "completions" else chat_request(maker)
        made.append(replace(request, extra={"cache_salt": salt}))
    return made


def chat_request(maker: Maker) -> Request:
    """Lines of poetry in an order of their own, cut to length."""
    lines = list(poem())
    maker.chance.shuffle(lines)
    length = int(maker.workload.input_tokens.mean)
    text, tokens = maker.fill("", cycle(lines), length - CHAT_FRAME)
    return Request(
        messages=[{"role": "user", "content": text}],
        max_tokens=int(maker.workload.output_tokens.mean),
        temperature=0.0,
        ignore_eos=True,
        input_tokens=tokens + CHAT_FRAME,
    )


def merged(runs: Sequence[Run]) -> Run:
    """Runs that went on at the same time, as one."""
    if len(runs) == 1:
        return runs[0]
    users = sum(one.load.concurrency for one in runs if isinstance(one.load, Closed))
    return Run(
        load=Closed(users),
        results=sorted((result for one in runs for result in one), key=lambda result: result.start),
        began=min(one.began for one in runs),
        ended=max(one.ended for one in runs),
        unix_time=min(one.unix_time for one in runs),
        cpu_s=max(one.cpu_s for one in runs),  # each counts the whole process
        lag_mean_s=max(one.lag_mean_s for one in runs),
        lag_max_s=max(one.lag_max_s for one in runs),
    )


def figures(done: Run) -> dict[str, Any]:
    """What the tables need of a run; times in ms."""
    measured = measure(done)
    totals, summaries = measured.totals, measured.summaries

    def of(key: str, what: str) -> float | None:
        summary = summaries.get(key)
        if summary is None:
            return None
        return summary.mean if what == "mean" else summary.percentiles[int(what)]

    return {
        "tokens_per_s": totals["output_tokens_per_s"],
        "ttft_ms": of("ttft", "mean"),
        "ttft_p50_ms": of("ttft", "50"),
        "ttft_p99_ms": of("ttft", "99"),
        "gap_p50_ms": of("itl", "50"),
        "gap_p99_ms": of("itl", "99"),
        "e2e_ms": of("e2e", "mean"),
        "input_tokens": of("input_tokens", "mean"),
        "tokens_per_event": of("tokens_per_event", "mean"),
        "duration_s": totals["duration_s"],
        "completed": int(totals["completed"]),
        "errors": int(totals["errors"]),
        "error_messages": {code: text[:ERROR_SHOWN] for code, text in measured.error_messages.items()},
        "client_share": totals["client_share"],
        "lag_max_ms": totals["loop_lag_max_ms"],
    }


def hurry() -> bool:
    """Run before any server's process, so that time stamps are those of the arrival; whether the system allows it.

    A client on another machine would not wait for a server's processes either; this one uses a few per cent of a core.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except (OSError, AttributeError):
        return False
    return True


def main() -> None:
    """Started by the parent."""

    def start() -> tuple[dict[str, Any], dict[str, Any]]:
        sender = Sender(FileTokenizer(str(TOKENIZER)))
        return {"ready": True, "priority": hurry()}, {"prepare": sender.prepare, "send": sender.send}

    Channel().run(start)


if __name__ == "__main__":
    main()
