"""Puts the verbs together, and turns errors into one line and an exit status.

Exit status: 0 done, 1 the job failed or a budget or floor does not hold, 2 wrong arguments.
"""

import sys

import typer

from groupconv import ranks
from groupconv.cli import (
    apply,
    bench,
    cache,
    compile,
    demo,
    doctor,
    explain,
    export,
    optimize,
    plan,
    profile,
    recover,
    report,
    trace,
)
from groupconv.cli.console import people
from groupconv.errors import ArgumentError, GroupConvError

app = typer.Typer(
    name="groupconv",
    help="A trained CNN goes in; a faster network of grouped convolutions comes out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo.demo)
app.command()(profile.profile)
app.command()(trace.trace)
app.command()(optimize.optimize)
app.command()(plan.plan)
app.command()(apply.apply)
app.command()(recover.recover)
app.command()(report.report)
app.command()(compile.compile)
app.command()(export.export)
app.command()(bench.bench)
app.command()(explain.explain)
app.command()(cache.cache)
app.command()(doctor.doctor)


def main() -> None:
    """Run the command line."""
    try:
        ranks.join()
        people.quiet = not ranks.first()
        app()
    except GroupConvError as error:
        people.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, ArgumentError) else 1)
    finally:
        ranks.leave()
