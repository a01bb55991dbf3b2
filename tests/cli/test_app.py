"""The command line's door: quick help, clear errors, exit statuses, JSON alone."""

import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import typer

from droplens import report
from droplens.cli import _shell
from tests import samples

SLOW = ("torch", "numpy", "scipy", "sklearn", "altair", "jinja2", "vl_convert", "rich")


def droplens(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "droplens", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": "src", "COLUMNS": "100", **environment},
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        *((command, "--help") for command in ("demo", "inspect", "compare", "solve", "reproduce")),
        ("--version",),
    ],
)
def test_help_imports_nothing_slow(arguments):
    """Help must answer in 0.3 s; what it imports decides that, on any machine."""
    script = (
        "import sys, atexit\n"
        f"slow = {SLOW!r}\n"
        "atexit.register(lambda: print([m for m in slow if m in sys.modules], file=sys.stderr))\n"
        f"sys.argv = ['droplens', *{arguments!r}]\n"
        "from droplens.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": "src"},
    )
    assert done.stderr.strip() == "[]"
    assert done.returncode == 0


def test_help_lists_the_commands_and_exit_statuses():
    done = droplens("--help")
    assert done.returncode == 0
    assert "demo" in done.stdout
    assert "Exit status: 0 done; 1 a verdict differs" in " ".join(done.stdout.split())


def test_help_of_demo_has_an_example_and_every_option():
    done = droplens("demo", "--help")
    assert "droplens demo --seed 0 -o digits.html" in done.stdout
    for option in ("--output", "--seeds", "--seed", "--json"):
        assert option in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense",), "No such command 'nonsense'"),
        (("demo", "--seeds", "one"), "Invalid value for '--seeds'"),
        (("demo", "--seeds", "1"), "Invalid value for '--seeds'"),
        (("demo", "--seed", "-1"), "Invalid value for '--seed'"),
        (("demo", "-o", "no/such/folder/page.html"), "there is no folder 'no/such/folder'"),
        (("demo", "-o", "."), "it is a folder"),
        (("demo", "-o", "page.json"), "path has to name the page, not its JSON twin"),
    ],
)
def test_bad_input_is_one_clear_line_and_status_2(arguments, message):
    done = droplens(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_debugging_shows_the_traceback():
    done = droplens("demo", "-o", ".", DROPLENS_DEBUG="1")
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("droplens: error: cannot write '.': it is a folder\n")
    assert done.returncode == 2


@pytest.mark.parametrize("error", [ValueError, TypeError, OSError])
def test_refusals_of_the_library_end_with_status_2(error, capsys):
    @_shell.guarded
    def command() -> None:
        raise error("p has to lie\nbetween 0 and 1")

    with pytest.raises(typer.Exit) as left:
        command()
    assert left.value.exit_code == 2
    assert capsys.readouterr() == ("", "droplens: error: p has to lie between 0 and 1\n")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (RuntimeError("a defect"), 3, "droplens: this is a defect of droplens; please report it"),
        (KeyboardInterrupt(), 130, "droplens: interrupted"),
        (typer.Exit(1), 1, ""),
    ],
)
def test_other_endings_have_a_status_of_their_own(error, status, line, capsys):
    @_shell.guarded
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as left:
        command()
    assert left.value.exit_code == status
    assert capsys.readouterr().err.rstrip().endswith(line)


def test_json_stands_alone_on_standard_output(tmp_path, capsys):
    page = tmp_path / "report.html"
    _shell.deliver(samples.document(), page, as_json=True)
    out, err = capsys.readouterr()
    assert out == report.to_json(samples.document())
    assert err == ""
    assert page.with_suffix(".json").read_text("utf-8") == out


def test_tables_say_where_the_page_is(tmp_path, capsys):
    page = tmp_path / "report.html"
    _shell.deliver(samples.document(), page, as_json=False)
    out = capsys.readouterr().out
    assert "cannot conclude" in out
    assert f"Open {page} in a browser" in out


def test_progress_keeps_off_standard_output(capsys):
    with _shell.progress("Training") as on_progress:
        on_progress(0.5, "training")
        on_progress(2.0, "done")
    assert capsys.readouterr().out == ""


def test_commands_are_one_file_each():
    from droplens.cli import _app

    folder = Path(typing.cast("str", _app.__file__)).parent
    files = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    assert files == {command.name for command in _app.app.registered_commands}
