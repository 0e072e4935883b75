"""Where text for people goes: standard error, so that --json has standard output to itself."""

import json
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console

from groupconv import ranks

people = Console(stderr=True)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


def print_json(values: Mapping[str, Any]) -> None:
    """One JSON object on standard output, by the first process."""
    if ranks.first():
        sys.stdout.write(json_text(values))


def json_text(values: Mapping[str, Any]) -> str:
    """One JSON object as a file or standard output has it."""
    return json.dumps(values, indent=1) + "\n"
