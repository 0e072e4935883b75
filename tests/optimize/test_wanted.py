"""What is added to layers, and what a refit makes of it."""

from collections.abc import Callable

import pytest
import torch
from compare import assert_close
from torch import Tensor, nn
from traced import Net, capture, conv, found, traced

from groupconv.optimize.convert import convert
from groupconv.optimize.partition import Partition
from groupconv.optimize.refit import refit
from groupconv.optimize.sampling import Sampling
from groupconv.optimize.trace import Addend, trace
from groupconv.optimize.wanted import Added, Targets
from groupconv.store import Store


def every(x: Tensor) -> Sampling:
    """All positions of all images."""
    return Sampling(lambda: x.split(32), images=len(x), max_positions=10**6, seed=0)


def norm(channels: int = 4) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda n, x: n.b(n.a(x).relu()) + x, Addend("a", output=False)),
        (lambda n, x: x + n.b(n.a(x).relu()), Addend("a", output=False)),
        (lambda n, x: n.norm(n.b(n.a(x).relu())) + x, Addend("a", output=False)),
        (lambda n, x: n.norm(n.b(n.a(x).relu())).add_(x), Addend("a", output=False)),
        (lambda n, x: n.c(x) + n.b(n.a(x)), Addend("c", output=True)),
        (lambda n, x: n.norm(n.c(x)) + n.b(n.a(x)), Addend("norm", output=True)),
        # The one that runs later makes up for the other.
        (lambda n, x: n.b(n.a(x)) + n.c(x), None),
        (lambda n, x: n.b(n.a(x)).relu() + x, None),
        (lambda n, x: torch.add(n.b(n.a(x)), x, alpha=2), None),
        (lambda n, x: n.b(n.a(x)) + x.mean((2, 3), keepdim=True), None),
        (lambda n, x: n.b(n.a(x)) - x, None),
        (lambda n, x: (y := n.b(n.a(x))) + y, None),
        # Known, but not as what a traced layer reads or writes.
        (lambda n, x: n.b(n.a(x)) + x.relu(), None),
    ],
)
def test_what_is_added(forward: Callable[..., Tensor], expected: Addend | None) -> None:
    result = traced(forward, b=conv(6, 4), c=conv(4, 4), norm=norm())
    assert found(result, "b").added == expected


def test_the_layer_itself_may_read_what_is_added() -> None:
    result = traced(lambda n, x: n.c(x) + x, c=conv(4, 4))
    assert found(result, "c").added == Addend("c", output=False)


def test_a_tensor_that_is_changed_in_place_is_left_alone() -> None:
    def forward(n: Net, x: Tensor) -> Tensor:
        y = n.c(x)
        z = n.b(n.a(x))
        y.relu_()
        return z + y

    result = traced(forward, b=conv(6, 4), c=conv(4, 4))
    assert found(result, "b").added is None


def test_the_later_branch_makes_up_for_the_other() -> None:
    result = traced(lambda n, x: n.b(n.a(x)) + n.c(x), b=conv(6, 4), c=conv(4, 4))
    assert found(result, "c").added == Addend("b", output=True)


@torch.no_grad()
@pytest.mark.parametrize("batch_norm", [True, False])
def test_targets_make_the_sum_what_it_was(batch_norm: bool) -> None:
    """A layer that wrote its target would undo the drift of what is added, in any order."""
    torch.manual_seed(0)
    end = norm() if batch_norm else nn.Identity()
    if batch_norm:
        nn.init.uniform_(end.weight, 0.5, 2)
        end.running_var.uniform_(0.5, 2)

    def forward(n: Net, x: Tensor) -> Tensor:
        y = n.first(x)
        return n.end(n.b(n.a(y).relu())) + y

    original = Net(forward, first=conv(3, 4), a=conv(4, 6), b=conv(6, 4), end=end).eval()
    x = torch.randn(8, 3, 5, 5)
    (layer,) = (c for c in trace(original, (x,)).convs if c.name == "b")
    assert layer.added == Addend("first", output=True)
    order, some = [2, 0, 3, 1], every(x)
    targets = Targets(original, [layer], some, {"b": order})
    (total,) = targets.of(layer).values()
    drifted = torch.randn(8, 4, 5, 5)
    added = Added([layer], some, 0)
    assert added.modules == ["first"]
    added.see("first", x, drifted[:, order])
    wanted = targets.less(layer, total, added).reshape(8, 5, 5, 4).movedim(-1, 1)
    expected = capture(original, ["end", "a"], x)
    assert_close(end(wanted) + drifted, expected["end"][1] + expected["a"][0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_residual_stream_is_mended() -> None:
    """The last layer of a branch takes back what the stream beside it has lost."""
    torch.manual_seed(0)

    def forward(n: Net, x: Tensor) -> Tensor:
        y = n.first(x)
        return n.norm(n.b(n.mid(n.a(y)))) + y

    # A branch that can tell all of the stream, so that it can take back any part of it.
    layers = {"first": conv(8, 8), "a": conv(8, 32), "mid": nn.Hardtanh(-9, 9), "b": conv(32, 8)}
    model = Net(forward, **layers, norm=norm(8)).eval()
    x = torch.randn(64, 8, 6, 6)
    mapped = trace(model, (x[:2],))
    converted = convert(model, mapped, {"first": Partition.identity(4, 8, 8)})
    refit(model, converted, every(x), Store(None, ""), {})
    stream, sums = (
        [capture(net, [name], x)[name][at] for net in (model, converted.model)]
        for name, at in (("a", 0), ("", 1))
    )
    drift, left = ((new - old).square().mean() for old, new in (stream, sums))
    assert left < 0.02 * drift
