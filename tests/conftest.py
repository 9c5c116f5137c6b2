"""Where tests find real models and real data: LOWBIT_DATA, by default ../shared/data beside the checkout.

One thread each for torch and numba where tests run in several processes: two with two threads each took turns.
"""

import os
from pathlib import Path

import hypothesis
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before anything imports torch
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ.setdefault(name, "1")

hypothesis.settings.register_profile("lowbit", deadline=None)  # a busy machine is no error
hypothesis.settings.load_profile("lowbit")

DATA = Path(os.environ.get("LOWBIT_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real models and data; without it a test is skipped, or fails where LOWBIT_DATA_REQUIRED is set."""
    if not DATA.is_dir():
        give_up = pytest.fail if os.environ.get("LOWBIT_DATA_REQUIRED") else pytest.skip
        give_up(f"real models and data not found in {DATA}; set LOWBIT_DATA")
    return DATA
