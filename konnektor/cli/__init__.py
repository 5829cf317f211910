"""The command line: thin, with no logic that a library user would miss."""

from konnektor.cli.main import main

__all__ = ["main"]
