"""`droplens inspect`: what dropout does to one network, loss and data set of your own."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from droplens.cli import _load
from droplens.cli._load import DataOption, DrawsOption, LossOption, MeasureOption
from droplens.cli._shell import (
    JsonOption,
    OutputOption,
    SeedOption,
    check_output,
    deliver,
    guarded,
    progress,
    repeating,
)

EXAMPLE = (
    "Example:  droplens inspect nets.py:make --weights best.pt --data nets.py:validation "
    "--loss cross_entropy -o page.html"
)


@guarded
def inspect(  # noqa: PLR0913  # options of a command line
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FACTORY",
            help="A function that returns the network and is called without arguments; MODULE is "
            "importable from here, or a path to a .py file.",
        ),
    ],
    data: DataOption,
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            metavar="FILE",
            help="Weights to fill the network with: torch.save(model.state_dict(), FILE), or "
            ".safetensors. Code in the file is not run.",
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            "--held-out",
            metavar="MODULE:FACTORY|digits",
            help="Data that was not trained on, where --data was: to split the gap between the "
            "training loss of a log and the loss there into its causes.",
        ),
    ] = None,
    loss: LossOption = "cross_entropy",
    draws: DrawsOption = 100,
    measure: MeasureOption = None,
    output: OutputOption = None,
    seed: SeedOption = None,
    json: JsonOption = False,
) -> None:
    """Say what dropout does to a network: where it drops, what it costs, what it left behind.

    Prints the verdicts as a table; -o writes the page. The factories run as ordinary Python code
    of yours.
    """
    check_output(output)
    with progress("Loading") as on_progress, _load.strangers():
        network = _load.network(model, weights)
        given, criterion = _load.data(data), _load.loss_of(loss)
        apart = None if held_out is None else _load.data(held_out, test=True)
        from droplens.inspection import inspect as inspect_network

        found = inspect_network(
            network,
            given,
            criterion,
            held_out=apart,
            draws=draws,
            measures=measure or (),
            seed=seed,
            on_progress=on_progress,
        )
    command = repeating(
        "inspect",
        [model],
        data=data,
        weights=weights,
        held_out=held_out,
        loss=loss,
        draws=draws,
        measure=measure,
        seed=found.seed,
    )
    document = found.to_document(f"What dropout does to {model}")
    deliver(replace(document, command=command), output, json)
