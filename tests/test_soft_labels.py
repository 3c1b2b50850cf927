"""Soft labels with stored views: what the teacher saw is what the student sees, in the file and in every trainer."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from helpers import TinyData, committee_of, make_distilled, tiny_trainer
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_dd.augment.crops import draw_crops, resample
from lightning_dd.data.preprocess import Preprocessing
from lightning_dd.distilled import DistilledData
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.distilled.views import SoftViews, SyntheticBatches, ViewStyle, draw_views, shuffle_tiles
from lightning_dd.distillers import Random
from lightning_dd.distillers.base import Probe
from lightning_dd.evaluators.matrix import random_real
from lightning_dd.losses.labels import student_loss
from lightning_dd.models import build_network
from lightning_dd.models.pool import rest
from lightning_dd.pretrained.classifier import Teacher
from lightning_dd.pretrained.task import Task
from lightning_dd.students import Student
from lightning_dd.students.loop import train_student
from lightning_dd.students.recipe import Recipe
from lightning_dd.synthetic import Labels, TeacherLabels
from lightning_dd.synthetic.labels import labelled_views, relabel
from lightning_dd.utils.errors import UserError

TEACHER = "convnet:width=4,depth=2,norm=batch"
STUDENT = "conv:width=4,depth=2,norm=none"
EPOCHS = 7


class Witness:
    """A teacher that keeps every image it is shown."""

    def __init__(self, network):
        self.network, self.num_classes, self.seen = network, network.num_classes, []
        self.parameters = network.parameters

    def __call__(self, images):
        self.seen.append(images.clone())
        return self.network(images)


def teacher():
    network = build_network(TEACHER, 3, (1, 8, 8), seed=0)
    rest(network)
    return network


def images_of(rows=6, side=8):
    return torch.randn(rows, 1, side, side, generator=torch.Generator().manual_seed(0))


def views_of(images, epochs=EPOCHS, network=None, flip=True, style=None):
    drawn = (epochs, style or ViewStyle(0.2), flip, torch.Generator().manual_seed(3), torch.tensor([-2.0]))
    return labelled_views(committee_of(network or teacher()), images, *drawn)


def soft_set(ipc=2, views=True, **changes):
    plain = make_distilled(ipc=ipc, label_kind="hard")
    settings = {
        "labels": committee_of(teacher()).logits(plain.images),
        "label_kind": "soft",
        "temperature": 4.0,
        "views": views_of(plain.images) if views else None,
    }
    return replace(plain, **(settings | changes))


# ---- views -------------------------------------------------------------------------------------------------------


def test_a_replayed_view_is_the_image_the_teacher_saw_bit_for_bit():
    images, witness = images_of(), Witness(teacher())
    views = views_of(images, network=witness)
    seen = torch.cat(witness.seen).view(EPOCHS, len(images), 1, 8, 8)
    assert not torch.equal(seen[0], seen[1])
    for epoch in range(EPOCHS + 2):  # the stored epochs start over
        for rows in (torch.tensor([4]), torch.tensor([5, 0, 2]), torch.arange(6)):
            replayed, logits = views.replay(images, epoch, rows)
            assert torch.equal(replayed, seen[epoch % EPOCHS][rows])
            torch.testing.assert_close(logits, teacher()(replayed), rtol=2e-3, atol=2e-3)
            assert logits.dtype == torch.float32


def test_a_view_is_the_crop_the_mirror_and_the_partners_view_in_the_box():
    images, epoch, size = images_of(), 2, 8
    state = views_of(images).state_dict()
    state["crops"][epoch, 0] = torch.tensor([0.0, 0.0, 0.5, 0.25])  # at a border the edge is repeated
    state["crops"][epoch, 1] = torch.tensor([0.5, 0.25, 0.5, 0.75])  # and so is that of the crop
    views = SoftViews.from_state_dict(state)
    alone = []
    for image, (left, top, width, height), flip in zip(
        images, views.crops[epoch].tolist(), views.flips[epoch].tolist(), strict=True
    ):
        view = torch.empty(size, size)
        for row in range(size):
            for column in range(size):
                place = size - 1 - column if flip else column
                x, y = ((share + side * (index + 0.5) / size) * size - 0.5 for share, side, index in (
                    (left, width, place), (top, height, row)))  # fmt: skip
                x = min(max(x, left * size), (left + width) * size - 1)
                y = min(max(y, top * size), (top + height) * size - 1)
                x0, y0 = int(x), int(y)
                x1, y1 = min(x0 + 1, size - 1), min(y0 + 1, size - 1)
                across, down = x - x0, y - y0
                upper = (1 - across) * image[0, y0, x0] + across * image[0, y0, x1]
                lower = (1 - across) * image[0, y1, x0] + across * image[0, y1, x1]
                view[row, column] = (1 - down) * upper + down * lower
        alone.append(view)
    mixed = [view.clone() for view in alone]
    for row, (left, top, right, bottom) in enumerate(views.pastes[epoch].tolist()):
        partner = int(views.partners[epoch, row])
        mixed[row][top:bottom, left:right] = alone[partner][top:bottom, left:right]
    replayed, _ = views.replay(images, epoch, torch.arange(6))
    torch.testing.assert_close(replayed[:, 0], torch.stack(mixed), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mix", ["cutmix", "none"])
def test_in_train_mode_a_view_is_labelled_by_the_statistics_of_the_batch_students_see_it_in(mix):
    images, network = images_of(), teacher()
    for layer in network.norms:
        layer.running_mean.normal_(), layer.running_var.uniform_(1, 2)
    kept = {name: value.clone() for name, value in network.state_dict().items()}
    style = ViewStyle(0.5, mix=mix, batch_size=4)
    drawn = (3, style, True, torch.Generator().manual_seed(3))
    views = labelled_views(committee_of(network), images, *drawn, as_batches=True)
    assert not network.training
    assert all(torch.equal(kept[name], value) for name, value in network.state_dict().items() if "num_" not in name)
    rows = 0
    for step, (view, logits) in enumerate(SyntheticBatches(images, None, 4, steps=3, seed=0, views=views)):
        epoch = views.order[step].long()
        assert torch.equal(view, views.look(images, step, epoch[:4]))
        trained = copy.deepcopy(network).train()
        torch.testing.assert_close(logits, trained(view), rtol=2e-3, atol=2e-3)
        assert not torch.allclose(logits, network(view), atol=0.05)
        filled = trained(views.look(images, step, epoch[2:]))[2:]  # two rows are left out of this epoch's one batch
        torch.testing.assert_close(views.logits[step, epoch[4:]].float(), filled, rtol=2e-3, atol=2e-3)
        rows += len(view)
    assert rows == 12


def test_views_are_drawn_as_published():
    drawn = draw_views(200, (1, 16, 12), 10, 3, torch.Generator().manual_seed(0), style=ViewStyle(0.25))
    assert float((drawn.crops[..., :2] + drawn.crops[..., 2:]).max()) <= 1 + 1e-5
    assert float(drawn.flips.float().mean()) == pytest.approx(0.5, abs=0.05)
    assert torch.equal(drawn.partners.sort(1).values, torch.arange(10).expand(200, 10).int())
    left, top, right, bottom = drawn.pastes.unbind(2)
    assert (left.min(), top.min(), right.max(), bottom.max()) == (0, 0, 12, 16)
    # Without the cut at the border a box would have half the area on average.
    share = ((right - left) * (bottom - top)).float().mean() / (12 * 16)
    assert 0.25 < float(share) < 0.5
    assert not draw_views(5, (1, 8, 8), 4, 3, torch.Generator(), flip=False).flips.any()
    images = images_of()
    whole = draw_crops(6, (8, 8), 1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(resample(images, whole, torch.zeros(6, dtype=torch.bool)), images)


def test_padded_views_are_crops_of_the_image_in_black_and_mixup_blends_whole_views():
    """As SRe2L's relabel_cifar.py: ``RandomCrop(32, padding=4)``, then mixup with alpha 0.8."""
    images, style = images_of(), ViewStyle(padding=2, mix="mixup")
    views = views_of(images, flip=False, style=style)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), value=-2.0)
    places = (views.crops[0, :, :2] * 8).round().int() + 2
    alone = [image[:, y : y + 8, x : x + 8] for image, (x, y) in zip(padded, places.tolist(), strict=True)]
    share, partners = views.shares[0], views.partners[0].tolist()
    expected = [share[row] * own + (1 - share[row]) * alone[partners[row]] for row, own in enumerate(alone)]
    replayed, _ = views.replay(images, 0, torch.arange(6))
    torch.testing.assert_close(replayed, torch.stack(expected), rtol=1e-4, atol=1e-5)
    many = draw_views(300, (1, 32, 32), 10, 3, torch.Generator().manual_seed(0), ViewStyle(padding=4, mix="mixup"))
    shifts = (many.crops[..., :2] * 32).round()
    assert shifts.unique().tolist() == list(range(-4, 5))
    assert float(many.shares.var()) == pytest.approx(0.25 / 2.6, rel=0.06)  # of Beta(a, a): 1 / (4 (2 a + 1))
    assert not many.pastes.any()


