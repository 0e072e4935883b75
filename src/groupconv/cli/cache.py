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
                "folder": store.place(),
                "entries": usage.entries,
                "bytes": usage.bytes,
                "limit": store.LIMIT,
                "cleared": clear,
                "unused": reason,
            }
        )
        return
    size = f"{usage.entries} entries, {usage.bytes / 2**20:.1f} MiB"
    lines = [f"{store.place()}: {'removed ' if clear else ''}{size}"]
    lines.append(f"limit: {store.LIMIT / 2**20:.0f} MiB")
    if reason is not None:
        lines.append(f"not used: {reason}")
    people.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
