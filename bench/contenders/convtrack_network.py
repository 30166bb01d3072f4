"""This project's training of a network of bench.networks.

python -m bench.contenders.convtrack_network NETWORK EPOCHS
"""

import json
import sys
import time

import torch

from bench.networks import NETWORKS
from pipeline import recipe
from pipeline.model import training
from pipeline.model.cnn import CNN, Architecture
from pipeline.params import Params


def main() -> None:
    """Train; a JSON line for each epoch."""
    given = NETWORKS[sys.argv[1]]
    images, labels = given.images()
    training.set_up("cpu", None, "float32")
    names = tuple(map(str, range(given.classes)))
    layers = given.model.model_dump() | {"filters": given.model.filter_counts()}
    cnn = CNN(Architecture(given.image_shape, names, **layers), torch.Generator().manual_seed(0))
    settings = recipe.settings(Params().changed({"train.epochs": int(sys.argv[2])}))
    one = images[:1], labels[:1]  # the plain loop has no validation
    epochs = training.fit(cnn, (images, labels), one, settings, generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    for _ in epochs:
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)
        started = time.perf_counter()


if __name__ == "__main__":
    main()
