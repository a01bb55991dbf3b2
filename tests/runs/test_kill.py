"""A killed process loses only what it was doing; going on repeats nothing and loses nothing."""

import collections
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from droplens import runs
from tests.runs import child


def spawn(folder, log):
    command = [sys.executable, "-m", "tests.runs.child", str(folder), str(log)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["src", "."])}
    return subprocess.Popen(command, env=environment)


def finished(folder):
    """Read with plain sqlite, beside the store's own reader."""
    path = folder / runs.FILE
    if not path.exists():
        return set()
    connection = sqlite3.connect(path)
    try:
        found = connection.execute("SELECT settings, seed, COUNT(*) FROM runs GROUP BY 1, 2")
        rows = list(found)
    except sqlite3.OperationalError:  # killed before the table was there
        return set()
    finally:
        connection.close()
    assert all(count == 4 for *_, count in rows)  # a value and a curve of three: whole runs only
    return {(settings, seed) for settings, seed, _ in rows}


def executions(log):
    lines = log.read_text().splitlines() if log.exists() else []
    return [tuple(line.rsplit(" ", 1)) for line in lines]


def kill_often(folder, log, kills, seed):
    random_ = random.Random(seed)
    killed = 0
    while killed < kills:
        before, started = finished(folder), len(executions(log))
        process = spawn(folder, log)
        # From before the first import to after the last run.
        time.sleep(random_.uniform(0.02, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
        after = finished(folder)
        assert before <= after  # nothing finished is lost
        again = {(settings, int(seed)) for settings, seed in executions(log)[started:]}
        assert not (again & before)  # nothing finished is repeated
        if len(after) == len(child.SETTINGS) * len(child.SEEDS):
            folder, log = folder.with_name(folder.name + "+"), log.with_name(log.name + "+")
    assert spawn(folder, log).wait() == 0
    return folder


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_points(kills, tmp_path):
    folder = kill_often(tmp_path / "results", tmp_path / "log", kills, seed=0)
    with runs.Store(folder) as store:
        assert store.count() == 36
        assert runs.remaining(store, child.WANTED) == []
        for batch in child.WANTED:
            assert store.numbers(batch) == child.work(batch)
    assert len(finished(folder)) == 36


def test_executions_are_counted_right(tmp_path):
    """Without a kill every run is executed once: the log can tell a repeat from a first time."""
    assert spawn(tmp_path / "results", tmp_path / "log").wait() == 0
    assert spawn(tmp_path / "results", tmp_path / "log").wait() == 0
    assert set(collections.Counter(executions(tmp_path / "log")).values()) == {1}
