"""The one comparison of tensors that tests use."""

import torch
from torch import Tensor


def assert_close(
    actual: Tensor, expected: Tensor, *, rtol: float, atol: float, equal_nan: bool = False
) -> None:
    """Fail unless ``|actual - expected| <= atol + rtol * |expected|`` everywhere, in float64.

    Shapes must be equal: nothing is broadcast. Dtypes and devices may differ, so a bfloat16
    result can be held against a float64 truth; where they matter, a test asserts them itself.
    Complex is compared as complex128, and only with complex. Infinities must match exactly.

    Args:
        equal_nan: accept NaN where both have it; otherwise any NaN fails.
    """
    if actual.is_complex() != expected.is_complex():
        raise AssertionError(f"complex against real: {actual.dtype}, {expected.dtype}")
    wide = torch.complex128 if actual.is_complex() else torch.float64
    torch.testing.assert_close(
        actual.detach().to("cpu", wide),
        expected.detach().to("cpu", wide),
        rtol=rtol,
        atol=atol,
        equal_nan=equal_nan,
        check_stride=False,
    )
