"""The table of finished runs: tidy, atomic, of one version, and plain when it cannot write."""

import math
import sqlite3
from dataclasses import replace

import pytest

from droplens import runs
from droplens.runs import _store
from tests.runs import child

BATCH = runs.Batch.of("P1.x", {"r": 20, "decay": 0.1}, [3, 4])
NUMBERS = {"value": [1.5, 2.5], "curve": [[1.0, 2.0], [3.0, 4.0]]}


def test_gives_back_what_was_added(tmp_path):
    with runs.Store(tmp_path) as store:
        store.add(BATCH, NUMBERS)
    with runs.Store(tmp_path) as store:
        assert store.numbers(BATCH) == NUMBERS
        assert store.seeds(BATCH) == {3, 4}
        one = runs.Batch(BATCH.claim, "", BATCH.settings, (4,))
        assert store.numbers(one) == {"value": [2.5], "curve": [[3.0, 4.0]]}


def test_the_table_is_tidy(tmp_path):
    with runs.Store(tmp_path) as store:
        store.add(BATCH, NUMBERS)
    rows = sqlite3.connect(tmp_path / runs.FILE).execute("SELECT * FROM runs")
    assert [column[0] for column in rows.description] == [
        *("claim", "broken", "settings", "seed", "quantity", "position", "value"),
        *("droplens", "torch", "numpy", "python", "finished"),
    ]
    found = list(rows)
    assert len(found) == 6
    assert found[0][:7] == ("P1.x", "", '{"decay":0.1,"r":20}', 3, "curve", 0, 1.0)


def test_nan_is_kept(tmp_path):
    with runs.Store() as store:
        store.add(BATCH, {"value": [math.nan, math.inf]})
        first, second = store.numbers(BATCH)["value"]
    assert math.isnan(first)
    assert second == math.inf


def test_what_was_there_stays():
    with runs.Store() as store:
        store.add(BATCH, NUMBERS)
        store.add(BATCH, {"value": [0.0, 0.0], "curve": [[0.0, 0.0], [0.0, 0.0]]})
        assert store.numbers(BATCH) == NUMBERS


def test_a_batch_is_written_whole_or_not_at_all():
    with runs.Store() as store:
        with pytest.raises(ValueError, match=r"gave 1 entries of 'curve' for 2 seeds"):
            store.add(BATCH, {"value": [1.0, 2.0], "curve": [[1.0]]})
        with pytest.raises(TypeError):
            store.add(BATCH, {"value": [1.0, None]})
        assert store.count() == 0


def test_no_space_left(tmp_path):
    with runs.Store(tmp_path) as store:
        store.add(BATCH, NUMBERS)
        store._connection.execute("PRAGMA max_page_count = 12")
        large = runs.Batch.of("P1.large", {}, [0])
        with pytest.raises(OSError, match=r"cannot write the results in .*: no space left"):
            store.add(large, {"curve": [[float(k) for k in range(5000)]]})
    with runs.Store(tmp_path) as store:
        assert store.count() == 2
        assert store.numbers(BATCH) == NUMBERS


def test_another_version_is_refused(tmp_path, monkeypatch):
    runs.Store(tmp_path).__exit__(None, None, None)
    newer = {**_store.versions(), "droplens": "9.0+abc"}
    monkeypatch.setattr(_store, "versions", lambda: newer)
    with pytest.raises(
        ValueError, match=r"made by droplens 0\.\S+, but this is droplens 9\.0\+abc"
    ):
        runs.Store(tmp_path)


