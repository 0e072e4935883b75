"""The baselines that a result is reported beside."""

from pathlib import Path

import pytest
import torch
from networks import images, residual

import groupconv
from groupconv.report import baseline_table

pytestmark = pytest.mark.usefixtures("steady_clock")


def test_baselines_are_built_and_measured_beside_the_result(tmp_path: Path) -> None:
    x = images(64)
    labels = torch.arange(64) % 10
    result = groupconv.optimize(
        residual(channels=32), x, budget="60%macs", test=(x, labels), baselines=True, out=tmp_path
    )
    original, ours, plain, random, pruned = result.report["baselines"]
    assert (original["name"], original["macs"]) == ("original", result.report["macs"]["before"])
    assert ours["macs"] == result.report["macs"]["after"]
    assert ours["accuracy"] == result.report["accuracy"]["after"]
    assert original["output_error"] == 0 < ours["output_error"] < plain["output_error"]
    assert plain["macs"] == random["macs"] < original["macs"]
    assert "why_not" in pruned or pruned["macs"] <= original["macs"]
    assert all(row["latency"] > 0 for row in (original, ours, plain, random))
    page = (tmp_path / "report.html").read_text()
    assert plain["name"] in page
    assert baseline_table(result.report).row_count == 5


def test_no_baselines_where_nothing_changed() -> None:
    result = groupconv.optimize(residual(), images(), budget="100%macs", baselines=True)
    assert "baselines" not in result.report
