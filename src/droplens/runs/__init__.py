"""Many runs: what to run, where, and what is finished already.

`Batch` names runs by plain data, an `Executor` makes them, the `Store` keeps them; none knows the
others' insides, so that a cluster's executor can join.
"""

from droplens.runs._complete import complete, remaining
from droplens.runs._executor import Executor
from droplens.runs._grid import Batch, Group, Numbers, Work, batches, canonical, together
from droplens.runs._inline import Inline
from droplens.runs._processes import Processes
from droplens.runs._store import FILE, SCHEMA_VERSION, Store, versions

__all__ = [
    "FILE",
    "SCHEMA_VERSION",
    "Batch",
    "Executor",
    "Group",
    "Inline",
    "Numbers",
    "Processes",
    "Store",
    "Work",
    "batches",
    "canonical",
    "complete",
    "remaining",
    "together",
    "versions",
]
