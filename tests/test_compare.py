"""The comparison helper must refuse what is wrong."""

import math

import pytest
import torch
from compare import assert_close

TRUTH = torch.tensor([[1.0, -2.0, 3.0], [4.0, 0.0, 6.0]])


def test_accepts_the_truth_and_a_difference_within_tolerance() -> None:
    assert_close(TRUTH, TRUTH.clone(), rtol=0, atol=0)
    assert_close(TRUTH + 0.9e-3, TRUTH, rtol=0, atol=1e-3)
    assert_close(TRUTH * (1 + 0.9e-3), TRUTH, rtol=1e-3, atol=0)


def test_accepts_another_dtype_and_layout() -> None:
    assert_close(TRUTH.bfloat16(), TRUTH.double(), rtol=0, atol=0)
    assert_close(TRUTH.t().contiguous().t(), TRUTH, rtol=0, atol=0)


@pytest.mark.parametrize("index", [(0, 0), (1, 1), (1, 2)])
def test_rejects_one_wrong_element(index: tuple[int, int]) -> None:
    wrong = TRUTH.clone()
    wrong[index] += 1e-2
    with pytest.raises(AssertionError, match="Mismatched elements: 1 / 6"):
        assert_close(wrong, TRUTH, rtol=1e-4, atol=1e-4)


def test_compares_in_float64() -> None:
    """In float32 the two would be equal."""
    truth = torch.tensor([1.0], dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_close(truth + 1e-9, truth.float(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 2), (6,), (1, 2, 3), (2, 1), (1, 3), ()])
def test_rejects_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.ones(shape), torch.ones(2, 3), rtol=10, atol=10)


@pytest.mark.parametrize("where", ["actual", "expected", "both"])
def test_rejects_nan_unless_told(where: str) -> None:
    actual, expected = TRUTH.clone(), TRUTH.clone()
    if where != "expected":
        actual[0, 1] = math.nan
    if where != "actual":
        expected[0, 1] = math.nan
    with pytest.raises(AssertionError, match="1 / 6"):
        assert_close(actual, expected, rtol=10, atol=10)
    if where == "both":
        assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    else:
        with pytest.raises(AssertionError, match="1 / 6"):
            assert_close(actual, expected, rtol=10, atol=10, equal_nan=True)


def test_rejects_infinity_for_a_number() -> None:
    wrong = TRUTH.clone()
    wrong[0, 0] = math.inf
    with pytest.raises(AssertionError, match="1 / 6"):
        assert_close(wrong, TRUTH, rtol=10, atol=10)


def test_complex_is_compared_whole_and_only_with_complex() -> None:
    truth = torch.tensor([1 + 2j])
    assert_close(truth, truth.to(torch.complex128), rtol=0, atol=0)
    with pytest.raises(AssertionError):
        assert_close(truth.conj(), truth, rtol=1e-3, atol=1e-3)
    with pytest.raises(AssertionError, match="complex against real"):
        assert_close(truth, truth.real, rtol=10, atol=10)
