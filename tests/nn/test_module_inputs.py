"""The layers on every input that PyTorch keeps for testing its own."""

import pytest
import torch
from compare import assert_close
from torch import nn
from torch.testing._internal.common_modules import ModuleInput, module_db

from groupconv import nn as our_nn

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: our_nn.GroupConv1d,
    nn.Conv2d: our_nn.GroupConv2d,
    nn.Conv3d: our_nn.GroupConv3d,
    nn.ConvTranspose1d: our_nn.GroupConvTranspose1d,
    nn.ConvTranspose2d: our_nn.GroupConvTranspose2d,
    nn.ConvTranspose3d: our_nn.GroupConvTranspose3d,
}
INFOS = {info.module_cls: info for info in module_db if info.module_cls in OURS}


def _inputs(cls: type[nn.Module]) -> list[ModuleInput]:
    torch.manual_seed(0)
    info = INFOS[cls]
    return info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=True, training=True
    )


def _cases() -> list[object]:
    return [
        pytest.param(cls, i, id=f"{cls.__name__}-{i}{case.desc}")
        for cls in INFOS
        for i, case in enumerate(_inputs(cls))
    ]


def test_every_entry_was_found() -> None:
    assert INFOS.keys() == OURS.keys()
    assert len(_cases()) == 3 * 4 + 3 * 2


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("cls", "index"), _cases())
def test_equals_torch(cls: type[nn.Module], index: int, groups: int) -> None:
    """As torch gives it, which is dense, and with the same layer split into groups."""
    case = _inputs(cls)[index]
    args, kwargs = list(case.constructor_input.args), dict(case.constructor_input.kwargs)
    if groups > 1:
        args[1] = 8
        kwargs["groups"] = groups
    ours = OURS[cls](*args, **kwargs, dtype=torch.float64)
    theirs = cls(*args, **kwargs, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict(), strict=True)

    forward = case.forward_input
    assert len(forward.args) == 1
    assert not forward.kwargs
    x, y = (forward.args[0].detach().clone().requires_grad_() for _ in range(2))
    actual, expected = ours(x), theirs(y)
    assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    seed = torch.randn_like(expected)
    actual.backward(seed)
    expected.backward(seed)
    assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)
    for (name, mine), (other_name, other) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert name == other_name
        assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("cls", "index"), _cases())
def test_equals_the_reference_function(cls: type[nn.Module], index: int) -> None:
    case = _inputs(cls)[index]
    ours = OURS[cls](
        *case.constructor_input.args, **case.constructor_input.kwargs, dtype=torch.float64
    )
    (x,) = case.forward_input.args
    if case.reference_fn is not None:
        expected = case.reference_fn(ours, x)
    else:  # torch gives none for a batch: its images one by one
        expected = torch.stack([ours(image) for image in x])
    assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)
