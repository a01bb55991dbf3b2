"""A process that runs a grid into a folder, to be killed: `python -m tests.runs.child FOLDER LOG`.

With "stacked" after them, the settings of the same seeds are run together. Every execution leaves
a line in LOG before it works.
"""

import os
import sys
import time
from dataclasses import replace

from droplens import runs

SEEDS = range(12)
SETTINGS = [{"width": width} for width in (1, 2, 3)]
WANTED = [batch for setting in SETTINGS for batch in runs.batches("Test.claim", setting, SEEDS, 2)]
STACKED = [replace(batch, stacks=("width",)) for batch in WANTED]


def one(batch: runs.Batch) -> runs.Numbers:
    width = batch.setting["width"]
    values = [float(width * 1000 + seed) for seed in batch.seeds]
    return {"value": values, "curve": [[value, value + 0.5, value + 0.75] for value in values]}


def work(group: runs.Group) -> list[runs.Numbers]:
    return [one(batch) for batch in group]


def logged(group: runs.Group) -> list[runs.Numbers]:
    with open(sys.argv[2], "ab", buffering=0) as log:
        for batch in group:
            for seed in batch.seeds:
                log.write(f"{batch.settings} {seed}\n".encode())
    time.sleep(0.004)
    return work(group)


def fail(group: runs.Group) -> list[runs.Numbers]:
    if group[0].seeds == (6, 7):
        raise ArithmeticError("seeds 6 and 7 fail")
    return work(group)


def kill_oneself(group: runs.Group) -> list[runs.Numbers]:
    os._exit(9)


if __name__ == "__main__":
    wanted = STACKED if sys.argv[3:] == ["stacked"] else WANTED
    with runs.Store(sys.argv[1]) as store:
        runs.complete(store, wanted, logged, runs.Inline())
    os._exit(0)
