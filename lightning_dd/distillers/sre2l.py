"""SRe2L: squeeze, recover and relabel (Yin, Xing & Shen 2023, arXiv 2306.13092)."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dd.augment.crops import draw_crops, resample
from lightning_dd.data.images import Split
from lightning_dd.distillers.teacher import TeacherDistiller
from lightning_dd.losses.gradients import attach_gradients, no_float16
from lightning_dd.losses.matching import StatisticsDistance, batch_norm_layers
from lightning_dd.models.factory import Architectures
from lightning_dd.models.interface import Network
from lightning_dd.students.recipe import warmup_cosine
from lightning_dd.synthetic.labels import Labels
from lightning_dd.synthetic.parameterisation import SyntheticSet
from lightning_dd.utils.errors import UserError, check_range, unknown_name

_CLASSES = 100
"""Classes in a recovery group at most, as in the paper's code."""
LOGITS_FROM = ("each", "primary")
_ROWS = 512
"""Images in one forward pass of the teacher."""


class Windows(NamedTuple):
    """What each of G recovery groups shows the teacher in one step: one window for all images of a group."""

    crops: Tensor
    """``(G, 4)``: left, top, width, height as shares of the sides."""
    flips: Tensor
    """``(G,)`` bool."""
    shifts: Tensor
    """``(G, 2)`` int64: pixels down and to the right, rolled around the border."""


class Voter(NamedTuple):
    """A teacher that looks in one step, and what its two terms weigh."""

    network: Network
    fit: float
    statistics: float


