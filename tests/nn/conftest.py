"""Settings for the tests of layers."""

import sys
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors here are tiny: on a busy machine threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    """Tests share functions, and torch stops after eight compilations of one."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
