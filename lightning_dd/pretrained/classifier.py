"""An ordinary classifier of the real data, as a LightningModule."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dd.augment.frepo import Augmentation
from lightning_dd.data.images import Split
from lightning_dd.data.sampling import ShuffledStream, next_batch
from lightning_dd.models.interface import Network
from lightning_dd.students.recipe import warmup_cosine
from lightning_dd.utils.scoring import ScoredModule
from lightning_dd.utils.seeding import derive_seed, make_generator, seeded


class RealClassifier(ScoredModule):
    """Train a network on real images with cross-entropy, AdamW, warm-up and cosine; it draws its own batches.

    Args:
        network: what is trained.
        train: normalised images and their classes.
        lr: peak learning rate.
        weight_decay: of AdamW.
        batch_size: images per step.
        augment: operations joined by ``_``.
        seed: of batches, augmentation and dropout.
    """

    def __init__(
        self,
        network: Network,
        train: Split,
        lr: float,
        weight_decay: float,
        batch_size: int,
        augment: str,
        seed: int,
    ) -> None:
        super().__init__()
        self.network = network
        self.lr, self.weight_decay, self.seed = lr, weight_decay, seed
        self.augmentation = Augmentation(augment)
        self._train = train  # a tuple: not a buffer, and not in the checkpoint
        order = make_generator(seed, "order", device=train.labels.device)
        self._stream = ShuffledStream(len(train.labels), batch_size, order)
        self.make_accuracy(network.num_classes)

    def scored_logits(self, images: Tensor) -> Tensor:
        """Return the network's logits."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        """One step on a batch of its own; ``batch`` only counts."""
        images, labels = next_batch(self._train, self._stream, self.device)
        images = self.augmentation(images, make_generator(self.seed, "augment", batch_idx))
        with seeded(derive_seed(self.seed, "dropout", batch_idx)):
            loss = F.cross_entropy(self.network(images).float(), labels)
        self.log("classifier/loss", loss.detach(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return AdamW with a warm-up of a tenth of the run and a cosine to 0."""
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.lr, weight_decay=self.weight_decay, fused=True)
        steps = max(1, self.trainer.max_steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, steps // 10))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
