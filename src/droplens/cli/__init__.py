"""The command line: one command a file, each of which imports what it needs when it runs."""

from droplens.cli._app import main

__all__ = ["main"]
