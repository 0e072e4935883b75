"""Settings for all tests."""

import os
import tempfile

import pytest
import torch

# Generated code of this run only, and the same tiles in every run.
_folder = tempfile.TemporaryDirectory(prefix="groupconv-tests-")
os.environ["GROUPCONV_CACHE"] = _folder.name
os.environ["GROUPCONV_TUNE"] = "0"
# Nor is any time that tests measure a result.
os.environ["GROUPCONV_BUSY"] = "1"


def pytest_collectstart() -> None:
    """Layers made as parameters are the same whatever was collected before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test draws the same numbers alone, among others and in any process."""
    torch.manual_seed(0)
