"""`droplens demo`: train on digits with and without dropout, and explain the difference."""

from pathlib import Path
from typing import Annotated

import typer

from droplens.cli._shell import (
    JsonOption,
    OutputOption,
    SeedOption,
    check_output,
    deliver,
    guarded,
    progress,
)

EXAMPLE = "Example:  droplens demo --seed 0 -o digits.html"


@guarded
def demo(
    output: OutputOption = None,
    seeds: Annotated[
        int, typer.Option("--seeds", metavar="N", min=2, help="How many networks of each kind.")
    ] = 5,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Train small networks on handwritten digits with and without dropout, and compare them.

    Prints the verdicts as a table and writes a page (report.html) with its JSON twin
    (report.json). Takes about a minute and needs no network.
    """
    page = Path("report.html") if output is None and not json else output
    check_output(page)
    from droplens import demonstration

    with progress("Starting") as on_progress:
        comparison = demonstration.run(seed=seed, n_seeds=seeds, on_progress=on_progress)
    deliver(comparison.to_document(), page, json)
