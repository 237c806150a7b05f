from __future__ import annotations

import os
from pathlib import Path

import pytest
from native_tests import build_tests


@pytest.fixture(scope="session")
def native_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder that the environment variable CVMK_TEST_BUILD names (of the package under test, with CVMK_TESTS=ON), else a new one."""
    given = os.environ.get("CVMK_TEST_BUILD")
    return Path(given) if given else build_tests(tmp_path_factory.mktemp("native"), "-DCVMK_WERROR=ON")
