"""Where text for people goes: standard error, so that --json has standard output to itself."""

import json
import logging
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

people = Console(stderr=True)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


def show_progress() -> None:
    """Show what the library logs."""
    handler = RichHandler(console=people, show_level=False, show_path=False, highlighter=None)
    logger = logging.getLogger("groupconv")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)


def print_json(values: Mapping[str, Any]) -> None:
    """One JSON object on standard output."""
    sys.stdout.write(json_text(values))


def json_text(values: Mapping[str, Any]) -> str:
    """One JSON object as a file or standard output has it."""
    return json.dumps(values, indent=1) + "\n"
