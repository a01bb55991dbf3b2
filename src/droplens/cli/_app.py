"""The commands of `droplens`, and the one door to all of them."""

from typing import Annotated

import typer

from droplens.cli import demo
from droplens.cli._shell import BAD_INPUT

app = typer.Typer(
    name="droplens",
    help="See what dropout does to your PyTorch network.",
    epilog="Every command has its own --help. Exit status: 0 done; 1 a verdict differs from the "
    "expected one, or a finding; 2 bad input.",
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
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say which.")
    ] = False,
) -> None:
    """See what dropout does to your PyTorch network."""


app.command("demo")(demo.demo)


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: always, with status 0, 1 or 2.
    """
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("droplens: interrupted", err=True)
        raise SystemExit(BAD_INPUT) from None
