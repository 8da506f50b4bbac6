"""`quantserve check` of public checkpoints of all families finds what vLLM would, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from corpus import entries
from corpus.judge import Row, judge, table
from quantserve.registry import Registry


def cases() -> Iterator[object]:
    for name in entries.names():
        entry = entries.read(name)
        marks = [pytest.mark.slow] if entry.large else []
        for number in range(len(entry.cases)):
            yield pytest.param(name, number, marks=marks, id=f"{name}-{number}")


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.load()


@pytest.fixture(scope="module")
def rows() -> Iterator[list[Row]]:
    """The rows of this run; printed at its end (seen with ``-s``)."""
    kept: list[Row] = []
    yield kept
    print("\n" + table(kept))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"": tmp_path_factory.mktemp("corpus")}


@pytest.mark.parametrize(("name", "number"), cases())
def test_the_judgement(name: str, number: int, registry: Registry, rows: list[Row], folders: dict[str, Path]) -> None:
    entry = entries.read(name)
    if name not in folders:
        folders[name] = entry.write(folders[""] / name)
    row = judge(entry, entry.cases[number], folders[name], registry)
    rows.append(row)
    assert not row.differences


def test_the_corpus_is_large_and_its_refusals_have_reasons() -> None:
    cases = [case for name in entries.names() for case in entries.read(name).cases]
    assert len(entries.names()) >= 80
    refused = [case for case in cases if case.errors]
    assert len(refused) >= 20
    assert all(case.why for case in refused)


def test_the_corpus_is_small_on_disk() -> None:
    assert sum(path.stat().st_size for path in entries.FOLDER.iterdir()) < 1 << 20
