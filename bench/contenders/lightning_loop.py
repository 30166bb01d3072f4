"""PyTorch Lightning's Trainer on the same data set and network."""

import json
import sys
import time

import pytorch_lightning as lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.contenders import dataloader_loop

Batch = tuple[Tensor, Tensor]


class Convnet(lightning.LightningModule):
    """The published network as a LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.model: nn.Sequential = dataloader_loop.network()

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """The loss of a batch."""
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: Batch, _: int) -> None:
        """Loss and accuracy, averaged by Lightning."""
        logits = self.model(batch[0])
        self.log("loss", F.cross_entropy(logits, batch[1]))
        self.log("accuracy", (logits.argmax(dim=1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam as Keras has it."""
        return dataloader_loop.optimizer(self.model.parameters())


class Reporter(lightning.Callback):
    """Prints a line after each epoch."""

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Lightning calls this after the validation pass."""
        seconds, accuracy = time.perf_counter() - self.started, float(trainer.callback_metrics["accuracy"])
        print(json.dumps({"seconds": seconds, "validation_accuracy": accuracy}), flush=True)


def main() -> None:
    """Fit the network to the images of the file that the first argument names."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=int(sys.argv[2]),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[Reporter()],
    )
    trainer.fit(Convnet(), *dataloader_loop.loaders(workers=int(sys.argv[3])))


if __name__ == "__main__":
    main()
