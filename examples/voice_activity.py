"""Speech or not, 32 ms at a time (silero VAD): a network with a state, and without labels.

`--data examples/voice_activity.py:frames --metric examples/voice_activity.py:same_decisions` gives each network the
float network's state. `python examples/voice_activity.py QUANTIZED.onnx` lets it carry its own, as when deployed.
Reads speech/silero-test.wav and speech/silero_vad_16k_op15.onnx in the folder LOWBIT_DATA.
"""

import os
import sys
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import lowbit as lb

FOLDER = Path(os.environ.get("LOWBIT_DATA", "../shared/data")) / "speech"
CONTEXT, FRAME = 64, 512


def frames() -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """The network's three inputs for each frame in turn, and whether the float network hears speech in it."""
    for inputs, outputs in heard(lb.load(FOLDER / "silero_vad_16k_op15.onnx")):
        yield inputs, outputs["output"][:, 0] > 0.5


def same_decisions(outputs: dict[str, np.ndarray], labels: np.ndarray) -> float:
    """Share of frames with the float network's decision."""
    return float(((outputs["output"][:, 0] > 0.5) == labels).mean())


def heard(model: lb.Model) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Inputs and outputs of a network that carries its own state along the recording."""
    with wave.open(str(FOLDER / "silero-test.wav")) as file:
        sound = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
    sound = np.concatenate([np.zeros(CONTEXT, np.float32), sound])
    state = np.zeros((2, 1, 128), np.float32)
    for start in range(0, len(sound) - CONTEXT - FRAME + 1, FRAME):
        frame = sound[None, start : start + CONTEXT + FRAME]
        inputs: dict[str, np.ndarray] = {"input": frame, "state": state, "sr": np.asarray(16000)}
        outputs = model.run(inputs)
        yield inputs, outputs
        state = outputs["stateN"]


if __name__ == "__main__":
    models = (lb.load(FOLDER / "silero_vad_16k_op15.onnx"), lb.load(sys.argv[1]))
    a, b = (np.asarray([outputs["output"][0, 0] > 0.5 for _, outputs in heard(model)]) for model in models)
    print(f"{len(a)} frames, speech in {100 * a.mean():.1f} % and {100 * b.mean():.1f} %")
    print(f"same decision on {100 * (a == b).mean():.2f} %")
