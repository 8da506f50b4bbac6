"""The database of votes: shared by threads and processes; and the statistics."""

from __future__ import annotations

import asyncio
import math
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from quantserve.serve.asgi import Refused
from quantserve_explorer import votes as module
from quantserve_explorer.ballot import Vote
from quantserve_explorer.statistics import Kind, summary, wilson
from quantserve_explorer.votes import Votes

VOTE = Vote(1_700_000_000.5, ("a", "b"), ("x", "y"), "a", False, "p")
WRITER = """
import asyncio, sys
from pathlib import Path
from quantserve_explorer.ballot import Vote
from quantserve_explorer.votes import Votes

async def main():
    votes = Votes(Path(sys.argv[1]))
    vote = Vote(1.0, ("a", "b"), ("x", "y"), "a", False, sys.argv[2])
    await asyncio.gather(*(votes.add(vote) for _ in range(int(sys.argv[3]))))

asyncio.run(main())
"""


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "v.sqlite3"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), name, "40"], stderr=subprocess.PIPE)
        for name in ("one", "two", "three")
    ]

    async def beside() -> list[int]:
        votes = Votes(path)
        counts = await asyncio.gather(*(votes.add(VOTE) for _ in range(40)))
        assert counts == sorted(counts)  # one writer, in order
        return counts

    asyncio.run(beside())
    for writer in writers:
        _, errors = writer.communicate(timeout=120)
        assert writer.returncode == 0, errors.decode()
    count, kinds = asyncio.run(Votes(path).everyone())
    assert count == 160
    assert kinds == {(("a", "b"), ("x", "y"), "a"): 160}
    (mode,) = sqlite3.connect(path).execute("PRAGMA journal_mode").fetchone()
    assert mode == "wal"


def test_votes_come_back_in_order_and_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART", 3)

    async def go() -> list[list[Vote]]:
        votes = Votes(tmp_path / "v")
        for number in range(7):
            await votes.add(Vote(float(number), ("a", "b"), ("x", "y"), None, True, None))
        return [part async for part in votes.in_parts()]

    parts = asyncio.run(go())
    assert [[vote.time for vote in part] for part in parts] == [[0, 1, 2], [3, 4, 5], [6]]
    assert parts[0][0] == Vote(0.0, ("a", "b"), ("x", "y"), None, True, None)


def test_there_is_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 2)

    async def go() -> int:
        votes = Votes(tmp_path / "v")
        assert [await votes.add(VOTE), await votes.add(VOTE)] == [1, 2]
        with pytest.raises(Refused) as refused:
            await votes.add(VOTE)
        assert (refused.value.status, refused.value.error["code"]) == (507, "votes_full")
        return (await votes.everyone())[0]

    assert asyncio.run(go()) == 2


@pytest.mark.parametrize("damage", ["garbage", "future"])
def test_a_foreign_file_is_refused_and_left_as_it_is(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "v"
    if damage == "garbage":
        path.write_bytes(b"no database at all" * 300)
    else:
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA user_version=99")
    before = path.read_bytes()
    with pytest.raises(Refused, match="cannot be used") as refused:
        asyncio.run(Votes(path).add(VOTE))
    assert refused.value.status == 503
    assert path.read_bytes()[: len(before)] == before or damage == "future"
    if damage == "future":
        with sqlite3.connect(path) as database:
            assert database.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)


def test_nothing_is_written_until_the_first_use(tmp_path: Path) -> None:
    Votes(tmp_path / "v")
    assert not list(tmp_path.iterdir())


# --- statistics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("won", "count", "low", "high"),
    # Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval(won: int, count: int, low: float, high: float) -> None:
    found = wilson(won / count, count)
    assert found == pytest.approx((low, high), abs=5e-5)


def test_an_interval_holds_its_rate() -> None:
    for count in (1, 2, 50, 10**6):
        for rate in (0.0, 0.5, 1.0):
            low, high = wilson(rate, count)
            assert 0 <= low <= rate <= high <= 1
            assert math.isfinite(low + high)


def test_models_of_one_method_do_not_meet() -> None:
    kinds: dict[Kind, int] = {(("a", "b"), ("x", "x"), "a"): 5}
    report = summary(5, kinds)
    assert report["methods"] == []
    assert [(row["name"], row["won"]) for row in report["models"]] == [("a", 5.0), ("b", 0.0)]


def test_a_method_that_two_models_have_wins_once_per_meeting() -> None:
    kinds: dict[Kind, int] = {(("a", "b", "c"), ("x", "x", "y"), "c"): 2, (("a", "b", "c"), ("x", "x", "y"), None): 1}
    methods = {row["name"]: row for row in summary(3, kinds)["methods"]}
    assert (methods["y"]["meetings"], methods["y"]["won"], methods["y"]["votes"]) == (6, 5.0, 3)
    assert (methods["x"]["meetings"], methods["x"]["won"], methods["x"]["votes"]) == (6, 1.0, 3)


def test_equal_strength_gives_a_half() -> None:
    kinds: dict[Kind, int] = {(("a", "b"), ("x", "y"), name): 500 for name in ("a", "b")}
    for row in summary(1000, kinds)["methods"]:
        assert row["win_rate"] == 0.5
        assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 1000), rel=0.01)
