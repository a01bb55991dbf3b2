"""The commands of `droplens`, and the one door to all of them."""

from typing import Annotated

import typer

from droplens.cli import compare, demo, inspect, reproduce, solve

app = typer.Typer(
    name="droplens",
    help="See what dropout does to your PyTorch network.",
    epilog="Every command has its own --help. Exit status: 0 done; 1 a verdict differs from the "
    "expected one, or a finding; 2 bad input; 3 a defect of droplens itself.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from droplens import __version__

        typer.echo(f"droplens {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    """See what dropout does to your PyTorch network."""


app.command("demo", epilog=demo.EXAMPLE)(demo.demo)
app.command("inspect", epilog=inspect.EXAMPLE)(inspect.inspect)
app.command("compare", epilog=compare.EXAMPLE)(compare.compare)
app.command("solve", epilog=solve.EXAMPLE)(solve.solve)
app.command("reproduce", epilog=reproduce.EXAMPLE)(reproduce.reproduce)


def main() -> None:
    """Run the command line; always leaves by SystemExit, with the status the epilog tells."""
    app()
