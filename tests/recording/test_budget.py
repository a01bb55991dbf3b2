import pytest

from droplens.recording import Budget


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def run(share, costs, steps, step=1.0):
    """Train `steps` steps of one second each; measure whenever it fits."""
    clock = Clock()
    budget = Budget(share, clock)
    budget.started()
    costs, made, worst = iter(costs), [], 0.0
    for k in range(steps):
        clock.now += step
        budget.trained()
        if budget.fits():
            assert budget.measuring <= share * budget.training or share == 1
            with budget.spending():
                clock.now += next(costs)
            made.append(k + 1)
            worst = max(worst, budget.share)
    return budget, made, worst


def test_the_share_is_kept_at_all_times_once_the_cost_is_known():
    budget, made, worst = run(0.05, [10.0] * 99, 2000)
    assert worst <= 0.05 + 1e-12
    assert budget.measuring == 10 * len(made)
    assert budget.training == 2000
    # Nothing is wasted either: one more would not fit.
    assert len(made) >= 0.04 * 2000 / 10


def test_a_first_guess_of_twenty_steps_is_waited_for():
    _, made, _ = run(0.05, [10.0] * 99, 2000)
    assert made[0] == pytest.approx(20 / 0.05, abs=1)


def test_a_measurement_longer_than_expected_is_paid_back_before_the_next():
    budget, made, worst = run(0.05, [400.0, 1.0], 17_610)
    assert worst > 0.05
    # 400 s spent and 480 s, the longest and a margin, to come are 5% of training.
    assert made[1] == (400 + 480) / 0.05
    assert budget.share < 0.05


def test_no_limit():
    _, made, _ = run(1, [5.0] * 10, 10)
    assert made == list(range(1, 11))


def test_nothing_yet():
    budget = Budget(0.5)
    assert budget.share == 0
    assert budget.fits()
    budget.trained()
    assert budget.training == 0


def test_a_failed_measurement_counts():
    clock = Clock()
    budget = Budget(0.5, clock)
    budget.started()

    def fail():
        clock.now += 3
        raise KeyError

    with pytest.raises(KeyError), budget.spending():
        fail()
    assert budget.measuring == 3


@pytest.mark.parametrize("share", [0, -0.1, 1.5])
def test_bad_shares_are_refused(share):
    with pytest.raises(ValueError, match=r"budget has to be in \(0, 1\], a share of the time"):
        Budget(share)
