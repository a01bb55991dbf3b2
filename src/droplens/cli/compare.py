"""`droplens compare`: sets of networks of your own, side by side."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from torch import nn

EXAMPLE = (
    "Example:  droplens compare with=nets.py:dropped@a.pt with=nets.py:dropped@b.pt "
    "without=nets.py:plain@c.pt without=nets.py:plain@d.pt --data nets.py:training -o page.html"
)


@guarded
def compare(  # noqa: PLR0913  # options of a command line
    networks: Annotated[
        list[str],
        typer.Argument(
            metavar="NETWORK",
            help="Two or more of the form NAME=MODULE:FACTORY@WEIGHTS. Those of one NAME are a "
            "set, and several networks in a set (seeds) give error bars; without NAME= each is a "
            "set of its own. FACTORY is called without arguments and returns a network, or a list "
            "of them; WEIGHTS is a file to fill it with, and may be left out with its @.",
        ),
    ],
    data: DataOption,
    held_out: Annotated[
        str | None,
        typer.Option(
            "--held-out",
            metavar="MODULE:FACTORY|digits",
            help="Data that was not trained on, to compare the losses there; digits: their test "
            "part.",
        ),
    ] = None,
    loss: LossOption = "cross_entropy",
    draws: DrawsOption = 100,
    measure: MeasureOption = None,
    output: OutputOption = None,
    seed: SeedOption = None,
    json: JsonOption = False,
) -> None:
    """Compare sets of networks on the same data, such as with and without dropout.

    Prints the verdicts as a table; -o writes the page. The first set is held against every other.
    """
    check_output(output)
    with progress("Loading") as on_progress, _load.strangers():
        sets = _sets(networks)
        given, criterion = _load.data(data), _load.loss_of(loss)
        apart = None if held_out is None else _load.data(held_out, test=True)
        from droplens.inspection import compare as compare_networks

        found = compare_networks(
            sets,
            given,
            criterion,
            held_out=apart,
            draws=draws,
            measures=measure or (),
            seed=seed,
            on_progress=on_progress,
        )
    command = repeating(
        "compare",
        networks,
        data=data,
        held_out=held_out,
        loss=loss,
        draws=draws,
        measure=measure,
        seed=found.seed,
    )
    document = found.to_document(f"What sets {' and '.join(sets)} apart")
    deliver(replace(document, command=command), output, json)


def _sets(specs: list[str]) -> "dict[str, list[nn.Module]]":
    """Networks by the name of their set, in the order given.

    Raises:
        ValueError: if there are fewer than two sets, or one has no name.
    """
    sets: dict[str, list[nn.Module]] = {}
    for spec in specs:
        name, separator, rest = spec.partition("=")
        if separator and not name:
            raise ValueError(f"{spec!r} has no name before its '='; give one, or leave '=' out")
        factory, at, weights = (rest if separator else spec).partition("@")
        own = _load.networks(factory, Path(weights) if at else None)
        sets.setdefault(name if separator else spec, []).extend(own)
    if len(sets) < 2:
        raise ValueError(
            f"there is one set of networks only ({next(iter(sets))!r}); give those to compare "
            "different names, such as with=nets.py:a without=nets.py:b"
        )
    return sets
