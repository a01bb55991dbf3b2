"""`droplens solve`: the global minimum of one hidden linear layer with dropout, from a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from droplens.linear import Solution

EXAMPLE = "Example:  droplens solve houses.csv --target price --p 0.3 --path -o houses.html"


@guarded
def solve(  # noqa: PLR0913 -- a command's options are its signature
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A .csv with a row an example, or a .npz.")
    ],
    target: Annotated[
        list[str],
        typer.Option(
            "--target",
            metavar="NAME",
            help="Target column (CSV; numbered from 1 without a header) or array (NPZ). Repeat "
            "it, or separate names by commas, for several.",
        ),
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Option("--inputs", metavar="NAME", help="Inputs; all other columns if not given."),
    ] = None,
    p: Annotated[float, typer.Option("--p", help="Drop probability, below 1.")] = 0.5,
    width: Annotated[
        int | None,
        typer.Option(
            "--width", metavar="R", help="Hidden units; min(inputs, targets) if not given."
        ),
    ] = None,
    block: Annotated[
        int, typer.Option("--block", metavar="B", help="Consecutive units that fall together.")
    ] = 1,
    adaptive: Annotated[
        bool, typer.Option("--adaptive", help="Adapt the rate, so that width does not dilute it.")
    ] = False,
    intercept: Annotated[
        bool, typer.Option("--intercept", help="Solve around the means of inputs and targets.")
    ] = False,
    path: Annotated[
        bool, typer.Option("--path", help="Also solve over a grid of drop probabilities.")
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option("--save", metavar="FILE.npz", help="Write coefficients and factors."),
    ] = None,
    output: OutputOption = None,
    seed: SeedOption = None,
    json: JsonOption = False,
) -> None:
    """Solve one hidden linear layer with dropout exactly: no training, a certificate instead.

    Prints what survives of the singular values and whether the minimum is certified. Nothing here
    is random; --seed is only noted in the result.
    """
    check_output(output)
    from droplens._tables import read_problem
    from droplens.linear import path as solve_path
    from droplens.linear import solve as solve_problem
    from droplens.linear._path import default_width
    from droplens.report import solution_document

    with progress("Reading") as on_progress:
        problem = read_problem(data, _names(target), _names(inputs or []))
        X, Y = problem.X, problem.Y
        r = default_width(X.shape[1], Y.shape[1], block) if width is None else width
        means = X.mean(0), Y.mean(0)
        if intercept:
            X, Y = X - means[0], Y - means[1]
        on_progress(0.2, "Solving")
        solution = solve_problem(X, Y, p, r, block, adaptive)
        if intercept:
            solution = solution.around(*means)
        on_progress(0.7, "Following the rates")
        rates = solve_path(X, Y, r, None, block, adaptive) if path else None
    if save is not None:
        _save(save, solution)
    document = solution_document(
        solution,
        n_examples=len(X),
        title=f"{data.name}: {', '.join(_names(target)[:4])} through a layer with dropout",
        path=rates,
        seed=seed,
        command=f"droplens solve {data.name} --target {','.join(_names(target))} --p {p:g} "
        f"--width {r} --block {block}{_flags(adaptive, intercept, path)}",
    )
    deliver(document, output, json)


def _flags(adaptive: bool, intercept: bool, path: bool) -> str:
    chosen = (("--adaptive", adaptive), ("--intercept", intercept), ("--path", path))
    return "".join(f" {name}" for name, on in chosen if on)


def _names(given: list[str]) -> tuple[str, ...]:
    return tuple(name.strip() for part in given for name in part.split(",") if name.strip())


def _save(path: Path, solution: "Solution") -> None:
    import numpy as np

    with path.open("wb") as file:
        np.savez(
            file,
            coefficients=solution.coefficients,
            intercept=solution.intercept,
            outgoing=solution.outgoing,
            incoming=solution.incoming,
        )