@pytest.mark.parametrize("mix", ["cutmix", "mixup"])
def test_a_batch_is_mixed_with_itself_by_one_box_or_one_share(mix):
    style = ViewStyle(mix=mix, batch_size=4)
    views = draw_views(50, (1, 32, 32), 10, 3, torch.Generator().manual_seed(0), style)
    drawn = views.pastes if mix == "cutmix" else views.shares
    kinds, last = set(), []
    for epoch, order in enumerate(views.order.long()):
        assert order.sort().values.tolist() == list(range(10))
        for batch in order.split(4):
            assert len(drawn[epoch, batch].unique(dim=0)) == 1
            assert set(views.partners[epoch, batch].tolist()) == set(batch.tolist())
            kinds.add(tuple(drawn[epoch, batch[0]].reshape(-1).tolist()))
        last.append(tuple(order.tolist()))
    assert len(kinds) > 100  # of 150 batches
    assert len(set(last)) == 50
    # Students of any seed see these batches: what FKD calls its sampler's seed.
    rows = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 1, 32, 32)
    seen = [logits for _, logits in SyntheticBatches(rows, torch.zeros(10, 3), 4, 6, seed=9, views=_numbered(views))]
    for step, logits in enumerate(seen):
        assert torch.equal(logits[:, 0].long(), views.order[step // 2, 4 * (step % 2) :][:4].long())


def _numbered(views):
    """Let every view's first logit be its row."""
    rows = torch.arange(len(views)).expand(views.epochs, -1)
    return replace(views, logits=rows[:, :, None].expand(-1, -1, 3).half())


def test_views_without_mixture_are_crops_alone():
    views = views_of(images_of(), style=ViewStyle(mix="none"))
    assert not views.pastes.any()
    assert sorted(views.state_dict()) == ["crops", "flips", "logits", "partners", "pastes"]


def test_tiles_are_shuffled_column_by_column_and_row_by_row():
    """As RDED's ShufflePatches: for 2 x 2 tiles four arrangements, each as often as any other."""
    image = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).repeat_interleave(4, 0).repeat_interleave(4, 1)
    views = draw_views(
        400, (1, 8, 8), 1, 3, torch.Generator().manual_seed(0), ViewStyle(1.0, mix="none", tiles=2), False
    )
    shown = views.look(image.view(1, 1, 8, 8), torch.arange(400), torch.zeros(400, dtype=torch.long))
    corners = shown[:, 0, ::4, ::4].flatten(1).int().tolist()
    counts = [corners.count(order) for order in ([0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0])]
    assert sum(counts) == 400
    assert min(counts) > 70
    orders = torch.tensor([[[2, 0, 1], [0, 1, 2]]])
    assert shuffle_tiles(torch.arange(6.0).expand(1, 1, 6, 6), orders)[0, 0, 0].tolist() == [4, 5, 0, 1, 2, 3]
    with pytest.raises(UserError, match=r"labels.tiles=3 do not divide images of \(8, 8\) pixels"):
        draw_views(1, (1, 8, 8), 1, 3, torch.Generator(), ViewStyle(tiles=3))


@pytest.mark.parametrize("style", [ViewStyle(padding=2, mix="mixup"), ViewStyle(0.5, tiles=2)], ids=str)
def test_every_kind_of_view_makes_the_round_trip(style, tmp_path):
    soft = soft_set()
    soft = replace(soft, views=views_of(soft.images, style=style))
    state = DistilledSet.load(soft.save(tmp_path / "set.safetensors")).views.state_dict()
    assert state.keys() == soft.views.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in soft.views.state_dict().items())


