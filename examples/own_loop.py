"""Two-bit weights and activations, trained in a loop of one's own: prepare, train, convert. Half a minute on two cores.

Data and float network are those of `digits.py`; the loop is too: it trains the prepared module as it trained the float
one.
"""

import numpy as np
import torch
from digits import CALIBRATION, TRAINING, digits, network, train

import lowbit as lb


def main(epochs: int = 6) -> tuple[float, float, float]:
    """Top-1 on the 797 test images: float, trained in two bits, and the deployed file. All are printed."""
    torch.manual_seed(0)
    images, labels = digits()
    module = train(network(24), images[:TRAINING], labels[:TRAINING], epochs)
    example, test, answers = torch.from_numpy(images[:1]), images[TRAINING:], labels[TRAINING:]

    prepared = lb.prepare(module, example, "w2a2", calibration=images[:CALIBRATION])
    train(prepared, images[:TRAINING], labels[:TRAINING], epochs)
    model = lb.convert(prepared)

    with torch.no_grad():
        floats, trained = (net(torch.from_numpy(test)).argmax(1).numpy() for net in (module, prepared))
    deployed = model.run({"input": test})["output"].argmax(1)
    top1 = [float(np.mean(found == answers)) for found in (floats, trained, deployed)]
    print(f"float {top1[0]:.2%}, trained in two bits {top1[1]:.2%}, its file {top1[2]:.2%}")
    print(f"same answer in the file on {np.mean(trained == deployed):.2%}")
    return top1[0], top1[1], top1[2]


if __name__ == "__main__":
    main()
