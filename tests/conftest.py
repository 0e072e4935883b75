"""Settings for all tests."""

import os
import tempfile

# Generated code of this run only, and the same tiles in every run.
_folder = tempfile.TemporaryDirectory(prefix="groupconv-tests-")
os.environ["GROUPCONV_CACHE"] = _folder.name
os.environ["GROUPCONV_TUNE"] = "0"
# Nor is any time that tests measure a result.
os.environ["GROUPCONV_BUSY"] = "1"
