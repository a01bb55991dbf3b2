"""Finished runs in one tidy SQLite table: a row a number, a transaction a batch."""

import contextlib
import hashlib
import math
import os
import platform
import sqlite3
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from droplens.runs._grid import Batch, Numbers

FILE: Final = "runs.sqlite"
SCHEMA_VERSION: Final = 1

_CREATE: Final = """
CREATE TABLE IF NOT EXISTS runs (
    claim TEXT NOT NULL, broken TEXT NOT NULL, settings TEXT NOT NULL, seed INTEGER NOT NULL,
    quantity TEXT NOT NULL, position INTEGER NOT NULL, value REAL,
    droplens TEXT NOT NULL, torch TEXT NOT NULL, numpy TEXT NOT NULL, python TEXT NOT NULL,
    finished TEXT NOT NULL,
    PRIMARY KEY (claim, broken, settings, seed, quantity, position)
) WITHOUT ROWID
"""
_KEY: Final = "claim = ? AND broken = ? AND settings = ?"


class Store:
    """The finished runs of a folder, or of this process alone where no folder is given.

    The table `runs` has a row for every number: claim, broken, settings (JSON), seed, quantity,
    position (−1 for a single number, else the place along a curve), value, the versions that made
    it and when. A batch is written whole or not at all, and survives the process once written.

    Raises:
        OSError: if the folder cannot be made or written.
        ValueError: if it holds something else, or runs of another version.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._versions = versions()
        self._where = "memory" if folder is None else str(folder)
        with self._clear_errors():
            self._connection = sqlite3.connect(_file(folder), timeout=60, isolation_level=None)
        try:
            with self._clear_errors():
                self._open()
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._connection.close()

    def add(self, batch: Batch, numbers: Numbers) -> None:
        """Write a batch's runs; what was there before stays.

        Raises:
            OSError: if it cannot be written: nothing of the batch is then.
            ValueError: if a quantity has not one entry a seed.
        """
        rows = list(self._rows(batch, numbers))
        with self._clear_errors(), self._transaction():
            marks = ",".join("?" * 12)
            self._connection.executemany(f"INSERT OR IGNORE INTO runs VALUES ({marks})", rows)

    def seeds(self, batch: Batch) -> set[int]:
        """Which seeds are finished at the batch's claim and settings, the batch's own or not."""
        found = self._connection.execute(
            f"SELECT DISTINCT seed FROM runs WHERE {_KEY}", _key(batch)
        )
        return {seed for (seed,) in found}

    def numbers(self, batch: Batch) -> Numbers:
        """What the batch's runs measured.

        Raises:
            ValueError: if one of them is not finished.
        """
        found = self._connection.execute(
            f"SELECT quantity, seed, position, value FROM runs WHERE {_KEY} "
            "ORDER BY quantity, seed, position",
            _key(batch),
        )
        table: dict[str, dict[int, list[tuple[int, float]]]] = {}
        for quantity, seed, position, value in found:
            number = math.nan if value is None else float(value)
            table.setdefault(quantity, {}).setdefault(seed, []).append((position, number))
        result: dict[str, list[Any]] = {}
        for quantity, by_seed in table.items():
            missing = set(batch.seeds) - set(by_seed)
            if missing:
                raise ValueError(f"{batch.claim} has no finished run of seeds {sorted(missing)}")
            result[quantity] = [_entry(by_seed[seed]) for seed in batch.seeds]
        return result

    def count(self) -> int:
        """How many runs are finished."""
        query = "SELECT COUNT(*) FROM (SELECT DISTINCT claim, broken, settings, seed FROM runs)"
        return int(self._connection.execute(query).fetchone()[0])

    def _open(self) -> None:
        self._connection.execute("PRAGMA synchronous = FULL")
        with self._transaction():
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS versions (name PRIMARY KEY, value)"
            )
            # Whoever comes first writes the versions, in the transaction that makes the tables.
            self._connection.executemany(
                "INSERT OR IGNORE INTO versions SELECT ?, ? WHERE NOT EXISTS "
                "(SELECT 1 FROM versions WHERE name = 'complete')",
                self._versions.items(),
            )
            self._connection.execute("INSERT OR IGNORE INTO versions VALUES ('complete', 'yes')")
            self._connection.execute(_CREATE)
        known = dict(self._connection.execute("SELECT name, value FROM versions"))
        for name, value in self._versions.items():
            if known.get(name) != value:
                raise ValueError(
                    f"the results in {self._where!r} were made by {name} {known.get(name)}, but "
                    f"this is {name} {value}: name another folder, or run that version"
                )

    def _rows(self, batch: Batch, numbers: Numbers) -> Iterator[tuple[Any, ...]]:
        made = (
            *(self._versions[name] for name in ("droplens", "torch", "numpy", "python")),
            _now(),
        )
        for quantity, entries in numbers.items():
            if len(entries) != len(batch.seeds):
                raise ValueError(
                    f"{batch.claim} gave {len(entries)} entries of {quantity!r} for "
                    f"{len(batch.seeds)} seeds"
                )
            for seed, entry in zip(batch.seeds, entries, strict=True):
                for position, value in _positions(entry):
                    yield (*_key(batch), seed, quantity, position, float(value), *made)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            # A full disk has rolled back already.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            reason = "no space left" if "full" in str(error) else str(error)
            raise OSError(
                f"cannot write the results in {self._where!r}: {reason}. What was finished before "
                "is kept; --resume continues there"
            ) from error
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"the file {FILE!r} in {self._where!r} does not hold results of droplens "
                f"({error}): name another folder"
            ) from error


def versions() -> dict[str, str]:
    """What a result depends on: this code (version and digest), torch, NumPy, Python."""
    return {
        "schema": str(SCHEMA_VERSION),
        "droplens": f"{_installed('droplens')}+{_digest()}",
        "torch": _installed("torch"),
        "numpy": _installed("numpy"),
        "python": platform.python_version(),
    }


def _file(folder: str | os.PathLike[str] | None) -> str:
    if folder is None:
        return ":memory:"
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise OSError(f"the results folder {str(path)!r} is a file: name a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {str(path)!r}: {error.strerror}") from error
    return str(path / FILE)


def _digest() -> str:
    """Of the package's code: a changed claim must not take up an older one's runs."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _installed(name: str) -> str:
    if name == "droplens":
        import droplens

        return droplens.__version__
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _key(batch: Batch) -> tuple[str, str, str]:
    return batch.claim, batch.broken, batch.settings


def _positions(entry: Any) -> Iterator[tuple[int, float]]:
    if isinstance(entry, Sequence):
        yield from enumerate(entry)
    else:
        yield -1, entry


def _entry(found: Sequence[tuple[int, float]]) -> float | list[float]:
    return found[0][1] if found[0][0] == -1 else [value for _, value in found]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
