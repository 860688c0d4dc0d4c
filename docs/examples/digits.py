"""An image classifier on scikit-learn's digits: what it takes to train something of your own.

python docs/examples/digits.py
torchrun --standalone --nproc-per-node 2 docs/examples/digits.py trainer.hidden=128 precision=bf16
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from strategies.base import Batch, LossTerms
from trainer import Trainer, run
from trainer.data import Data


@dataclass(kw_only=True)
class DigitsTrainer(Trainer):
    hidden: int = 64
    dropout: float = 0.1

    def make_model(self):
        return nn.Sequential(
            nn.Linear(64, self.hidden), nn.ReLU(), nn.Dropout(self.dropout), nn.Linear(self.hidden, 10)
        )

    def make_data(self):
        pixels, digits = load_digits(return_X_y=True)
        images = torch.tensor(pixels / 16, dtype=torch.float32)
        samples = list(zip(images, torch.tensor(digits), strict=True))
        return Data(train=samples[300:], validation=samples[:300], description="digits: 1,497 + 300 images of 8 x 8")

    def collate(self, samples, seeds):
        images, digits = zip(*samples, strict=True)
        return Batch(inputs={"input": torch.stack(images)}, labels=torch.stack(digits), num_targets=len(digits))

    def loss(self, outputs, batch):
        return LossTerms(loss=F.cross_entropy(outputs, batch.labels, reduction="sum"))

    def metrics(self, outputs, batch):
        counted = batch.labels >= 0  # ranks that ran out of samples are given batches without labels
        right = (outputs.argmax(-1) == batch.labels) & counted
        return {"accuracy": (right.sum(), counted.sum())}


if __name__ == "__main__":
    run(DigitsTrainer, "trainer.max_epochs=10", "trainer.global_batch=32", "trainer.micro_batch=16",
        "trainer.eval_every=100", "optimizer.lr=3e-3", "hooks=[]", "run.dir=runs/digits")  # fmt: skip
