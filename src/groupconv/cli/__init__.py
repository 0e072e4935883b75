"""The command ``groupconv``: one module per verb, each parses, calls and prints."""

from groupconv.cli.app import main

__all__ = ["main"]
