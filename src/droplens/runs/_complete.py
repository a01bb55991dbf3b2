"""From what is wanted and what is there to what is left, and through it."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from droplens.runs._executor import Executor
from droplens.runs._grid import Batch, Work, together
from droplens.runs._store import Store

OnProgress = Callable[[int, int, Batch | None], None]


def remaining(store: Store, wanted: Iterable[Batch]) -> list[Batch]:
    """The batches without the runs that are finished, and without those named twice."""
    left: list[Batch] = []
    planned: set[tuple[str, str, str, int]] = set()
    for batch in wanted:
        key = (batch.claim, batch.broken, batch.settings)
        done = store.seeds(batch)
        seeds = tuple(s for s in batch.seeds if s not in done and (*key, s) not in planned)
        planned |= {(*key, seed) for seed in seeds}
        if seeds:
            left.append(replace(batch, seeds=seeds))
    return left


def complete(
    store: Store,
    wanted: Iterable[Batch],
    work: Work,
    executor: Executor,
    on_progress: OnProgress | None = None,
) -> int:
    """Run what is not finished yet, write each batch when it is done, return how many there were.

    Batches that can be are made together.

    Raises:
        OSError: if a result cannot be written; what was written stays.
    """
    batches = remaining(store, wanted)
    tell = on_progress or (lambda done, total, batch: None)
    tell(0, len(batches), None)
    done = 0
    for group, results in executor.results(work, together(batches)):
        for batch, numbers in zip(group, results, strict=True):
            store.add(batch, numbers)
            done += 1
            tell(done, len(batches), batch)
    return len(batches)
