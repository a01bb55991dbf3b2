"""`droplens reproduce`: run what the papers claim, and say whether it holds."""

import json as json_module
import os
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from droplens.cli._shell import (
    DIFFERS,
    JsonOption,
    OutputOption,
    check_output,
    guarded,
    progress,
)

if TYPE_CHECKING:
    from droplens.reproduction import Reproduction

EXAMPLE = "Example:  droplens reproduce P1 --scale test -o claims.html"


class ScaleName(StrEnum):
    """How much work."""

    test = "test"
    laptop = "laptop"
    paper = "paper"


@guarded
def reproduce(  # noqa: PLR0913 - a command's options
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PAPER|CLAIM]...", help="What to run; everything if not given."),
    ] = None,
    scale: Annotated[
        ScaleName,
        typer.Option(
            "--scale", help="test: a minute; laptop: minutes; paper: the papers' own sizes."
        ),
    ] = ScaleName.laptop,
    seeds: Annotated[
        int | None,
        typer.Option(
            "--seeds", metavar="N", min=1, help="Runs per setting; each claim has its own number."
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", min=0, help="The first seed; the others follow.")
    ] = 0,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", metavar="N", min=1, help="Processes; as many as cores by default."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="DIR",
            help="Keep every finished run in DIR, and take up those that are there.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="DIR",
            help="A folder with the files of MNIST or CIFAR, for the claims that can use them.",
        ),
    ] = None,
    broken: Annotated[
        str,
        typer.Option(
            "--broken",
            metavar="NAME",
            help="Break the theory on purpose: wrong-lambda, missing-rescale, penalty-doubled, "
            "swapped-losses, fixed-rate or repaired. The verdicts must then turn.",
        ),
    ] = "",
    output: OutputOption = None,
    json: JsonOption = False,
    show: Annotated[bool, typer.Option("--list", help="List the claims, and run nothing.")] = False,
) -> None:
    """Run what the papers on dropout claim, and report measured against predicted.

    Every claim ends as "holds", "does not hold" or "cannot conclude". Some claims we expect not to
    hold, and say why. Exit status 1: a verdict differs from the expected one.
    \f

    Raises:
        Exit: with status 1, then.
    """  # noqa: D301  # the form feed ends what --help shows
    check_output(output)
    from droplens import papers, reproduction

    if show:
        _list(papers.select(names or ()), json)
        return
    with progress("Starting") as on_progress:
        done = reproduction.reproduce(
            reproduction.Request(
                names=names or (),
                scale=scale.value,
                seeds=seeds,
                first_seed=seed,
                data=data,
                broken=broken,
                command=shlex.join(["droplens", *sys.argv[1:]]),
            ),
            jobs=jobs or os.cpu_count() or 1,
            folder=resume,
            on_progress=on_progress,
        )
    _deliver(done, output, json)
    if not done.as_expected:
        raise typer.Exit(DIFFERS)


def _deliver(done: "Reproduction", output: Path | None, as_json: bool) -> None:
    from rich.console import Console

    from droplens.report import check_report, render_page, write_whole

    text = json_module.dumps(done.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if output is not None:
        page, twin = check_report(output)
        write_whole({page: render_page(done.to_document()), twin: text})
    if as_json:
        typer.echo(text, nl=False)
        return
    _print(done, Console())
    if output is not None:
        typer.echo(f"Open {page} in a browser; {twin} holds the same as JSON.")


def _print(done: "Reproduction", console: "object") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from droplens.report import format_cell

    assert isinstance(console, Console)
    document = done.to_document()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("Claim", "Verdict", "Measured", "Predicted"):
        table.add_column(head, overflow="fold")
    for one in done.judgements:
        mark = "" if one.as_expected else f"\nexpected: {one.claim.expected_verdict}"
        unit = f" {one.claim.criterion.unit}" if one.claim.criterion.unit else ""
        table.add_row(
            Text.assemble((one.claim.id, "bold"), "\n", (one.claim.statement, "dim")),
            Text(one.verdict + mark),
            Text(format_cell(one.measured) + unit),
            Text(one.claim.criterion.predicted),
        )
    console.print(table)
    for item in done.left_out:
        console.print(Text(f"Not measured: {item.what}: {item.why}", style="dim"))
    console.print(Text(document.subtitle))


def _list(claims: "tuple[object, ...]", as_json: bool) -> None:
    from droplens.papers import PAPERS, Claim

    listed = [claim for claim in claims if isinstance(claim, Claim)]
    if as_json:
        entries = [
            {
                "id": claim.id,
                "paper": claim.paper,
                "statement": claim.statement,
                "source": claim.source,
                "expected_verdict": claim.expected_verdict,
                "reason": claim.reason,
                "broken_twins": list(claim.broken),
            }
            for claim in listed
        ]
        typer.echo(json_module.dumps({"claims": entries}, indent=2, ensure_ascii=False))
        return
    for paper, title in PAPERS.items():
        mine = [claim for claim in listed if claim.paper == paper]
        if mine:
            typer.echo(f"{paper}  {title}")
        for claim in mine:
            against = "" if claim.expected_verdict == "holds" else "  [expected: does not hold]"
            typer.echo(f"  {claim.id:<28}{claim.statement}{against}")
