"""MTT: matching training trajectories (Cazenavette et al. 2022, arXiv 2203.11932), and DATM (Guo et al. 2024)."""

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from lightning_dd.augment.siamese import apply, siamese
from lightning_dd.data.images import Split
from lightning_dd.data.sampling import ShuffledStream
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distillers.base import Distiller
from lightning_dd.losses import trajectory
from lightning_dd.losses.labels import student_loss
from lightning_dd.losses.trajectory import InnerStep, Stretch, functional_loss
from lightning_dd.models.factory import Architectures
from lightning_dd.models.interface import Network
from lightning_dd.models.pool import rest
from lightning_dd.pretrained.experts import ExpertRecipe, Trajectories, expert_file
from lightning_dd.synthetic.labels import Labels
from lightning_dd.utils.errors import UserError, check_range

LEAST_STEP_SIZE = 0.01
"""The learned step size is kept at or above this share of its first value: below 0 it would climb the loss."""

LOGITS_MOMENTUM = 0.9
"""DATM's, of the SGD that learns labels."""
_ROWS = 1024
"""Images that an expert is asked about at a time."""


class MTT(Distiller):
    """Distil by training from an expert's parameters to where the expert arrived on real data.

    Experts are networks trained on the real data before the first outer step; their parameters after every epoch are
    on disk, cached and reused. An outer step draws an expert and a start epoch, takes ``syn_steps`` SGD steps on the
    synthetic set from there, and minimises the squared distance to the expert ``expert_epochs`` later, relative to how
    far the expert moved. Images, learned labels and the step size get the gradient through all steps. The defaults are
    the paper's for CIFAR-10 at one image per class; it runs 5,000 outer steps.

    Experts of hard labels and logits are trained with cross-entropy, those of learned and centred labels by regression
    on centred one-hot vectors. Inner steps run in inference mode (no dropout).

    DATM (Guo et al. 2024, arXiv 2310.05773) is ``labels: logits`` with a window of start epochs that suits the size of
    the set: later epochs teach harder patterns, which only a large set can hold. It takes FTD's flat experts and leaves
    out outer steps whose loss is above 1; we have plain SGD's experts, and leave out none.

    Args:
        architecture: the network of experts and inner steps, without batch normalisation; of several one is drawn for
            every outer step.
        labels: ``hard``, ``centred``, ``learned``, or ``logits``, which are learned too, with the cross-entropy of
            their softmax; they start from the mean answer of the experts that get an image right, and images from real
            ones that an expert gets right. A file calls them ``soft``.
        lr: learning rate of the images (SGD with momentum 0.5).
        label_lr: learning rate of learned labels (SGD with momentum 0.5, 0.9 for logits).
        syn_steps: inner steps N on synthetic batches.
        expert_epochs: epochs M of the expert that they are to reproduce.
        max_start_epoch: start epochs are drawn from ``min_start_epoch`` to ``max_start_epoch - 1``.
        min_start_epoch: likewise.
        early_max_start_epoch: ``max_start_epoch`` of the first outer step, from where it grows to its own value;
            ``None`` is the same from the first step on.
        window_growth: outer steps that this takes.
        step_size: first value of the inner steps' learned learning rate alpha; regression labels want a smaller one
            than cross-entropy (0.005 where that has 0.02).
        step_size_lr: learning rate of alpha itself, which is kept above 1 % of its first value.
        batch_syn: synthetic images per inner step; ``None`` takes all.
        experts: number of experts of every architecture.
        trajectory_epochs: epochs every expert is trained for.
        expert_lr: learning rate of the experts' SGD.
        expert_batch_size: real images per step of an expert.
        expert_seed: of the experts; kept apart from the run's seed, so that seeds of a run share them.
        augment: operations of :mod:`lightning_dd.augment.siamese` for experts and inner steps, drawn anew for every
            step; ``auto`` takes the data set's, ``none`` none.
        constant_memory: hold the graph of one inner step instead of all N. The gradient is equal; it costs up to a
            quarter more time where few images are distilled.
        **kwargs: see :class:`Distiller`.
    """

    label_kinds: ClassVar[tuple[str, ...]] = ("hard", "centred", "learned", "logits")
    protocol: ClassVar[str] = "mtt"

    def __init__(
        self,
        architecture: Architectures = "convnet",
        labels: str | Labels = "hard",
        lr: float = 100.0,
        label_lr: float = 1.0,
        syn_steps: int = 50,
        expert_epochs: int = 2,
        max_start_epoch: int = 2,
        min_start_epoch: int = 0,
        early_max_start_epoch: int | None = None,
        window_growth: int = 1000,
        step_size: float = 0.01,
        step_size_lr: float = 1e-7,
        batch_syn: int | None = None,
        experts: int = 100,
        trajectory_epochs: int = 50,
        expert_lr: float = 0.01,
        expert_batch_size: int = 256,
        expert_seed: int = 0,
        augment: str = "auto",
        constant_memory: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(architecture=architecture, labels=labels, lr=lr, **kwargs)
        check_range("at least 1", syn_steps=syn_steps, expert_epochs=expert_epochs, max_start_epoch=max_start_epoch)
        check_range("at least 1", experts=experts, batch_syn=batch_syn, window_growth=window_growth)
        check_range("positive", step_size=step_size)
        check_range("at least 0", step_size_lr=step_size_lr, label_lr=label_lr)
        first_max = max_start_epoch if early_max_start_epoch is None else early_max_start_epoch
        if not 0 <= min_start_epoch < first_max <= max_start_epoch:
            raise UserError(
                "start epochs need 0 <= min_start_epoch < early_max_start_epoch (if any) <= max_start_epoch, got "
                f"{min_start_epoch}, {early_max_start_epoch} and {max_start_epoch}"
            )
        last = max_start_epoch - 1 + expert_epochs
        if trajectory_epochs < last:
            raise UserError(
                f"trajectory_epochs must be at least max_start_epoch - 1 + expert_epochs = {last}, "
                f"got {trajectory_epochs}"
            )
        self.augment = augment
        self.expert_recipe = ExpertRecipe(
            augment=augment,
            epochs=trajectory_epochs,
            lr=expert_lr,
            batch_size=expert_batch_size,
            labels="hard" if self.label_kind in ("hard", "soft") else "centred",
        )
        self.experts, self.expert_seed = experts, expert_seed
        self.syn_steps, self.expert_epochs, self.window_growth = syn_steps, expert_epochs, window_growth
        self.start_epochs = (min_start_epoch, first_max, max_start_epoch)
        self.batch_syn, self.label_lr = batch_syn, label_lr
        self.step_size = nn.Parameter(torch.tensor(step_size))
        self.step_size_lr, self.least_step_size = step_size_lr, LEAST_STEP_SIZE * step_size
        self.match = trajectory.constant_memory if constant_memory else trajectory.unrolled
        self._networks: dict[str, Network] = {}  # a plain dictionary: registered ones would enter the checkpoint

    def setup(self, stage: str) -> None:
        """Build the networks of the inner steps as well, and train or find the experts."""
        super().setup(stage)
        if stage == "fit":
            self._find_experts()

    def initialise(self, train: Split) -> None:
        """Start logits and their images from what experts say of real images, others as usual."""
        if self.label_kind != "soft":
            super().initialise(train)
            return
        self._find_experts()
        super().initialise(self._known(train))
        images, classes = self.synthetic.images.detach(), self.synthetic.classes.cpu()
        answers = torch.stack([self._answers(expert, images) for expert in range(self.experts)])
        right = (answers.argmax(2) == classes).unsqueeze(2)
        votes = torch.where(right.any(0), right, True).float()  # where nobody is right, all have a vote
        self.synthetic.labels.data.copy_((votes * answers).sum(0) / votes.sum(0))

    def max_start_epoch_at(self, outer_step: int) -> int:
        """Return the end of the window of start epochs at an outer step, counted from 0."""
        _, first, last = self.start_epochs
        return min(last, first + (last - first) * outer_step // self.window_growth)

    def _find_experts(self) -> None:
        """Train or find the experts, and build the networks of the inner steps."""
        if self._networks:
            return
        self._augmentation = siamese(self.augment, self.facts.mirror, shared=False)
        self.expert_recipe = replace(self.expert_recipe, augment=self._augmentation.strategy)
        self._trajectories: dict[str, Trajectories] = {}
        for name in self.networks.names:
            settings = (name, self.task, self.expert_recipe, self.expert_seed)
            files = [expert_file(*settings, index) for index in range(self.experts)]
            self._trajectories[name] = Trajectories(files, self.task.device)
            self._networks[name] = self.build_network(self.expert_seed, name).to(self.task.device)
            rest(self._networks[name])
        self._current = self.architecture

    def outer_terms(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The trajectory loss from a drawn start epoch of a drawn expert."""
        generator = self.step_generator("trajectory")
        self._current = self.networks.draw(generator)
        window = self.start_epochs[0], self.max_start_epoch_at(self.trainer.global_step)
        expert, epoch = (int(torch.randint(*ends, (), generator=generator)) for ends in ((0, self.experts), window))
        trajectories = self._trajectories[self._current]
        start, target = (trajectories.snapshot(expert, at) for at in (epoch, epoch + self.expert_epochs))
        vector_to_parameters(start, self.network.parameters())
        steps = self._inner_steps(len(images), generator)
        loss = functional_loss(self.network, partial(student_loss, label_kind=self.label_kind))
        start_epoch = torch.tensor(float(epoch))
        self.watch(**{"trajectory/step_size": self.step_size.clone(), "trajectory/start_epoch": start_epoch})
        return {"trajectory": self.match(Stretch(loss, start, target, steps), images, labels, self.step_size)}

    def configure_optimizers(self) -> Any:
        """Return SGD with momentum 0.5, with a learning rate each for images, labels and step size."""
        own = {"params": [self.step_size], "lr": self.step_size_lr}
        groups = self.synthetic.parameter_groups(self.lr, self.label_lr)
        if self.label_kind == "soft":
            groups[-1]["momentum"] = LOGITS_MOMENTUM
        return torch.optim.SGD([*groups, own], lr=self.lr, momentum=0.5)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Keep the step size positive."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.step_size.clamp_(min=self.least_step_size)

    @property
    def network(self) -> Network:
        """The network at the current expert's start epoch, in inference mode."""
        if not self._networks:
            raise RuntimeError("the network exists only while fitting")
        return self._networks[self._current]

    def distilled_set(self, *, views: bool = True, **training: Any) -> DistilledSet:
        """Return the current synthetic set with the learned step size beside it."""
        return super().distilled_set(views=views, step_size=float(self.step_size.detach()), **training)

    @torch.no_grad()
    def _answers(self, expert: int, images: Tensor) -> Tensor:
        """Return the logits of a trained expert of the main architecture, on the CPU."""
        network, trajectories = self._networks[self.architecture], self._trajectories[self.architecture]
        vector_to_parameters(trajectories.snapshot(expert, self.expert_recipe.epochs), network.parameters())
        parts = [network(part.to(self.task.device)).cpu() for part in torch.split(images, _ROWS)]
        return torch.cat(parts)

    def _known(self, train: Split) -> Split:
        """Return the real images that some expert gets right, and all of classes of which there are too few.

        One expert is asked after the other until there are enough.
        """
        labels, ipc = train.labels.cpu(), len(self.synthetic) // self.facts.num_classes
        right = torch.zeros(len(labels), dtype=torch.bool)
        for expert in range(self.experts):
            for rows in torch.split(torch.arange(len(labels)), _ROWS):
                right[rows] |= self._answers(expert, train.take(rows).images).argmax(1) == labels[rows]
            few = labels[right].bincount(minlength=self.facts.num_classes) < ipc
            if not few.any():
                break
        return train.only(right | few[labels])

    def _inner_steps(self, rows: int, generator: torch.Generator) -> list[InnerStep]:
        """Draw batches, in passes over random orders of the set, and an augmentation for each."""
        order = ShuffledStream(rows, self.batch_syn or rows, generator)
        batches = torch.stack([order.next() for _ in range(self.syn_steps)]).to(self.device)
        return [InnerStep(batch, partial(apply, draw=self._augmentation.draw(generator))) for batch in batches]
