"""A process that runs a grid into a folder, to be killed: `python -m tests.runs.child FOLDER LOG`.

Every execution leaves a line in LOG before it works and another when it has worked.
"""

import os
import sys
import time

from droplens import runs

SEEDS = range(12)
SETTINGS = [{"width": width} for width in (1, 2, 3)]
WANTED = [batch for setting in SETTINGS for batch in runs.batches("Test.claim", setting, SEEDS, 2)]


def work(batch: runs.Batch) -> runs.Numbers:
    width = batch.setting["width"]
    values = [float(width * 1000 + seed) for seed in batch.seeds]
    return {"value": values, "curve": [[value, value + 0.5, value + 0.75] for value in values]}


def logged(batch: runs.Batch) -> runs.Numbers:
    with open(sys.argv[2], "ab", buffering=0) as log:
        for seed in batch.seeds:
            log.write(f"{batch.settings} {seed}\n".encode())
    time.sleep(0.004)
    return work(batch)


def fail(batch: runs.Batch) -> runs.Numbers:
    if batch.seeds == (6, 7):
        raise ArithmeticError("seeds 6 and 7 fail")
    return work(batch)


def kill_oneself(batch: runs.Batch) -> runs.Numbers:
    os._exit(9)


if __name__ == "__main__":
    with runs.Store(sys.argv[1]) as store:
        runs.complete(store, WANTED, logged, runs.Inline())
    os._exit(0)
