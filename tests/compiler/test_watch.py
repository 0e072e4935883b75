"""Every change of a tensor is seen, and nothing else is."""

import pytest
import torch
from torch import Tensor

from groupconv.compiler.watch import Watch

TENSORS = {
    "float": lambda: torch.randn(3, 5, 7),
    "large": lambda: torch.randn(70001),
    "one byte": lambda: torch.tensor([True]),
    "odd bytes": lambda: torch.arange(13, dtype=torch.int8),
    "half": lambda: torch.randn(3, 3).half(),
    "integers": lambda: torch.arange(9),
    "a number": lambda: torch.tensor(3),
    "empty": lambda: torch.randn(0, 3),
    "channels last": lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(4, 6).T,
    "part": lambda: torch.randn(8, 9)[1:7:2, 2:5],
    "nan": lambda: torch.full((5,), torch.nan),
}


def bits(x: Tensor) -> Tensor:
    """The last number of ``x``, as bytes that can be changed."""
    return x.as_strided((1,), (1,), x.storage_offset() + last(x)).view(torch.uint8)


def last(x: Tensor) -> int:
    return sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))


@pytest.mark.parametrize("name", TENSORS)
def test_one_bit(name: str) -> None:
    x, others = TENSORS[name](), [torch.randn(5), torch.randn(2, 3)]
    tensors = [others[0], x, others[1]]
    watch = Watch(tensors)
    assert watch.holds(tensors)
    assert watch.holds(
        [t.clone(memory_format=torch.preserve_format) for t in others[:1]] + tensors[1:]
    )
    if not x.numel():
        return
    bits(x)[-1] ^= 1
    assert not watch.holds(tensors)
    bits(x)[-1] ^= 1
    assert watch.holds(tensors)


def test_shapes_dtypes_and_numbers_of_tensors() -> None:
    x = torch.randn(4, 6)
    watch = Watch([x])
    for others in ([x.view(6, 4)], [x.view(torch.int32)], [x, x], [], [x.T]):
        assert not watch.holds(others)
    assert watch.holds([x.clone()])
    assert Watch([]).holds([])


def test_no_tensor_is_kept() -> None:
    x = torch.zeros(3)
    watch = Watch([x])
    del x
    assert watch.holds([torch.zeros(3)])
    with torch.inference_mode():
        assert watch.holds([torch.zeros(3)])
