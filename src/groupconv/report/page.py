"""report.html: one file that shows a run, with nothing to fetch."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from groupconv.report.pictures import frontier, layer_bars
from groupconv.report.table import summary_rows

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1f24; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid #e3e5e8; text-align: right;
         vertical-align: top; }
th:first-child, td:first-child, td.text { text-align: left; }
td.text { color: #555b66; } svg { max-width: 100%; height: auto; } .fine { color: #6b7280; }
"""


def render_page(report: Mapping[str, Any]) -> str:
    """The whole page as HTML text."""
    settings, machine = report["settings"], report["machine"]
    layers = [
        (
            layer["name"],
            str(layer["groups"]),
            f"{layer['macs']['before'] / 1e6:.2f}",
            f"{layer['macs']['after'] / 1e6:.2f}",
            f"{1e3 * layer['latency']['before']:.3f}",
            f"{1e3 * layer['latency']['after']:.3f}",
            f"{layer['loss']:.4f}",
            layer["why"],
        )
        for layer in report["layers"]
    ]
    skipped = report["left_as_they_are"]
    left = (
        _section("Left as they are", _table(("layer", "why"), list(skipped.items()), text=1))
        if skipped
        else ""
    )
    facts = [(key.replace("_", " "), str(value)) for key, value in settings.items()]
    facts += [(key, str(value)) for key, value in machine.items()]
    facts += [(f"seconds: {key}", f"{value:.1f}") for key, value in report["seconds"].items()]
    header = ("layer", "groups", "MACs before, M", "after", "ms before", "after", "loss", "why")
    title = f"{settings['model']} in groups: {report['speedup']:.2f}x faster"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>"
        + _table(("", "before", "after", "change"), summary_rows(report))
        + _section("Accuracy against latency", frontier(report))
        + _section("Time of each layer", layer_bars(report))
        + _section("Layers", _table(header, layers, text=7))
        + left
        + _section("How it was made", _table(("", ""), facts))
        + '<p class="fine">One multiply-add is one MAC; biases are not counted. The loss of a '
        "layer is the share of its output's variance that its refit could not keep. "
        f"groupconv {escape(report['groupconv'])}.</p></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>{body}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], text: int | None = None) -> str:
    """An HTML table; column ``text`` holds prose."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=text' if i == text else ''}>{escape(cell)}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
