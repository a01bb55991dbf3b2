"""Two processes of torch.distributed, from a script that takes a rank, a store and an output."""

import subprocess
import sys

import torch


def both(script, folder):
    """What ranks 0 and 1 saved, which has to be the same."""
    path = folder / "worker.py"
    path.write_text(script)
    places = [str(folder / "store"), str(folder / "out")]
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path[:0] = ['.']; exec(open({str(path)!r}).read())",
    ]
    workers = [subprocess.Popen([*command, str(rank), *places]) for rank in (0, 1)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    first, second = (torch.load(f"{places[1]}{rank}", weights_only=True) for rank in (0, 1))
    assert first == second
    return first
