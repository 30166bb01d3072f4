"""This project's training of the published network.

    python -m bench.contenders.convtrack_fit EPOCHS COPIES [parameter=value ...]

COPIES is how often the training images are repeated.
"""

import json
import sys

from bench import recipes
from pipeline import recipe
from pipeline.data.splits import TRAIN, VALIDATION, LabelledImages, read_dataset, read_split


def main() -> None:
    """Fit the network to the prepared images; a JSON line for each epoch."""
    epochs, copies, *words = sys.argv[1:]
    overrides = recipes.from_words(words) | {"train.epochs": int(epochs)}
    params = recipes.published().changed(overrides)
    recipe.device_for(params)
    dataset = read_dataset()
    train, validation = read_split(dataset, TRAIN), read_split(dataset, VALIDATION)
    copies_of = LabelledImages(train.images.repeat(int(copies), 1, 1, 1), train.labels.repeat(int(copies)))
    for epoch in recipe.fit(recipe.build(params, dataset), copies_of, validation, params):
        figures = {"seconds": epoch.seconds, "validation_accuracy": epoch.validation_accuracy}
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
