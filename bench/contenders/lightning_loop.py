"""PyTorch Lightning's Trainer on the same data set and network."""

import sys
import time

import pytorch_lightning as lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.contenders import reporting, usual

Batch = tuple[Tensor, Tensor]


class Convnet(lightning.LightningModule):
    """The published network as a LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.model: nn.Sequential = usual.network()

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
        return usual.optimizer(self.model.parameters())


class Reporter(lightning.Callback):
    """A line an epoch."""

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Lightning calls this after the validation pass."""
        reporting.report(
            seconds=time.perf_counter() - self.started,
            validation_accuracy=float(trainer.callback_metrics["accuracy"]),
        )


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
    trainer.fit(Convnet(), *usual.loaders(workers=int(sys.argv[3])))
    reporting.report_memory()


if __name__ == "__main__":
    main()