def test_views_depend_on_the_generator_alone():
    images = images_of()
    first, again = views_of(images), views_of(images)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    assert labelled_views(committee_of(teacher()), images, 0, ViewStyle(0.2), True, torch.Generator()) is None


# ---- the file ----------------------------------------------------------------------------------------------------


def version_of(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["lightning_dd"])["format_version"]


def test_soft_sets_make_the_round_trip(tmp_path):
    soft = soft_set()
    path = soft.save(tmp_path / "set.safetensors")
    loaded = DistilledSet.load(path)
    assert version_of(path) == 2
    assert (loaded.label_kind, loaded.temperature) == ("soft", 4.0)
    assert torch.equal(loaded.labels, soft.labels)
    for name, value in soft.views.state_dict().items():
        assert torch.equal(loaded.views.state_dict()[name], value)
        assert loaded.views.state_dict()[name].dtype == value.dtype
    plain = DistilledSet.load(soft_set(views=False).save(tmp_path / "plain.safetensors"))
    assert plain.views is None
    assert plain.label_kind == "soft"


@pytest.mark.parametrize("kind", ["learned", "centred", "hard"])
def test_other_sets_are_still_written_for_older_readers(kind, tmp_path):
    path = make_distilled(label_kind=kind).save(tmp_path / "set.safetensors")
    assert version_of(path) == 1
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["lightning_dd"])
    assert "temperature" not in header
    assert not [name for name in load_file(path) if name.startswith("views.")]
    loaded = DistilledSet.load(path)
    assert (loaded.label_kind, loaded.temperature, loaded.views) == (kind, 1.0, None)


