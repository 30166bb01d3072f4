"""Keras on TensorFlow: the published example, https://keras.io/examples/vision/mnist_convnet/.

    bench/.keras/bin/python bench/contenders/keras_fit.py IMAGES EPOCHS

Runs in an environment of its own and imports nothing from this project.
"""

import json
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import keras
import numpy as np
from keras import layers


class Reporter(keras.callbacks.Callback):
    """Prints a line after each epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        """Start the clock."""
        self.started = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        """Keras calls this after the validation pass."""
        seconds, accuracy = time.perf_counter() - self.started, float(logs["val_accuracy"])
        print(json.dumps({"seconds": seconds, "validation_accuracy": accuracy}), flush=True)


def main():
    """Fit the network to the images of the file that the first argument names."""
    data = np.load(sys.argv[1])
    images = {split: data[f"{split}_images"].astype("float32") / 255 for split in ("train", "validation")}
    labels = {split: keras.utils.to_categorical(data[f"{split}_labels"], 10) for split in ("train", "validation")}
    model = keras.Sequential(
        [
            keras.Input(shape=(28, 28, 1)),
            layers.Conv2D(32, kernel_size=(3, 3), activation="relu"),
            layers.MaxPooling2D(pool_size=(2, 2)),
            layers.Conv2D(64, kernel_size=(3, 3), activation="relu"),
            layers.MaxPooling2D(pool_size=(2, 2)),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(10, activation="softmax"),
        ]
    )
    assert model.count_params() == 34_826
    model.compile(loss="categorical_crossentropy", optimizer="adam", metrics=["accuracy"])
    model.fit(
        images["train"],
        labels["train"],
        batch_size=128,
        epochs=int(sys.argv[2]),
        validation_data=(images["validation"], labels["validation"]),
        callbacks=[Reporter()],
        verbose=0,
    )


if __name__ == "__main__":
    main()