class SRe2L(TeacherDistiller):
    """Squeeze the data into a teacher, recover images from it, and relabel them with its answers.

    An outer step is one recovery iteration. The images are recovered in groups of one image per class (at most 100
    classes), each as a batch of its own: cross-entropy of the teacher, plus the distance of the batch's statistics
    from those the teacher's batch normalisation remembers. The loss is the sum over groups, and Adam acts on each pixel
    alone, so that groups do not touch each other; MetaDD may couple them.

    A committee of teachers (several architectures of ``teacher``) takes turns, or several of it vote in each step. Two
    that do, over images that start from patches, are CV-DD (Cui et al. 2025, arXiv 2501.07575), but that its two are
    drawn once for all steps of a group. Statistics of convolutions (G-VBSM) are not compared.

    After each step images are clipped to pixels in [0, 1]; for whitened data they are un-whitened, clipped and
    whitened again. Crops and rolls act on the images as the teacher sees them. Latents of a generator are not clipped.

    Args:
        architecture: of the students.
        labels: ``soft``, or ``hard``.
        init: ``noise``, ``real`` or ``patches``, as for every distiller.
        lr: Adam's learning rate, decayed by a cosine to 0 over the run.
        bn_weight: weight of the statistics' distance. Deep teachers need a smaller one: the sum has more layers.
        first_bn_weight: of the first layer in that distance.
        min_scale: smallest area of the random crop as a share of the image's; 1 for none.
        jitter: largest roll in pixels, down and to the right, as in the paper's code; a pair is smallest and largest.
        flip: mirror half of the windows, where the data may be mirrored.
        voters: teachers of the committee that look in a step, drawn anew each time by their weights. Each one's loss
            counts by its accuracy (:meth:`~lightning_dd.pretrained.Committee.voters`).
        logits_from: ``each`` voter has a cross-entropy; with ``primary`` that of the committee's main teacher is the
            only one, and the statistics are those of voters drawn from the others (after PRISM, Moser et al. 2025,
            arXiv 2511.09905).
        stages: equal parts of the run, for what follows. Four with ``residual: 0.5`` and a start from patches are FADRM
            (Cui et al. 2025, arXiv 2506.24125), on ImageNet with ``coarse: 0.9``.
        residual: share of itself that an image keeps when a stage begins, from the second on; the rest is the real one
            that it started from. Adam begins anew with it. 1 changes nothing.
        coarse: side that images are shown to the teachers in, as a share of the full one, in the last stage but one and
            in every other before it; a step then takes less time. Teachers must take any size.
        **kwargs: see :class:`TeacherDistiller`. The teacher must have batch normalisation.

    Raises:
        UserError: (also in ``setup``) the teacher has no batch normalisation.
    """

    label_kinds: ClassVar[tuple[str, ...]] = ("hard",)

    def __init__(
        self,
        architecture: Architectures = "torchvision/resnet18",
        labels: str | Labels = "soft",
        init: str = "noise",
        lr: float = 0.25,
        bn_weight: float = 0.01,
        first_bn_weight: float = 10.0,
        min_scale: float = 0.08,
        jitter: int | tuple[int, int] = 4,
        flip: bool = True,
        voters: int = 1,
        logits_from: str = "each",
        stages: int = 1,
        residual: float = 1.0,
        coarse: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(architecture=architecture, labels=labels, init=init, lr=lr, **kwargs)
        low, high = (0, jitter) if isinstance(jitter, int) else jitter
        if low > high:
            raise UserError(f"jitter must be at least 0, or a pair of the smallest and the largest roll, got {jitter}")
        check_range("at least 0", bn_weight=bn_weight, first_bn_weight=first_bn_weight)
        check_range("in (0, 1]", min_scale=min_scale)
        if logits_from not in LOGITS_FROM:
            raise unknown_name("logits_from", logits_from, LOGITS_FROM)
        others = len(self.teacher.mixture(architecture).names) - (logits_from == "primary")
        if not 1 <= voters <= others:
            asked = "beside its main one" if logits_from == "primary" else "in all"
            raise UserError(f"voters must be from 1 to the number of teachers {asked}, {others}, got {voters}")
        self.bn_weight, self.first_bn_weight = bn_weight, first_bn_weight
        self.min_scale, self.jitter, self.flip = min_scale, (low, high), flip
        self.voters, self.logits_from = voters, logits_from
        check_range("at least 1", stages=stages)
        check_range("in (0, 1]", residual=residual, coarse=coarse)
        if stages == 1 and (residual < 1 or coarse < 1):
            raise UserError("residual and coarse are of runs in several stages: set stages to 2 or more")
        if residual < 1 and init == "noise":
            raise UserError("residual mixes in the real images of the start: init must be real or patches, not noise")
        self.stages, self.residual, self.coarse = stages, residual, coarse

    def initialise(self, train: Split) -> None:
        """Refuse a teacher of no use before it is trained; then start from noise, or what is asked for."""
        for teacher in self.teacher.mixture(self.architectures).names:
            network = self.build_network(0, teacher)
            if not batch_norm_layers(network):
                raise UserError(
                    f"SRe2L recovers images from batch statistics, and its teacher '{teacher}' keeps none: choose one "
                    "with batch normalisation, as convnet:norm=batch or torchvision/resnet18"
                )
            if self.coarse < 1:
                self._refuse_fixed_size(network, teacher)
        super().initialise(train)

    def coarser(self, images: Tensor) -> Tensor:
        """Return images ``(N, C, H, W)`` of the sides of coarse stages."""
        sides = [max(1, round(self.coarse * side)) for side in images.shape[2:]]
        return F.interpolate(images, sides, mode="bilinear", antialias=True)

    @property
    def stage(self) -> tuple[int, bool]:
        """The current outer step's stage, counted from 0, and whether it is the stage's first step."""
        step, length = self.trainer.global_step, max(1, self.trainer.max_steps // self.stages)
        stage = min(step // length, self.stages - 1)
        return stage, step == stage * length

    def on_train_batch_start(self, batch: int, batch_idx: int) -> None:
        """Mix the start into the images where a stage begins."""
        stage, first = self.stage
        if self.residual == 1 or not first or stage == 0:
            return
        began = SyntheticSet(self.parameterisation[0].again(), self.ipc, self.label_kind, self.task).parameterisation
        self.start(began, self.task.train)
        with torch.no_grad():
            for own, real in zip(self.synthetic.parameterisation.parameters(), began.parameters(), strict=True):
                if own.requires_grad:
                    own.lerp_(real.to(own.device), 1 - self.residual)
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()

    def outer_terms(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the sum over groups of cross-entropy and statistics; its gradient is gathered pass by pass."""
        windows, voters = self.draw_windows(), self.draw_voters()
        coarse = self.coarse < 1 and (self.stages - self.stage[0]) % 2 == 0
        gathered, losses, start = torch.zeros_like(images), [], 0
        for block in recovery_groups(self.facts.num_classes, self.shown_ipc):
            for rows in torch.split(block, max(1, _ROWS // block.shape[1])):
                part = Windows(*(drawn[start : start + len(rows)] for drawn in windows))
                start += len(rows)
                index = rows.flatten().to(images.device)
                for voter in voters:
                    pixels = images.detach()[index].requires_grad_()
                    with no_float16(images.device.type):
                        seen = self.coarser(pixels) if coarse else pixels
                        fit, distance = self.recovery_loss(seen, labels.detach()[index], part, voter.network)
                    weighted = (voter.fit, fit), (voter.statistics, self.bn_weight * distance)
                    loss = torch.stack([weight * term for weight, term in weighted if weight]).sum()
                    gathered[index] += torch.autograd.grad(loss, pixels)[0]
                    watched = voter.fit * fit.detach(), voter.statistics * distance.detach(), loss.detach()
                    losses.append(torch.stack(watched))
        fit, distance, total = torch.stack(losses).sum(0)
        self.watch(**{"recovery/cross_entropy": fit, "recovery/statistics": distance})
        return {"recovery": attach_gradients(total, [images], [gathered])}

    def draw_voters(self) -> list[Voter]:
        """Draw the teachers that look in this step."""
        if self.voters == 1 and self.logits_from == "each":
            return [Voter(self.network, 1.0, 1.0)]
        committee, primary = self.committee(), self.logits_from == "primary"
        drawn = committee.voters(self.voters, self.step_generator("teacher"), main=not primary)
        if primary:
            return [Voter(committee.main, 1.0, 0.0), *(Voter(network, 0.0, share) for network, share in drawn)]
        return [Voter(network, share, share) for network, share in drawn]

    def recovery_loss(
        self, images: Tensor, labels: Tensor, windows: Windows, teacher: Network
    ) -> tuple[Tensor, Tensor]:
        """Return a teacher's cross-entropy and its statistics' distance, each summed over G groups.

        Args:
            images: ``(G * size, C, H, W)``, group by group.
            labels: ``(G * size, num_classes)`` one-hot.
            windows: of the G groups.
            teacher: in inference mode.
        """
        groups = len(windows.crops)
        size = len(images) // groups
        crops, flips = (drawn.repeat_interleave(size, 0).to(images.device) for drawn in windows[:2])
        parts = torch.split(resample(images, crops, flips), size)
        shown = [part.roll(tuple(shift), (2, 3)) for part, shift in zip(parts, windows.shifts.tolist(), strict=True)]
        distance = StatisticsDistance(groups, self.first_bn_weight)
        with distance.watch(teacher):
            logits = teacher(torch.cat(shown).contiguous(memory_format=torch.channels_last))
        return groups * F.cross_entropy(logits.float(), labels), distance.total()

    def draw_windows(self) -> Windows:
        """Draw this step's windows, one of every group."""
        groups = self.shown_ipc * len(recovery_groups(self.facts.num_classes, self.shown_ipc))
        generator = self.step_generator("windows")
        mirrors = 0.5 if self.flip and self.facts.mirror else 0.0
        low, high = self.jitter
        return Windows(
            crops=draw_crops(groups, self.facts.image_shape[1:], self.min_scale, generator),
            flips=torch.rand(groups, generator=generator) < mirrors,
            shifts=torch.randint(low, high + 1, (groups, 2), generator=generator),
        )

    def configure_optimizers(self) -> Any:
        """Return Adam with betas 0.5 and 0.9, and a cosine to 0 over the run."""
        optimizer = torch.optim.Adam(self.synthetic.parameter_groups(self.lr), betas=(0.5, 0.9))
        steps = max(1, self.trainer.max_steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and bring the images back to what pixels in [0, 1] can be."""
        super().optimizer_step(*args, **kwargs)
        self.synthetic.parameterisation.clip(self.task.preprocessing)

    def _refuse_fixed_size(self, network: Network, teacher: str) -> None:
        channels, *sides = self.facts.image_shape
        try:
            network.eval()(self.coarser(torch.zeros(1, channels, *sides)))
        except RuntimeError:
            raise UserError(
                f"coarse={self.coarse} shows teachers smaller images, and '{teacher}' takes none but those of {sides} "
                "pixels: choose one that pools its whole last map, as torchvision/resnet18"
            ) from None


def recovery_groups(num_classes: int, ipc: int, largest: int = _CLASSES) -> list[Tensor]:
    """Return the rows of the recovery groups, block by block of classes: each ``(ipc, classes of the block)``.

    Example:
        >>> recovery_groups(3, 2)
        [tensor([[0, 2, 4],
                [1, 3, 5]])]
    """
    blocks = torch.arange(num_classes).chunk(-(-num_classes // largest))
    return [torch.arange(ipc)[:, None] + ipc * block for block in blocks]
