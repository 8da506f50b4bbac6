"""The serving benchmark's own logic: what is sent, how servers are held still and ended, what the tables say."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.console import BenchError
from benchmarks.serving import results
from benchmarks.serving.__main__ import choice_of, parser
from benchmarks.serving.cells import FAST, SLOW, Cell, Choice
from benchmarks.serving.client import make_requests, merged
from benchmarks.serving.models import TOKENIZER
from benchmarks.serving.processes import Tree
from benchmarks.serving.servers import environment, flags
from helpers.waiting import until
from quantserve_bench import Closed, Request, Result, Run
from quantserve_bench.tokens import FileTokenizer

BURN = "import subprocess, sys, time\nchild = subprocess.Popen([sys.executable, '-c', 'while True: pass'])\n"
STUBBORN = (
    "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
)


def cell(api: str = "completions", **changes: Any) -> Cell:
    about = {"models": ("demo",), "input_tokens": 40, "output_tokens": 8, "users": 2, "requests": 6}
    return Cell(api=api, **{**about, **changes})


# --- what is sent


@pytest.fixture(scope="module")
def tokenizer() -> FileTokenizer:
    return FileTokenizer(str(TOKENIZER))


def test_completions_have_exactly_as_many_tokens_as_asked_for(tokenizer: FileTokenizer) -> None:
    made = make_requests(cell(), tokenizer, "seed", "salt")
    assert [len(request.prompt or ()) for request in made] == [40] * 6
    assert len({tuple(request.prompt or ()) for request in made}) == 6
    assert all(request.max_tokens == 8 and request.ignore_eos and request.stream for request in made)


def test_chats_have_as_many_tokens_as_asked_for_with_the_template(tokenizer: FileTokenizer) -> None:
    template = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(TOKENIZER)
    for request in make_requests(cell("chat"), tokenizer, "seed", "salt"):
        ids = template.apply_chat_template(request.messages, add_generation_prompt=True, return_dict=False)
        assert abs(len(ids) - 40) <= 1  # the template drops a newline at the end
        assert request.input_tokens is not None
        assert abs(request.input_tokens - len(ids)) <= 1


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_prompts_follow_from_the_seed_and_caches_from_the_salt(tokenizer: FileTokenizer, api: str) -> None:
    first, again, other = (make_requests(cell(api), tokenizer, seed, "a") for seed in ("x", "x", "y"))
    bodies = [[request.body("m") for request in made] for made in (first, again, other)]
    assert bodies[0] == bodies[1]
    assert not any(body in bodies[2] for body in bodies[0])
    assert {body["cache_salt"] for body in bodies[0]} == {"a"}


def test_runs_at_the_same_time_are_merged_in_the_order_of_sending() -> None:
    def one(began: float, ended: float, users: int) -> Run:
        request = Request(prompt="a")
        sent = [Result(request, number, began + number, began + number) for number in range(2)]
        return Run(Closed(users), sent, began, ended, unix_time=began, cpu_s=1.0)

    both = merged([one(10.5, 14.0, 3), one(10.0, 13.0, 2)])
    assert both.load == Closed(5)
    assert (both.began, both.ended, both.cpu_s) == (10.0, 14.0, 1.0)
    assert [result.start for result in both] == [10.0, 10.5, 11.0, 11.5]


def test_every_cell_has_at_least_one_request_per_user() -> None:
    for users in (1, 2, 3, 16, 63, 64):
        for amount in (FAST, SLOW):
            for tokens in (64, 128):
                assert amount.requests(users, tokens) % users == 0
                assert amount.requests(users, tokens) >= users


def test_all_models_together_share_the_users() -> None:
    cells = Choice(users=(1, 16, 64)).together(["a", "b", "c"], FAST)
    assert [one.users for one in cells] == [3, 15, 63]
    assert all(one.requests % 3 == 0 and one.models == ("a", "b", "c") for one in cells)


def test_cells_are_chosen_by_length_and_by_users() -> None:
    choice = Choice()
    assert {(c.input_tokens, c.output_tokens) for c in choice.short("a", FAST)} == {(64, 64)}
    assert {(c.input_tokens, c.output_tokens) for c in choice.matrix("a", FAST)} == {(64, 64), (512, 128)}
    assert {c.users for c in choice.middle("a", FAST)} == {16}
    assert len(choice.matrix("a", FAST)) == 12


def test_a_slow_model_gets_no_long_prompts_from_many_users() -> None:
    cells = Choice().matrix("a", SLOW)
    assert {c.users for c in cells if c.input_tokens == 512} == {1, 16}
    assert {c.users for c in cells if c.input_tokens == 64} == {1, 16, 64}


# --- the command line


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(BenchError, match=r"unknown path ray; known: bare, one, .*ray-direct"):
        choice_of(parser().parse_args(["--paths", "ray"]))
    with pytest.raises(BenchError, match=r"no list of whole numbers"):
        choice_of(parser().parse_args(["--concurrency", "many"]))
    with pytest.raises(BenchError, match=r"1 to 64"):
        choice_of(parser().parse_args(["--concurrency", "65"]))


def test_the_reference_always_takes_part_and_options_win_over_quick() -> None:
    choice = choice_of(parser().parse_args(["--quick", "--paths", "shared", "--rounds", "2", "--concurrency", "64,1"]))
    assert choice.paths == ("bare", "shared")
    assert (choice.rounds, choice.users, choice.shapes, choice.starts) == (2, (1, 64), ("demo",), 0)


# --- servers


def test_engine_arguments_become_options_that_vllm_reads_back() -> None:
    arg_utils = pytest.importorskip("vllm.engine.arg_utils")
    utils = pytest.importorskip("vllm.utils.argparse_utils")
    arguments = {
        "model": "m", "served_model_name": ["a", "b"], "enforce_eager": True, "trust_remote_code": False,
        "max_model_len": 512, "dtype": "bfloat16", "enable_prefix_caching": False, "quantization": None,
        "hf_overrides": {"x": 1},
    }  # fmt: skip
    engine = arg_utils.AsyncEngineArgs
    parsed = engine.add_cli_args(utils.FlexibleArgumentParser()).parse_args(flags(arguments))
    read = {name: getattr(parsed, name) for name in arguments}
    assert read == arguments


def test_a_server_does_not_inherit_what_would_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "awq")
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere")
    monkeypatch.setenv("QUANTSERVE_API_KEYS", "secret-key")
    made = environment({"VLLM_CPU_KVCACHE_SPACE": "1"})
    assert "RAY_ADDRESS" not in made
    assert "QUANTSERVE_API_KEYS" not in made
    assert "VLLM_PLUGINS" not in made
    assert made["VLLM_CPU_KVCACHE_SPACE"] == "1"


@pytest.fixture
def burning() -> Iterator[Tree]:
    """A process that ignores polite signals, with a child that uses a whole core."""
    process = subprocess.Popen([sys.executable, "-c", STUBBORN + BURN + "time.sleep(60)"])
    tree = Tree(process.pid)
    until(lambda: len(tree.look()) == 2)
    yield tree
    for left in tree.look():
        left.kill()
    process.wait()


def test_a_frozen_tree_uses_no_processor_and_goes_on_when_thawed(burning: Tree) -> None:
    burning.freeze()
    until(lambda: all(process.status() == psutil.STATUS_STOPPED for process in burning.look()))
    before = burning.cpu_s()
    time.sleep(0.3)
    assert burning.cpu_s() == before
    burning.thaw()
    until(lambda: burning.cpu_s() > before)


def test_stopping_ends_the_whole_tree_even_when_it_is_frozen_and_stubborn(burning: Tree) -> None:
    processes = burning.look()
    burning.freeze()
    burning.stop(wait=((signal.SIGINT, 0.2), (signal.SIGTERM, 0.2)))
    assert burning.look() == []
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


# --- what the tables say


def run(path: str, number: int, tokens: float, ttft: float = 10.0, gap: float = 5.0, **more: Any) -> dict[str, Any]:
    about = {"group": "demo", "server": "one", "cell": "demo-fp16, chat 64/64, 16 users", "path": path}
    measured = {"tokens_per_s": tokens, "ttft_ms": ttft, "gap_p99_ms": gap, "errors": 0, "completed": 4}
    return {**about, "round": number, **measured, "client_share": 0.1, "lag_max_ms": 1.0, "other_cores": 0.0, **more}


def found(runs: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    machine = {"cpu": "c", "cores": 2, "memory_gib": 1, "isa": [], "python": "3", "versions": {}}
    about = {
        "date": "d",
        "machine": machine,
        "ray": "r",
        "command": "x",
        "rounds": 3,
        "starts": [],
        "refused": {},
        "client_priority": True,
    }
    return {**about, "runs": runs, **more}


THREE = [
    run("bare", 0, 100.0), run("one", 0, 99.0, ttft=11.0), run("one", 1, 150.0, ttft=30.0), run("bare", 1, 200.0),
    run("bare", 2, 50.0), run("one", 2, 49.0, ttft=10.5),
]  # fmt: skip


def test_ratios_are_taken_within_a_round_before_the_median() -> None:
    by_figure = {ratio.figure: ratio for ratio in results.ratios(found(THREE))}
    tokens = by_figure["tokens_per_s"]
    assert tokens.rounds == (0.99, 0.75, 0.98)
    assert (tokens.middle, tokens.worst) == (0.98, 0.75)
    assert (by_figure["ttft_ms"].middle, by_figure["ttft_ms"].worst) == (pytest.approx(1.1), 3.0)


def test_a_round_without_the_reference_is_not_compared() -> None:
    assert results.ratios(found([run("bare", 0, 100.0), run("one", 1, 1.0)])) == []


def test_a_missed_target_and_failed_requests_are_marked() -> None:
    slow = [run("bare", 0, 100.0), run("one", 0, 94.0, ttft=12.0, errors=3)]
    text = results.markdown(found(slow))
    assert "**0.94x ✗** 3 failed" in text
    assert "**1.20x ✗**" in text
    assert "0 of 1 | **0.94x ✗**: demo-fp16, chat 64/64, 16 users" in " ".join(text.split())
    assert "3 of 11 requests failed" in text


def test_an_interrupted_run_says_how_many_rounds_it_has() -> None:
    assert "Medians of 3 of 3 rounds" in results.markdown(found(THREE))
    cut = [*THREE, run("bare", 0, 1.0, server="ray-default"), run("ray-default", 0, 1.0, server="ray-default")]
    assert "Medians of 1 to 3 of 3 rounds" in results.markdown(found(cut))


def test_the_peer_is_compared_through_the_reference() -> None:
    peer = [run("bare", 0, 200.0, server="ray-default"), run("ray-default", 0, 80.0, server="ray-default")]
    against = results.against_peer(results.ratios(found([*THREE, *peer])), "one")
    assert [ratio.middle for ratio in against] == [pytest.approx(0.98 / 0.4)]


def test_what_was_refused_is_said_with_its_reason() -> None:
    text = results.markdown(found(THREE, refused={"ray-direct (demo)": "no module"}))
    assert "`ray-direct (demo)` was not measured: refused: no module" in text


def test_start_times_of_one_server_and_the_same_models_are_put_together() -> None:
    starts = [
        {"server": "one", "first_token_s": {"a": seconds}, "idle_cores": 0.01, "memory_bytes": 2e9}
        for seconds in (20.0, 30.0, 22.0)
    ]
    table = results.start_table(starts)
    assert "| a " in table
    assert "22.0 (20.0 to 30.0)" in table
    assert "1.0%" in table


def test_results_survive_json(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(found(THREE)))
    assert results.markdown(json.loads(path.read_text())) == results.markdown(found(THREE))
    plotted = pytest.importorskip("matplotlib") and results.plot(found(THREE), tmp_path)
    assert [figure.name for figure in plotted] == [
        "serving-demo-tokens.png", "serving-demo-ttft.png", "serving-demo-gap.png",
    ]  # fmt: skip