def test_something_else_is_refused(tmp_path):
    (tmp_path / runs.FILE).write_text("not a database, but long enough to look like one" * 30)
    with pytest.raises(ValueError, match="does not hold results of droplens"):
        runs.Store(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is a file: name a folder"):
        runs.Store(tmp_path / "file")
    with pytest.raises(OSError, match="cannot make the folder"):
        runs.Store(tmp_path / "file" / "below")


def test_missing_runs_are_named():
    with runs.Store() as store:
        store.add(BATCH, NUMBERS)
        with pytest.raises(ValueError, match=r"no finished run of seeds \[7\]"):
            store.numbers(runs.Batch(BATCH.claim, "", BATCH.settings, (3, 7)))


def test_remaining_leaves_out_what_is_finished_or_named_twice():
    with runs.Store() as store:
        store.add(BATCH, NUMBERS)
        more = runs.Batch(BATCH.claim, "", BATCH.settings, (2, 3, 4, 5))
        left = runs.remaining(store, [more, more])
    assert left == [runs.Batch(BATCH.claim, "", BATCH.settings, (2, 5))]


def test_batches_cover_the_seeds():
    found = list(runs.batches("c", {}, range(5), 2))
    assert [batch.seeds for batch in found] == [(0, 1), (2, 3), (4,)]


def test_what_stacks_is_made_together():
    """Of the same claim, theory and seeds, and alike in all else; each batch once, in order."""
    stacks = ("rate", "start")
    settings = [
        {"r": r, "rate": rate, "start": start}
        for r in (4, 8)
        for rate, start in ((0.1, 1), (0.2, 2), (0.2, 3))
    ]
    wanted = [
        batch
        for broken in ("", "wrong")
        for setting in settings
        for batch in runs.batches("c", setting, range(3), 2, broken, stacks)
    ]
    groups = runs.together(wanted)
    assert [len(group) for group in groups] == [3] * 8  # 2 theories × 2 widths × 2 sets of seeds
    for group in groups:
        alike = {(batch.broken, batch.seeds, batch.setting["r"]) for batch in group}
        assert len(alike) == 1
        assert list(group) == [batch for batch in wanted if batch in group]
    assert {batch for group in groups for batch in group} == set(wanted)
    apart = [replace(batch, stacks=()) for batch in wanted]
    assert runs.together(apart) == [(batch,) for batch in apart]


def test_a_stack_without_its_finished_runs_is_still_one():
    """Where other seeds are left, batches are made apart: a group has one set of seeds."""
    finished = replace(child.STACKED[0], seeds=(0,))
    with runs.Store() as store:
        store.add(finished, child.one(finished))
        left = runs.together(runs.remaining(store, child.STACKED))
    assert [[batch.seeds for batch in group] for group in left][:3] == [
        [(1,)],
        [(2, 3)] * 3,
        [(4, 5)] * 3,
    ]
    assert [batch.setting["width"] for batch in left[-1]] == [2, 3]
    assert left[-1][0].seeds == (0, 1)


@pytest.mark.parametrize("wanted", [child.WANTED, child.STACKED], ids=["apart", "stacked"])
@pytest.mark.parametrize(
    "executor", [runs.Inline(), runs.Processes(2)], ids=["inline", "processes"]
)
def test_executors_agree(executor, wanted):
    told = []
    with runs.Store() as store:
        made = runs.complete(store, wanted, child.work, executor, lambda *news: told.append(news))
        assert made == len(child.WANTED)
        assert [done for done, _, _ in told] == list(range(made + 1))
        assert all(store.numbers(batch) == child.one(batch) for batch in child.WANTED)
        assert runs.complete(store, child.WANTED, child.work, executor) == 0


@pytest.mark.parametrize(
    "executor", [runs.Inline(), runs.Processes(1)], ids=["inline", "processes"]
)
def test_an_error_keeps_what_was_finished(executor):
    with runs.Store() as store:
        with pytest.raises(ArithmeticError, match="seeds 6 and 7 fail"):
            runs.complete(store, child.WANTED, child.fail, executor)
        assert store.count() == 6


def test_a_killed_worker_is_told():
    with runs.Store() as store, pytest.raises(OSError, match=r"process of the pool was killed"):
        runs.complete(store, child.WANTED, child.kill_oneself, runs.Processes(1))


def test_jobs_have_to_be_positive():
    with pytest.raises(ValueError, match="jobs has to be at least 1, but got 0"):
        runs.Processes(0)
