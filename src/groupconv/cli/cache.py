"""``groupconv cache``: the generated code and measured choices that are kept on disk."""

from typing import Annotated

import typer

from groupconv.cli.console import JsonFlag, people, print_json
from groupconv.kernels import cache as store


def cache(
    clear: Annotated[bool, typer.Option(help="Remove every entry.")] = False,
    json: JsonFlag = False,
) -> None:
    """Show how much is kept and where; with --clear, remove it."""
    reason = store.why_not()
    usage = store.clear() if clear else store.usage()
    if json:
        print_json(
            {
                "folder": str(store.folder()),
                "entries": usage.entries,
                "bytes": usage.bytes,
                "limit": store.LIMIT,
                "cleared": clear,
                "unused": reason,
            }
        )
        return
    size = f"{usage.entries} entries, {usage.bytes / 2**20:.1f} MiB"
    people.print(f"{store.folder()}: {'removed ' if clear else ''}{size}", highlight=False)
    people.print(f"limit: {store.LIMIT / 2**20:.0f} MiB", highlight=False)
    if reason is not None:
        people.print(f"not used: {reason}", highlight=False)
