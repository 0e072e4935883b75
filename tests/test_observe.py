"""What runs in a pass, and what runs on objects that were found."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from traced import Net

from groupconv.observe import finds_objects, observe


@pytest.mark.parametrize(
    ("function", "finds"),
    [
        (lambda x: x.relu()[:, torch.tensor([2, 0])], False),
        (lambda x: x[..., ::2].topk(2).values, False),
        (lambda x: x[x > 0], True),
        (lambda x: x.nonzero(), True),
        (lambda x: torch.where(x > 0)[0], True),
        (lambda x: torch.masked_select(x, x > 0), True),
    ],
)
def test_operators_whose_outputs_are_as_large_as_what_they_find(
    function: Callable[[Tensor], Tensor], finds: bool
) -> None:
    net = Net(lambda _, x: function(x)).eval()
    assert finds_objects(net, (torch.randn(2, 3, 4),)) is finds


def test_what_runs_how_often_on_what_and_when() -> None:
    net = Net(
        lambda n, x: n.head(n.twice(x=n.twice(x=x))[x[:, 0] > 0]),
        twice=nn.Identity(), head=nn.Linear(3, 2), never=nn.ReLU(),
    ).eval()  # fmt: skip
    net.twice.forward = lambda x: x + 1
    x = torch.tensor([[1.0, 2, 3], [-1, 2, 3]])
    seen = observe(net, (x,))
    assert seen.found
    assert seen.calls == {"": 1, "twice": 2, "head": 1}
    assert seen.late == {"", "head"}
    positional, named = seen.first["twice"]
    assert positional == ()
    assert named["x"] is x
    assert seen.first["head"][0][0].tolist() == [[3, 4, 5]]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_hooks_go_when_the_network_fails() -> None:
    net = Net(lambda n, x: n.head(x), head=nn.Linear(3, 2)).eval()
    with pytest.raises(RuntimeError, match="shapes"):
        observe(net, (torch.randn(2, 4),))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
