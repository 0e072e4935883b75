"""report.html: one file that shows a run, with nothing to fetch."""

from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from groupconv.report.pictures import frontier, layer_bars, sweep_picture
from groupconv.report.table import baseline_rows, faster, frontier_rows, summary_rows

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1f24; max-width: 64rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid #e3e5e8; text-align: right;
         vertical-align: top; font-variant-numeric: tabular-nums; }
td { white-space: nowrap; }
.text { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
summary { cursor: pointer; }
svg { max-width: 100%; height: auto; } .fine { color: #6b7280; }
"""


class _Html(str):
    """Text that is HTML already."""


def render_page(report: Mapping[str, Any]) -> str:
    """The whole page as HTML text."""
    parts = [
        _table(("", "before", "after", "change"), summary_rows(report), text=[0]),
        _section("Accuracy against latency", frontier(report)),
    ]
    if "baselines" in report:
        header, *rows = baseline_rows(report)
        title = "Beside it, on the same images and without recovery"
        parts.append(_section(title, _table(header, rows, text=[0, 3])))
    parts += _layers(report["layers"])
    if report["left_as_they_are"]:
        left = list(report["left_as_they_are"].items())
        parts.append(_section("Left as they are", _table(("layer", "why"), left, text=[0, 1])))
    parts.append(_section("How it was made", _table(("", ""), _facts(report), text=[0, 1])))
    parts.append(
        '<p class="fine">One multiply-add is one MAC; biases are not counted. The loss of a '
        "layer is the share of its output's variance that its refit could not keep. The relative "
        "output error is the length of the change of the outputs over their own. "
        f"groupconv {escape(report['groupconv'])}.</p>"
    )
    changed = any(layer["structure"] != layer["was"] for layer in report["layers"])
    verdict = faster(report["speedup"]) if changed else "no layer was changed"
    return _document(f"{report['settings']['model']} in groups: {verdict}", "".join(parts))


def render_frontier(reports: Sequence[Mapping[str, Any]]) -> str:
    """A page that compares several runs on one network, and links to theirs: HTML text."""
    settings = reports[0]["settings"]
    header, *rows = frontier_rows(reports)
    linked = [
        (_Html(f'<a href="{quote(budget)}/report.html">{escape(budget)}</a>'), *cells)
        for budget, *cells in rows
    ]
    return _document(
        f"{settings['model']} under {len(reports)} budget{'s' * (len(reports) != 1)}",
        sweep_picture(reports) + _section("Budgets", _table(header, linked, text=[0])),
    )


def _layers(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    if not layers:
        return [_section("Layers", "<p>No layer could change, or all were kept.</p>")]
    rows = [
        (
            layer["name"],
            layer["structure"],
            _change(layer["macs"], 1e-6, 2),
            _change(layer["latency"], 1e3, 3),
            f"{layer['loss']:.4f}",
            _folded(layer["why"]),
        )
        for layer in layers
    ]
    header = ("layer", "structure", "MACs, M", "time, ms", "loss", "why")
    return [
        _section("Time of each layer", layer_bars(layers)),
        _section("Layers", _table(header, rows, text=[0, 1, 5])),
    ]


def _change(pair: Mapping[str, float], scale: float, digits: int) -> str:
    """``before → after``, or one number where nothing changed."""
    before, after = (f"{scale * pair[key]:,.{digits}f}" for key in ("before", "after"))
    return before if before == after else f"{before} → {after}"


def _folded(why: str) -> _Html:
    """A reason; what was refused, which may be long, on a click."""
    said, _, rest = why.partition("; ")
    if not rest:
        return _Html(escape(said))
    return _Html(f"<details><summary>{escape(said)}</summary>{escape(rest)}</details>")


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings = dict(report["settings"])
    settings["input_shape"] = "x".join(map(str, settings["input_shape"]))
    facts = [(key.replace("_", " "), str(value)) for key, value in settings.items()]
    if report["predicted_speedup"] is not None:
        speeds = (report["predicted_speedup"], report["speedup"])
        facts.append(("speedup", "predicted {:.2f}x, measured {:.2f}x".format(*speeds)))
    facts += [(key, str(value)) for key, value in report["machine"].items()]
    steps = ", ".join(f"{name} {value:.1f}" for name, value in report["seconds"].items())
    return [*facts, ("seconds", steps)]


def _document(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>{body}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text: Collection[int]) -> str:
    """An HTML table; the columns ``text`` hold words, the others figures."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=text' if i in text else ''}>"
            f"{cell if isinstance(cell, _Html) else escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<table><thead><tr>{line(header, 'th')}</tr></thead><tbody>{body}</tbody></table>"
