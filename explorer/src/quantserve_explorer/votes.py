"""The stored votes: an SQLite database that several processes may share."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from quantserve.serve.asgi import Refused
from quantserve_explorer.ballot import Vote

VERSION: Final = 1
BUSY_S: Final = 10.0
"""How long a write waits for one of another process."""
PART: Final = 1000
MOST: Final = 1_000_000
"""Votes that are stored at most, so that nobody fills the disk."""
SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS votes (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    time REAL NOT NULL,
    models TEXT NOT NULL,
    methods TEXT NOT NULL,
    winner TEXT,
    blind INTEGER NOT NULL,
    prompt TEXT
)"""

T = TypeVar("T")


class Votes:
    """The votes in a file. The database is opened at the first use, in a thread that does all its work.

    Args:
        path: of the database; made if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, "votes")
        self._database: sqlite3.Connection | None = None

    async def add(self, vote: Vote) -> int:
        """Store a vote; returns how many there are.

        Raises:
            Refused: 503, the database cannot be used; 507, it is full.
        """

        def work(database: sqlite3.Connection) -> int:
            with database:
                database.execute("BEGIN IMMEDIATE")
                count: int = database.execute("SELECT count(*) FROM votes").fetchone()[0]
                if count < MOST:
                    database.execute(
                        "INSERT INTO votes (time, models, methods, winner, blind, prompt) VALUES (?, ?, ?, ?, ?, ?)",
                        (
                            vote.time,
                            json.dumps(vote.models),
                            json.dumps(vote.methods),
                            vote.winner,
                            int(vote.blind),
                            vote.prompt,
                        ),
                    )
            return count + 1

        count = await self._run(work)
        if count > MOST:
            raise Refused(507, f"{MOST} votes are stored, which is the limit.", code="votes_full")
        return count

    async def everyone(self) -> tuple[int, dict[tuple[tuple[str, ...], tuple[str, ...], str | None], int]]:
        """How many votes there are, and how many of each kind: models, methods and winner.

        Raises:
            Refused: 503, the database cannot be used.
        """

        def work(database: sqlite3.Connection) -> list[tuple[str, str, str | None, int]]:
            return database.execute(
                "SELECT models, methods, winner, count(*) FROM votes GROUP BY models, methods, winner"
            ).fetchall()

        rows = await self._run(work)
        kinds = {
            (tuple(json.loads(models)), tuple(json.loads(methods)), winner): count
            for models, methods, winner, count in rows
        }
        return sum(kinds.values()), kinds

    async def in_parts(self) -> AsyncIterator[list[Vote]]:
        """All votes in the order of their arrival, some at a time.

        Raises:
            Refused: 503, the database cannot be used.
        """
        last = 0
        while rows := await self._run(lambda database, after=last: _part(database, after)):  # type: ignore[misc]
            yield [vote for _, vote in rows]
            last = rows[-1][0]

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def run() -> T:
            if self._database is None:
                self._database = _opened(self._path)
            return work(self._database)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, run)
        except sqlite3.Error as error:
            message = f"The votes in {self._path.name} cannot be used: {error}."
            raise Refused(503, message, code="votes_unavailable", headers={"retry-after": "5"}) from error


def _opened(path: Path) -> sqlite3.Connection:
    """The database, made if it does not exist.

    Raises:
        sqlite3.Error: it cannot be opened, or is of a later version.
    """
    database = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode=WAL")  # where the file system cannot do it, SQLite keeps its own way
        database.execute("PRAGMA synchronous=NORMAL")
        database.execute("BEGIN IMMEDIATE")
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, VERSION):
            raise sqlite3.DatabaseError(f"its version is {version}, and this quantserve-explorer knows {VERSION}")
        database.execute(SCHEMA)
        database.execute(f"PRAGMA user_version={VERSION}")
        database.execute("COMMIT")
    except BaseException:
        database.close()
        raise
    return database


def _part(database: sqlite3.Connection, after: int) -> list[tuple[int, Vote]]:
    query = "SELECT id, time, models, methods, winner, blind, prompt FROM votes WHERE id > ? ORDER BY id LIMIT ?"
    return [
        (row[0], Vote(row[1], tuple(json.loads(row[2])), tuple(json.loads(row[3])), row[4], bool(row[5]), row[6]))
        for row in database.execute(query, (after, PART))
    ]
