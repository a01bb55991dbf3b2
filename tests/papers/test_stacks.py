"""Settings that train at once: each run comes out as it does alone, and every grid is covered."""

from dataclasses import replace

import numpy as np
import pytest

from droplens import papers, reproduction, runs
from droplens.papers import Theory
from droplens.reproduction import Request, reproduce

SHORT = {"steps": 12, "epochs": 2, "masks": 3, "n": 20, "d": 16, "d_in": 8, "d_out": 9}
SEEDS = (3, 4)


def shrunken(setting):
    """The setting at a size at which one run takes no time."""
    small = {k: min(v, SHORT[k]) if k in SHORT else v for k, v in setting.items()}
    if "width" in small:
        small["width"] = 4
    return small


def stacks(claim, scale):
    """The groups of settings at a scale that are run at once."""
    batches = [
        runs.Batch.of(claim.id, setting, SEEDS, stacks=claim.stacks)
        for setting in claim.cells(scale)
    ]
    groups = [[batch.setting for batch in group] for group in runs.together(batches)]
    return [group for group in groups if len(group) > 1]


def stacking():
    for claim in papers.claims():
        if claim.stacks:
            found = {
                runs.canonical({"all": [shrunken(one) for one in group]}): (scale, group)
                for scale in papers.SCALES
                for group in stacks(claim, scale)
            }
            for place, (scale, group) in enumerate(found.values()):
                yield pytest.param(claim, group, id=f"{claim.id}-{scale}-{place}")


def close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, entries in wanted.items():
        scale = np.abs(np.asarray(entries, dtype=float)).max()
        np.testing.assert_allclose(found[name], entries, rtol=2e-4, atol=2e-5 * scale, err_msg=name)


@pytest.mark.parametrize("broken", ["", "swapped-losses", "missing-rescale"])
@pytest.mark.parametrize(("claim", "group"), list(stacking()))
def test_a_stacked_run_is_the_run_alone(claim, group, broken):
    settings, theory = [shrunken(setting) for setting in group], Theory(broken)
    together = claim.run(settings, SEEDS, theory)
    for setting, found in zip(settings, together, strict=True):
        (alone,) = claim.run([setting], SEEDS, theory)
        close(found, alone)
    # The comparison can fail: another setting is another run.
    (first,) = claim.run(settings[:1], SEEDS, theory)
    if broken != "swapped-losses":
        with pytest.raises(AssertionError):
            close(together[1], first)


@pytest.mark.parametrize(
    "identity",
    [
        *("P1.closed-form", "P1.importance-variance", "P1.trajectories", "P4.dropblock"),
        *("P4.dropconnect", "P4.convergence", "P4.deep", "P8.tracking", "P8.images"),
    ],
)
def test_what_trains_has_stacks(identity):
    claim = papers.find(identity)
    assert all(stacks(claim, scale) for scale in ("laptop", "paper"))


def test_every_run_is_a_row_of_its_own(tmp_path):
    """With its own settings and seed; taken up again, nothing is left to do."""
    claim = papers.find("P8.tracking")
    request = Request((claim.id,), "test", seeds=5)
    first = reproduce(request, folder=tmp_path)
    again = reproduce(request, folder=tmp_path)
    assert (first.batches_run, again.batches_run) == (4, 0)  # 2 rates × (4 seeds and 1)
    with runs.Store(tmp_path) as store:
        for setting in claim.cells("test"):
            batch = runs.Batch.of(claim.id, setting, range(5))
            assert store.seeds(batch) == set(range(5))
            (cell,) = (c for c in first.judgements[0].cells if c.setting == setting)
            assert store.numbers(batch) == cell.numbers


def test_the_measure_is_called_once_a_stack(monkeypatch):
    claim, seen = papers.find("P1.trajectories"), []

    def measure(setting, seeds, theory):
        seen.append((setting["lambda"], tuple(seeds)))
        return {"value": [v + seed / 100 for v in setting["lambda"] for seed in seeds]}

    listed = replace(claim, measure=measure, batch=3)
    monkeypatch.setattr(reproduction, "select", lambda _: (listed,))
    monkeypatch.setattr(reproduction, "find", lambda _: listed)
    done = reproduce(Request((), "laptop", seeds=4))
    assert seen == [([0.1, 0.5, 1.0], (0, 1, 2)), ([0.1, 0.5, 1.0], (3,))]
    cells = done.judgements[0].cells
    assert [cell.setting["lambda"] for cell in cells] == [0.1, 0.5, 1.0]
    assert cells[1].numbers == {"value": [0.5, 0.51, 0.52, 0.53]}


def test_bad_stacks_are_refused():
    claim = papers.find("P1.trajectories")
    with pytest.raises(ValueError, match=r"every setting of P1\.trajectories has to say 'r'"):
        replace(claim, stacks=("lambda", "r"))
    settings = [{"lambda": 0.1, "steps": 4}, {"lambda": 0.1, "steps": 8}]
    with pytest.raises(ValueError, match="settings may differ in lambda to be measured at once"):
        claim.run(settings, SEEDS, Theory())
    short = replace(claim, measure=lambda setting, seeds, theory: {"value": [1.0 for _ in seeds]})
    with pytest.raises(ValueError, match=r"P1\.trajectories gave 2 entries of 'value' for 4 runs"):
        short.run([settings[0], {**settings[0], "lambda": 0.5}], SEEDS, Theory())
