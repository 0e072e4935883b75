"""What a run found, for people: terminal table and HTML page. Works on the plain report alone."""

from groupconv.report.page import render_frontier, render_page
from groupconv.report.pictures import bench_picture
from groupconv.report.table import baseline_table, bench_table, frontier_table, summary_table

__all__ = [
    "baseline_table",
    "bench_picture",
    "bench_table",
    "frontier_table",
    "render_frontier",
    "render_page",
    "summary_table",
]
