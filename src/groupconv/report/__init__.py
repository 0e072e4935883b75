"""What a run found, for people: terminal table and HTML page. Works on the plain report alone."""

from groupconv.report.page import render_page
from groupconv.report.table import summary_table

__all__ = ["render_page", "summary_table"]
