"""A killed process loses only what it was doing; going on repeats nothing and loses nothing."""

import collections
import json
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


def spawn(folder, log, *more):
    command = [sys.executable, "-m", "tests.runs.child", str(folder), str(log), *more]
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


def wait_for(process, log, lines):
    """Until the log is that long, or the process is through."""
    while process.poll() is None and len(executions(log)) < lines:
        time.sleep(0.0005)


def kill_often(folder, log, kills, seed, *more):
    random_ = random.Random(seed)
    amid = 0
    for _ in range(kills):
        before, started = finished(folder), len(executions(log))
        process = spawn(folder, log, *more)
        # One in four anywhere from before the first import on, the others amid the runs: how long
        # the imports take depends on the machine.
        if random_.random() < 0.25:
            time.sleep(random_.uniform(0.02, 0.5))
        else:
            wait_for(process, log, started + random_.randint(1, 8))
            time.sleep(random_.uniform(0, 0.006))
        process.send_signal(signal.SIGKILL)
        process.wait()
        after = finished(folder)
        assert before <= after  # nothing finished is lost
        again = {(settings, int(seed)) for settings, seed in executions(log)[started:]}
        assert not (again & before)  # nothing finished is repeated
        amid += bool(again - after)
        if len(after) == len(child.SETTINGS) * len(child.SEEDS):
            folder, log = folder.with_name(folder.name + "+"), log.with_name(log.name + "+")
    assert amid >= kills / 4  # runs were cut short indeed
    assert spawn(folder, log, *more).wait() == 0
    return folder


@pytest.mark.parametrize("more", [(), ("stacked",)], ids=["apart", "stacked"])
@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_points(kills, more, tmp_path):
    folder = kill_often(tmp_path / "results", tmp_path / "log", kills, 0, *more)
    with runs.Store(folder) as store:
        assert store.count() == 36
        assert runs.remaining(store, child.WANTED) == []
        for batch in child.WANTED:
            assert store.numbers(batch) == child.one(batch)
    assert len(finished(folder)) == 36


def test_executions_are_counted_right(tmp_path):
    """Without a kill every run is executed once: the log can tell a repeat from a first time."""
    assert spawn(tmp_path / "results", tmp_path / "log").wait() == 0
    assert spawn(tmp_path / "results", tmp_path / "log").wait() == 0
    assert set(collections.Counter(executions(tmp_path / "log")).values()) == {1}


CLAIMS = ("P1.objective", "P1.rank", "P4.balanced", "P8.tracking")


def start_command(folder):
    words = ["-m", "droplens", "reproduce", *CLAIMS, "--scale", "test", "--jobs", "2", "--json"]
    return subprocess.Popen(
        [sys.executable, *words, "--resume", str(folder)],
        env={**os.environ, "PYTHONPATH": "src"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def rows(folder):
    """Every row with the time it was written at."""
    path = folder / runs.FILE
    if not path.exists():
        return set()
    connection = sqlite3.connect(path)
    try:
        return set(connection.execute("SELECT * FROM runs"))
    except sqlite3.OperationalError:
        return set()
    finally:
        connection.close()


def gone(group):
    """Whether the last process of the group has left, within ten seconds."""
    for _ in range(1000):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.slow
def test_the_command_goes_on_after_kills(tmp_path):
    """The command itself with its pool: no row changes, no worker stays, the end is the same."""
    random_ = random.Random(1)
    kept = set()
    for _ in range(8):
        process = start_command(tmp_path / "killed")
        wait = time.monotonic() + random_.uniform(0, 4)
        # Not before something new is there, unless nothing is left to do.
        while process.poll() is None and (
            time.monotonic() < wait or len(rows(tmp_path / "killed")) == len(kept)
        ):
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert gone(process.pid)
        after = rows(tmp_path / "killed")
        assert kept <= after
        kept = after
    ends = []
    for name in ("killed", "whole"):
        process = start_command(tmp_path / name)
        printed, _ = process.communicate()
        assert process.returncode == 0
        ends.append(json.loads(printed)["claims"])
    assert ends[0] == ends[1]
    assert kept <= rows(tmp_path / "killed")
