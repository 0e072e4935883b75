"""Detectors: what runs on whole images is changed, and the objects found are what counts."""

from pathlib import Path

import pytest
import torch
from compare import assert_close
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import groupconv
from benchmarks.literature import small_mask_rcnn
from groupconv.optimize.trace import trace

pytestmark = pytest.mark.usefixtures("steady_clock")


def mask_rcnn(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """With statistics of real activations."""
    torch.manual_seed(0)
    net = small_mask_rcnn(norm)
    for _ in range(20):
        net.backbone(torch.randn(4, 3, 64, 96))
    return net.eval()


def images(count: int = 10) -> Tensor:
    return torch.rand(count, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def test_what_runs_on_whole_images_is_mapped() -> None:
    result = trace(mask_rcnn(), (images(2),))
    names = [conv.name for conv in result.convs]
    assert all(name.startswith("backbone.") for name in names)
    assert {"backbone.body.conv1", "backbone.fpn.layer_blocks.1.0"} <= set(names)
    assert result.ends == ("backbone", "rpn.head")
    for name, reason in {
        "MaskRCNN": "MaskRCNN finds objects in the images",
        "rpn.head.conv.0.0": "called 3 times in one pass",
        "roi_heads.box_head.fc6": "runs on what was found in the images, not on whole images",
        "roi_heads.mask_head.0.0": "runs on what was found in the images, not on whole images",
    }.items():
        assert result.skipped[name] == reason


def test_networks_that_find_nothing_are_judged_by_all_that_they_return() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1))
    assert trace(net, (images(2),)).ends == ("",)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_a_detector_goes_through_the_whole_job(norm: type[nn.Module], tmp_path: Path) -> None:
    net, x = mask_rcnn(norm), images()
    result = groupconv.optimize(net, x, budget="90%macs", recover="bn", out=tmp_path)
    assert result.plan.layers
    report = result.report
    # The outputs of the pyramid are not the network's.
    assert "backbone.fpn.layer_blocks.0.0" in {row["name"] for row in report["layers"]}
    assert report["macs"]["after"] <= 0.9 * report["macs"]["before"]
    assert (report["task"], report["output_error"]) == ("detect", None)
    assert 0 < report["agreement"] <= 1
    assert 0.5 <= report["overlap"] <= 1
    assert "objects found again (F1)" in (tmp_path / "report.html").read_text()
    loaded = groupconv.load(tmp_path, mask_rcnn(norm))
    with torch.no_grad():
        for found, again in zip(result.model(x), loaded(x), strict=True):
            for key in ("boxes", "labels", "scores", "masks"):
                assert_close(again[key], found[key], rtol=0, atol=0)


def test_an_unchanged_detector_finds_the_same() -> None:
    result = groupconv.apply(mask_rcnn(), images(), groupconv.Plan({}), task="detect")
    assert (result.report["agreement"], result.report["overlap"]) == (1.0, 1.0)


def test_more_objects_are_found_again_after_a_gentler_cut() -> None:
    net, x = mask_rcnn(), images()
    gentle, harsh = (
        groupconv.optimize(net, x, budget=budget).report for budget in ("97%macs", "60%macs")
    )
    assert gentle["agreement"] > harsh["agreement"]
