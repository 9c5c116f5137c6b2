"""How the golden containers were made. Run it to add a container for a new version; files that exist are left alone.

PYTHONPATH=src:tests/storage python tests/golden/make_containers.py
"""

from pathlib import Path

import numpy as np
from container_models import model, weights
from safetensors.numpy import save

from lowbit.storage.container import pack

HERE = Path(__file__).parent


def main() -> None:
    rng = np.random.default_rng(7)
    small = {name: array for name, array in weights().items() if name not in ("pruned", "float")}
    small["shared"] = rng.choice(np.array([0, -0.5, 0.25, 1.5], np.float32), 2000, p=[0.7, 0.1, 0.1, 0.1])
    sparse = {
        "pruned": np.where(rng.random(6000) < 0.97, 0, rng.normal(0, 1, 6000)).astype(np.float32),
        "rare": (rng.random(9000) < 0.003).astype(np.int8),
        "codes": np.clip(np.round(rng.laplace(0, 1.4, 60_000)) + 8, 0, 15).astype(np.uint8),  # four segments
        "runs": np.where(np.arange(20_000) % 1000 < 800, 0, rng.integers(1, 16, 20_000)).astype(np.uint8),
    }
    originals = {
        "onnx-raw-v2": model(small).SerializeToString(),
        "onnx-typed-v2": model(small, raw=False).SerializeToString(),
        "safetensors-v2": save(sparse, {"made": "for ever"}),
    }
    for name, contents in originals.items():
        if not (HERE / f"{name}.lowbit").exists():
            (HERE / "originals" / name).write_bytes(contents)
            pack(contents, HERE / f"{name}.lowbit")


if __name__ == "__main__":
    main()
