"""The demonstration: digits, with and without dropout, trained, inspected and compared."""

from collections.abc import Callable
from functools import partial

from torch import nn

from droplens.data import digits
from droplens.inspection import Comparison, compare
from droplens.randomness import private_generator
from droplens.training import Plan, initialise, train

Progress = Callable[[float, str], None]

RATE = 0.5
PLAN = Plan(epochs=40, batch_size=64, learning_rate=1e-3)
DRAWS = 100
# Training's share of the progress bar.
_TRAINING = 0.35


def network(p: float) -> nn.Sequential:
    """64-256-256-10 with ReLU, and dropout at rate `p` after both hidden layers."""
    return nn.Sequential(
        nn.Linear(64, 256),
        nn.ReLU(),
        nn.Dropout(p),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Dropout(p),
        nn.Linear(256, 10),
    )


def trained(
    n_seeds: int, seed: int | None = None, on_progress: Progress | None = None
) -> dict[str, list[nn.Module]]:
    """`n_seeds` networks with dropout and as many without, from the same starts, in one go.

    Raises:
        ValueError: if `n_seeds` is below 1.
    """
    split = digits()
    _, used = private_generator(None, seed)
    # One seed, one start: dropout layers take nothing from the stream that fills the weights.
    starts, without = (initialise(partial(network, p), n_seeds, seed=used) for p in (RATE, 0.0))

    def on_step(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(done / total, f"Training {2 * n_seeds} networks")

    data = (split.train.inputs, split.train.targets)
    result = train(
        [*starts, *without], data, nn.CrossEntropyLoss(), PLAN, seed=used, on_step=on_step
    )
    networks = list(result.networks)
    return {"with dropout": networks[:n_seeds], "without": networks[n_seeds:]}


def run(
    seed: int | None = None, n_seeds: int = 5, on_progress: Progress | None = None
) -> Comparison:
    """Train `n_seeds` networks of each kind on the digits at once, and compare the two sets.

    Raises:
        ValueError: if `n_seeds` is below 1.
    """
    tell = on_progress or (lambda share, doing: None)
    _, used = private_generator(None, seed)
    tell(0.0, "Reading the digits")
    sets = trained(n_seeds, used, lambda share, doing: tell(_TRAINING * share, doing))
    split = digits()
    return compare(
        sets,
        (split.train.inputs, split.train.targets),
        nn.CrossEntropyLoss(),
        held_out=(split.test.inputs, split.test.targets),
        draws=DRAWS,
        seed=used,
        on_progress=lambda share, doing: tell(_TRAINING + (1 - _TRAINING) * share, doing),
    )