def damaged(views, **changes):
    state = {name: value.clone() for name, value in views.state_dict().items()}
    for name, change in changes.items():
        state[name] = change(state[name])
    return state


def put(value, *place):
    def change(tensor):
        tensor[place] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": put(float("nan"), 0, 0, 0)}, "NaN or infinite"),
        ({"crops": put(float("inf"), 0, 0, 0)}, "NaN or infinite"),
        ({"crops": put(1.5, 0, 0, 2)}, "a crop lies outside its image"),
        ({"crops": put(0.0, 0, 0, 3)}, "a crop lies outside its image"),
        ({"partners": put(6, 0, 0)}, "a partner is none of the 6 rows"),
        ({"order": put(6, 0, 0)}, "an order of rows is no permutation"),
        ({"pastes": put(9, 0, 0, 3)}, "a pasted box lies outside the images"),
        ({"flips": lambda flips: flips[:, :5]}, r"flips must be \(7, 6\) torch.bool, got \(7, 5\)"),
        ({"logits": lambda logits: logits[..., :2]}, "2 classes for 6 images and 3 classes"),
        ({"logits": lambda logits: logits.float()}, "torch.float16, got"),
        ({"crops": lambda crops: crops[0]}, "shapes disagree"),
    ],
)
def test_damaged_views_are_refused(changes, message, tmp_path):
    soft = soft_set()
    path = soft.save(tmp_path / "set.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata = {"lightning_dd": file.metadata()["lightning_dd"]}  # as of a file that is made, not damaged
    tensors = load_file(path) | {f"views.{name}": value for name, value in damaged(soft.views, **changes).items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)
    with pytest.raises(UserError, match=message):
        DistilledSet.load(path)


def test_views_that_miss_a_tensor_or_do_not_fit_are_refused(tmp_path):
    soft = soft_set()
    path = soft.save(tmp_path / "set.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata = {"lightning_dd": file.metadata()["lightning_dd"]}
    save_file({name: value for name, value in load_file(path).items() if name != "views.flips"}, path, metadata)
    with pytest.raises(UserError, match="views: expected the tensors crops, flips, logits"):
        DistilledSet.load(path)
    with pytest.raises(UserError, match="views need soft labels, these are hard"):
        replace(soft, label_kind="hard")
    with pytest.raises(UserError, match="views of 6 images and 3 classes for 3 images"):
        replace(soft_set(ipc=1), views=soft.views)
    with pytest.raises(UserError, match="temperature must be positive, got 0"):
        soft_set(temperature=0.0)
    with pytest.raises(UserError, match="unknown label_kind of a distilled set 'smooth'; did you mean 'soft'"):
        replace(soft, label_kind="smooth")


# ---- students ----------------------------------------------------------------------------------------------------


def test_the_soft_loss_is_the_mean_divergence_without_the_square_of_the_temperature():
    generator = torch.Generator().manual_seed(0)
    logits, labels = (torch.randn(5, 3, generator=generator, dtype=torch.float64).float() for _ in range(2))
    temperature = 20.0
    expected = 0.0
    for own, teacher_row in zip(logits.double(), labels.double(), strict=True):
        p, q = ((row / temperature).exp() / (row / temperature).exp().sum() for row in (teacher_row, own))
        expected += float((p * (p.log() - q.log())).sum()) / 5
    assert float(student_loss(logits, labels, "soft", temperature)) == pytest.approx(expected, rel=1e-3)
    assert float(student_loss(labels, labels, "soft", temperature)) == pytest.approx(0, abs=1e-7)
    rows = logits.clone().requires_grad_()
    student_loss(rows, labels, "soft", temperature).backward()
    slope = (torch.softmax(logits / temperature, 1) - torch.softmax(labels / temperature, 1)) / temperature / 5
    torch.testing.assert_close(rows.grad, slope, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("stored", [True, False])
def test_every_pass_over_the_set_takes_its_own_epoch_of_views(stored):
    soft = soft_set()
    soft = soft if stored else replace(soft, views=replace(soft.views, order=None))  # a file of an earlier version
    arguments = (soft.images, soft.labels, 2, 3 * EPOCHS + 3, 0)
    batches = list(SyntheticBatches(*arguments, views=soft.views))
    order = list(SyntheticBatches(torch.arange(6.0).view(6, 1, 1, 1), soft.labels, *arguments[2:]))
    for step, ((images, logits), (rows, _)) in enumerate(zip(batches, order, strict=True)):
        if stored:
            rows = soft.views.order[step // 3 % EPOCHS, 2 * (step % 3) :][:2]
        expected = soft.views.replay(soft.images, step // 3, rows.flatten().long())
        assert torch.equal(images, expected[0])
        assert torch.equal(logits, expected[1])
    later = list(SyntheticBatches(*arguments[:3], 5, 0, start=4, views=soft.views))
    for new, old in zip(later, batches[4:9], strict=True):
        assert torch.equal(new[0], old[0])
        assert torch.equal(new[1], old[1])
    for rank in (0, 1):
        share = SyntheticBatches(soft.images, soft.labels, 1, 4, 0, rank=rank, world_size=2, views=soft.views)
        for own, whole in zip(share, batches[:4], strict=True):
            assert torch.equal(own[0], whole[0][rank::2])


class SeenByStudent(Student):
    """Keeps what its network is trained on."""

    def forward(self, images):
        if self.training:
            self.seen = [*getattr(self, "seen", []), images]
        return super().forward(images)


@pytest.mark.parametrize("views", [True, False])
def test_a_student_augments_only_where_there_are_no_views(views, tmp_path):
    soft = soft_set(views=views)
    student, data = SeenByStudent(STUDENT, augment="color"), DistilledData.from_set(soft, TinyData(), seed=5)
    tiny_trainer(tmp_path, 3, callbacks=[]).fit(student, data)
    batches = [images for images, _ in SyntheticBatches(soft.images, soft.labels, 500, 3, 5, views=soft.views)]
    assert all(torch.equal(seen, batch) == views for seen, batch in zip(student.seen, batches, strict=True))
    assert (student.one_step.label_kind, student.one_step.temperature) == ("soft", 4.0)


def test_a_students_loss_is_the_divergence_at_the_sets_temperature(tmp_path):
    soft = soft_set()
    student, data = SeenByStudent(STUDENT), DistilledData.from_set(soft, TinyData())
    trainer = tiny_trainer(tmp_path, 1, callbacks=[], log_every_n_steps=1)
    trainer.fit(student, data)
    ((images, logits),) = SyntheticBatches(soft.images, soft.labels, 500, 1, 0, views=soft.views)
    expected = student_loss(build_network(STUDENT, 3, (1, 8, 8), seed=0)(images), logits, "soft", 4.0)
    assert float(trainer.callback_metrics["student/loss"]) == pytest.approx(float(expected), rel=1e-3)


def test_the_bare_loop_sees_the_views_too():
    soft = soft_set()
    networks = []
    for augment in ("none", "color", None):
        network = build_network(STUDENT, 3, (1, 8, 8), seed=0)
        recipe = Recipe(steps=4, lr=0.01, augment=augment or "none")
        train_student(network, soft_set(views=augment is not None), recipe, seed=0)
        networks.append(torch.cat([parameter.flatten() for parameter in network.parameters()]))
    assert torch.equal(networks[0], networks[1])
    assert not torch.equal(networks[0], networks[2])
    # By hand: epoch e at step e, and the divergence at the set's temperature.
    network, recipe = build_network(STUDENT, 3, (1, 8, 8), seed=0), Recipe(steps=4, lr=0.01)
    optimizer = recipe.build_optimizer(network.train())
    scheduler = recipe.scheduler(optimizer, 4)
    for epoch in range(4):
        images, logits = soft.views.replay(soft.images, epoch, torch.arange(6))
        student_loss(network(images), logits, "soft", 4.0).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    by_hand = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
    torch.testing.assert_close(networks[0], by_hand, rtol=1e-3, atol=1e-5)


def test_a_student_with_views_resumes_exactly(tmp_path):
    def run(folder, ckpt_path=None):
        student, data = Student(STUDENT, lr=0.01), DistilledData.from_set(soft_set(), TinyData(), batch_size=4)
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
        tiny_trainer(folder, 9, callbacks=[keep], enable_checkpointing=True).fit(student, data, ckpt_path=ckpt_path)
        return student

    straight = run(tmp_path / "a")
    resumed = run(tmp_path / "b", str(tmp_path / "a" / "step=5.ckpt"))
    for left, right in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)


class KeepWeights(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_students_with_views_on_two_processes_take_the_steps_of_one(tmp_path):
    for kwargs in ({}, {"devices": 2, "strategy": "ddp_fork"}):
        student, data = Student(STUDENT, lr=0.01), DistilledData.from_set(soft_set(), TinyData())
        tiny_trainer(tmp_path, 5, callbacks=[KeepWeights(tmp_path)], **kwargs).fit(student, data)
    one, left, right = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    for name, value in one.items():
        assert torch.equal(left[name], right[name])
        torch.testing.assert_close(left[name], value, rtol=1e-3, atol=1e-5)


def test_a_student_learns_from_soft_labels_alone(tmp_path):
    data = TinyData()
    data.setup("fit")
    network = build_network(TEACHER, 3, (1, 8, 8), seed=0)
    recipe = Recipe(steps=60, lr=0.01, augment="none")
    train_student(network, make_distilled(ipc=8, label_kind="hard"), recipe, seed=0)
    views = views_of(soft_set().images, 40, network, flip=False)
    soft = replace(soft_set(), labels=committee_of(network).logits(soft_set().images), views=views)
    student, data = Student(STUDENT, lr=0.01, warmup=0), DistilledData.from_set(soft, TinyData())
    trainer = tiny_trainer(tmp_path, 60, callbacks=[])
    trainer.fit(student, data)
    assert trainer.test(student, data, verbose=False)[0]["test/accuracy"] > 0.7


def test_beside_soft_labels_stand_random_real_images_with_hard_ones():
    real = TinyData()
    real.setup("fit")
    drawn = random_real(soft_set(), real, 0)
    assert (drawn.label_kind, drawn.views) == ("hard", None)
    assert torch.equal(drawn.labels, torch.eye(3).repeat_interleave(2, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": -1}, "labels.epochs must be at least 0, got -1"),
        ({"epochs": 0, "train_mode": True}, "labels.train_mode is of stored views: set labels.epochs above 0"),
        ({"min_scale": 0.0}, r"labels.min_scale must be in \(0, 1\], got 0.0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
    ],
)
def test_settings_of_soft_labels_are_checked(changes, message):
    with pytest.raises(UserError, match=message):
        TeacherLabels(**changes)


def test_logits_beyond_half_precision_are_refused():
    network = teacher()
    network.head.bias.data += 1e6
    with pytest.raises(UserError, match="logits hold NaN or infinite"):
        views_of(images_of(), network=network)


def test_the_state_rebuilds_the_views():
    views = views_of(images_of())
    again = SoftViews.from_state_dict(views.state_dict())
    assert (again.epochs, len(again)) == (EPOCHS, 6)


def test_any_set_can_be_relabelled_by_a_committee(tmp_path):
    distilled, names = make_distilled(ipc=2), {TEACHER: 3.0, "convnet:width=4,depth=2,norm=none": 1.0}
    labels = TeacherLabels(Teacher(names, steps=40, lr=0.02), epochs=2, min_scale=0.5, temperature=4.0)
    done = relabel(distilled, labels, TinyData(val_fraction=0.25), "conv")
    assert (done.label_kind, done.temperature, done.views.epochs) == ("soft", 4.0, 2)
    assert torch.equal(done.images, distilled.images)
    assert done.training["relabelled"]["from"] == {"label_kind": "learned", "method": "Test"}
    data = TinyData(val_fraction=0.25)
    data.use_preprocessing(distilled.preprocessing)
    data.setup("fit")
    one, other = (Teacher(name, steps=40, lr=0.02).committee(Task.of(data), "conv") for name in names)
    expected = 0.75 * one.logits(done.images) + 0.25 * other.logits(done.images)
    torch.testing.assert_close(done.labels, expected)
    torch.testing.assert_close(
        done.views.replay(done.images, 1, torch.arange(6))[1],
        0.75 * one.logits(done.views.look(done.images, 1, torch.arange(6)))
        + 0.25 * other.logits(done.views.look(done.images, 1, torch.arange(6))),
        rtol=2e-3,
        atol=2e-3,
    )
    loaded = DistilledSet.load(done.save(tmp_path / "soft.safetensors"))
    assert loaded.training["relabelled"]["labels"]["class_path"].endswith("TeacherLabels")


def test_padded_views_are_stored_with_the_black_of_the_normalised_images():
    labels = TeacherLabels(epochs=1, padding=1)
    for preprocessing in (Preprocessing([0.5], [0.2]), Preprocessing([0.1], [0.25])):
        plain = replace(make_distilled(label_kind="hard"), preprocessing=preprocessing)
        done = labels.finish(plain, lambda given: committee_of(teacher()), seed=0)
        torch.testing.assert_close(done.views.outside, -preprocessing.mean / preprocessing.std)
        labels = labels.again()  # it remembers the images that it has labelled


class Smoothed(Labels):
    """A strategy of somebody else's."""

    def finish(self, distilled, teachers, seed, views=True):
        return replace(distilled, labels=0.9 * distilled.labels + 0.1 / distilled.num_classes)


def test_a_strategy_of_ones_own_labels_the_finished_set_and_is_remembered(tmp_path):
    model = Random(labels=Smoothed(while_distilling="hard"), architecture=STUDENT, probe=Probe(steps=1))
    tiny_trainer(tmp_path, 1).fit(model, TinyData())
    assert torch.equal(model.synthetic.labels, torch.eye(3))
    loaded = DistilledSet.load(model.distilled_set().save(tmp_path / "set.safetensors"))
    torch.testing.assert_close(loaded.labels, 0.9 * torch.eye(3) + 0.1 / 3)
    assert loaded.config["labels"]["init_args"] == {"while_distilling": "hard"}
    with pytest.raises(UserError, match="labels of Random must be one of hard, centred, soft, got 'smooth'"):
        Random(labels=Smoothed(while_distilling="smooth"))
