"""Where tests find real models and real data: LOWBIT_DATA, by default ../shared/data beside the checkout."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("LOWBIT_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real models and data; without it a test is skipped, or fails where LOWBIT_DATA_REQUIRED is set."""
    if not DATA.is_dir():
        give_up = pytest.fail if os.environ.get("LOWBIT_DATA_REQUIRED") else pytest.skip
        give_up(f"real models and data not found in {DATA}; set LOWBIT_DATA")
    return DATA
