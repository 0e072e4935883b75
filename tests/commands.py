"""What tests of the command share."""

import json
from collections.abc import Callable
from typing import Any

# Exit status, standard output and standard error of a command line.
Run = Callable[..., tuple[int, str, str]]


def one_object(text: str) -> dict[str, Any]:
    """The one JSON object that standard output holds, and nothing else."""
    value, end = json.JSONDecoder().raw_decode(text)
    assert text[end:] == "\n"
    assert isinstance(value, dict)
    return value
