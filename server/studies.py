"""Blind comparisons: what people preferred, kept in one SQLite file.

A vote is there once `add` has returned, whatever becomes of the process then: each is a transaction of its own, on the
disk before it is answered. The same vote sent again, by its id, counts once.
"""

import json
import logging
import math
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.errors import InvalidField, NotFound, StartupError, StorageFailed
from steering.text import lone_surrogate

log = logging.getLogger(__name__)
TABLES = """
CREATE TABLE IF NOT EXISTS studies (name TEXT PRIMARY KEY, arms TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS votes (
  id TEXT PRIMARY KEY, study TEXT NOT NULL REFERENCES studies (name), at REAL NOT NULL, winner INTEGER,
  shown_first INTEGER NOT NULL, asked TEXT NOT NULL, texts TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS votes_of_study ON votes (study);
"""
BUSY_S = 30.0  # how long a vote waits for another process that writes to the file
PAGE = 20  # votes that are read at once
Z95 = 1.959964  # of the normal distribution


@dataclass(frozen=True)
class Vote:
    """Which of two arms' answers somebody preferred, without knowing which was whose."""

    id: str  # made by the voter's side
    arms: tuple[dict[str, Any], dict[str, Any]]  # name, and what steers: the same two in every vote of a study
    asked: dict[str, Any]  # prompt or messages, and how was sampled
    texts: tuple[str, str]  # in the order of `arms`
    winner: int | None  # index in `arms`; None: a tie
    shown_first: int  # index in `arms`
    at: float = 0.0  # Unix time, seconds; set by `add`


@dataclass(frozen=True)
class Tally:
    """A study's votes. `win_rate` is the second arm's against the first, a tie half a win, `low` to `high` its 95 %
    interval (Wilson)."""

    study: str
    arms: tuple[str, str]
    wins: tuple[int, int]
    ties: int

    @property
    def votes(self) -> int:
        return sum(self.wins) + self.ties

    @property
    def win_rate(self) -> float:
        return (self.wins[1] + self.ties / 2) / self.votes if self.votes else 0.5

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.win_rate, self.votes)


class Studies:
    """The file. For several threads, and for several processes at once. Everything raises StorageFailed where it cannot
    be read or written; a vote is not kept then."""

    def __init__(self, path: Path) -> None:
        """Raises StartupError where the file cannot be opened or is none of ours."""
        self._lock = threading.Lock()
        try:
            self._connection = sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.executescript(TABLES)
            self._connection.execute("SELECT id, study, at, winner, shown_first, asked, texts FROM votes LIMIT 1")
        except sqlite3.Error as error:
            raise StartupError(f"The studies file {str(path)!r} (MATSTEER_STUDIES) cannot be used: {error}.") from error

    def close(self) -> None:
        self._connection.close()

    def add(self, study: str, vote: Vote) -> Tally:
        """Keeps a vote; the first one makes the study. Raises InvalidField where the study has other arms, or the id
        was another vote's."""
        arms, row = _text(vote.arms), (study, vote.winner, vote.shown_first, _text(vote.asked), _text(vote.texts))
        if lone_surrogate("".join((study, arms, *map(str, row[3:])))):
            raise InvalidField("The vote holds half of a surrogate pair, which is no character.")
        with self._transaction() as run:
            now = time.time()
            run("INSERT OR IGNORE INTO studies VALUES (?, ?, ?)", (study, arms, now))
            (kept,) = run("SELECT arms FROM studies WHERE name = ?", (study,)).fetchone()
            if kept != arms:
                raise InvalidField(f"The study {study!r} compares other arms: {kept}. Take another name.", param="arms")
            # Read again, so that a repeated vote is seen and one with its id that differs is refused.
            run("INSERT OR IGNORE INTO votes VALUES (?, ?, ?, ?, ?, ?, ?)", (vote.id, study, now, *row[1:]))
            kept_row = run(
                "SELECT study, winner, shown_first, asked, texts FROM votes WHERE id = ?", (vote.id,)
            ).fetchone()
            if kept_row != row:
                raise InvalidField(f"There is another vote with the id {vote.id!r}.", param="id")
        return self.tally(study)

    def tally(self, study: str) -> Tally:
        """Raises NotFound."""
        found = next((one for one in self.tallies() if one.study == study), None)
        if found is None:
            raise NotFound(f"There is no study {study!r}.", param="study")
        return found

    def tallies(self) -> list[Tally]:
        """Of every study, oldest first."""
        with self._file():
            counts = self._connection.execute(
                "SELECT name, arms, coalesce(sum(winner = 0), 0), coalesce(sum(winner = 1), 0), "
                "sum(votes.id IS NOT NULL AND winner IS NULL) "
                "FROM studies LEFT JOIN votes ON study = name GROUP BY name ORDER BY studies.rowid"
            ).fetchall()
        return [
            Tally(name, tuple(arm["name"] for arm in json.loads(arms)), (first, second), ties)
            for name, arms, first, second, ties in counts
        ]

    def votes(self, study: str, after: int = 0, most: int = PAGE) -> list[tuple[int, Vote]]:
        """Votes of a study with their numbers, oldest first: the first `most` of those after a number. Raises
        NotFound."""
        with self._file():
            found = self._connection.execute("SELECT arms FROM studies WHERE name = ?", (study,)).fetchone()
            rows = self._connection.execute(
                "SELECT rowid, id, asked, texts, winner, shown_first, at FROM votes WHERE study = ? AND rowid > ? "
                "ORDER BY rowid LIMIT ?",
                (study, after, most),
            ).fetchall()
        if found is None:
            raise NotFound(f"There is no study {study!r}.", param="study")
        arms = tuple(json.loads(found[0]))
        return [
            (number, Vote(id, arms, json.loads(asked), tuple(json.loads(texts)), winner, shown_first, at))
            for number, id, asked, texts, winner, shown_first, at in rows
        ]

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        with self._file():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection.execute
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # where the disk is full, SQLite has ended it
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _file(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.DatabaseError as error:
                log.error("the studies file (MATSTEER_STUDIES) cannot be used: %s", error)
                raise StorageFailed(f"The server's file of studies cannot be used: {error}.") from error


def wilson(rate: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share seen in `count` votes (Wilson 1927); of none, everything."""
    if not count:
        return 0.0, 1.0
    spread = Z95**2 / count
    middle = (rate + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(rate * (1 - rate) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
