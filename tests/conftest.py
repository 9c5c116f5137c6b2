"""Where tests find real models and real data: LOWBIT_DATA, by default ../shared/data beside the checkout."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("LOWBIT_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real models and data; tests that need it are skipped, saying so, where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"real models and data not found in {DATA}; set LOWBIT_DATA")
    return DATA
