"""What every command shares: clear errors, progress, output files, JSON alone."""

import functools
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn, ParamSpec, TypeVar

import typer

if TYPE_CHECKING:
    from droplens.report import Document

DIFFERS: Final = 1
"""Exit status when a verdict differs from the expected one, or a finding was made."""

BAD_INPUT: Final = 2
"""Exit status for input that no result can come of."""

DEFECT: Final = 3
"""Exit status when droplens itself broke, so that scripts do not take it for a finding."""

INTERRUPTED: Final = 130
"""Exit status after Ctrl-C, as shells have it."""

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

OnProgress = Callable[[float, str], None]
"""Called with the share of the work done, from 0 to 1, and what is being done now."""

JsonOption = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the result as JSON, alone on standard output. Files are then written only "
        "where -o asks for them.",
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="PAGE.html",
        help="Where to write the page; its JSON twin is written beside it, as PAGE.json.",
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="N",
        min=0,
        help="Seed of everything random. Without one, a fresh seed is taken and reported.",
    ),
]


def guarded(command: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Give every way a command can end its exit status, and the reader a line instead of a trace.

    What the library refuses (ValueError, TypeError, OSError), and what the user's own model raises
    (ForwardError), is bad input: one line on standard error, after the traceback where
    DROPLENS_DEBUG=1 asks for it. Anything else is a defect.
    """

    @functools.wraps(command)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            typer.echo("droplens: interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader of our output has left, as `head` does; there is nobody to tell.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit from None
        except (ValueError, TypeError, OSError) as error:
            _refuse(error)
        except Exception as error:
            if _is_forward_error(error):
                _refuse(error)
            traceback.print_exc()
            typer.echo("droplens: this is a defect of droplens; please report it", err=True)
            raise typer.Exit(DEFECT) from error

    return run


def _refuse(error: Exception) -> NoReturn:
    """Leave with one line; call it where `error` is handled.

    Raises:
        Exit: always.
    """
    if os.environ.get("DROPLENS_DEBUG") == "1":
        traceback.print_exc()
    reason = " ".join(str(error).split()) or type(error).__name__
    typer.echo(f"droplens: error: {reason}", err=True)
    raise typer.Exit(BAD_INPUT) from error


def _is_forward_error(error: Exception) -> bool:
    # It can only have been raised where the room is imported; importing it here costs torch.
    calling = sys.modules.get("droplens.calling")
    return calling is not None and isinstance(error, calling.ForwardError)


def repeating(command: str, arguments: Sequence[str], **options: object) -> str:
    """The command line that repeats a result; options that are None are left out, lists repeated.

    >>> repeating("inspect", ["nets.py:make"], loss="mse", held_out=None, seed=3)
    'droplens inspect nets.py:make --loss mse --seed 3'
    """
    words = ["droplens", command, *arguments]
    for name, value in options.items():
        if value is None:
            continue
        for each in value if isinstance(value, list) else [value]:
            words += [f"--{name.replace('_', '-')}", str(each)]
    return shlex.join(words)


@contextmanager
def progress(title: str, quiet: bool = False) -> Iterator[OnProgress]:
    """A progress bar on standard error.

    Yields:
        The function that moves it.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        # A file has no use for a bar that moves; the command's errors then stand alone in it.
        disable=quiet or not console.is_terminal,
    )
    with bar:
        task = bar.add_task(title, total=1.0)

        def move(share: float, doing: str) -> None:
            bar.update(task, completed=min(max(share, 0.0), 1.0), description=doing or title)

        yield move


def check_output(output: Path | None) -> None:
    """Refuse a page that cannot be written before the work starts, not after.

    Raises:
        OSError: if the page or its twin cannot be written.
    """
    if output is not None:
        from droplens.report import check_report

        check_report(output)


def deliver(document: "Document", output: Path | None, as_json: bool) -> None:
    """Print the document as JSON or as tables, and write the page where one is asked for.

    Raises:
        OSError: if the page or its twin cannot be written.
    """
    from rich.console import Console

    from droplens.report import print_verdicts, to_json, write_report

    written = None if output is None else write_report(document, output)
    if as_json:
        typer.echo(to_json(document), nl=False)
        return
    print_verdicts(document, Console())
    if written is not None:
        page, twin = written
        typer.echo(f"Open {page} in a browser; {twin} holds the same as JSON.")
