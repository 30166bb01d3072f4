"""Keras on TensorFlow: the published example, https://keras.io/examples/vision/mnist_convnet/.

Runs in an environment of its own and imports nothing of this project.
"""

import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import keras
import numpy as np
from keras import layers
from reporting import report, report_memory


class Reporter(keras.callbacks.Callback):
    """A line an epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        """Start the clock."""
        self.started = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        """Keras calls this after the validation pass."""
        report(seconds=time.perf_counter() - self.started, validation_accuracy=float(logs["val_accuracy"]))


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
    report_memory()


if __name__ == "__main__":
    main()
