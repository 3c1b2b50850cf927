"""What a person finds in TensorBoard after a distillation and an evaluation."""

import pytest
from helpers import TinyData, make_distilled, tiny_trainer
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_dd.callbacks import DistillationProgress, PoolAlternation, SyntheticImages
from lightning_dd.data import DATA_SETS
from lightning_dd.distillers import FRePo
from lightning_dd.distillers.base import Probe
from lightning_dd.evaluators.evaluate import evaluate_files
from lightning_dd.students.recipe import Recipe


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return events.Reload()


@pytest.fixture
def board(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run", version="v", default_hp_metric=False)
    callbacks = [PoolAlternation(), SyntheticImages(every=2), DistillationProgress(), LearningRateMonitor()]
    trainer = tiny_trainer(
        tmp_path,
        6,
        logger=logger,
        callbacks=callbacks,
        log_every_n_steps=2,
        val_check_interval=3,
        enable_progress_bar=True,
    )
    model = FRePo(architecture="conv:width=4,depth=2", real_batch_size=8, pool_size=2, probe=Probe(steps=3))
    trainer.fit(model, TinyData(val_fraction=0.2))
    return read(tmp_path / "run" / "v")


def test_every_curve_is_there_and_counts_outer_steps(board):
    curves = {
        "outer/loss",
        "outer/krr",
        "outer/label",
        "outer/accuracy",
        "outer/condition",
        "labels/margin",
        "gradient/images",
        "gradient/labels",
        "pool/age",
        "speed/outer_steps_per_second",
        "lr-Lamb",
        "val/accuracy",
    }
    assert curves <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("outer/loss")] == [1, 3, 5]
    total = [event.value for event in board.Scalars("outer/loss")]
    parts = [a.value + b.value for a, b in zip(board.Scalars("outer/krr"), board.Scalars("outer/label"), strict=True)]
    assert total == pytest.approx(parts, rel=1e-5)
    assert all(event.value > 0 for event in board.Scalars("gradient/images"))


def test_images_and_label_maps_are_there_from_start_to_end(board):
    assert {event.step for event in board.Images("synthetic/images")} == {0, 2, 4, 6}
    assert len(board.Images("synthetic/labels")) >= 4
    assert board.Images("synthetic/images")[-1].encoded_image_string.startswith(b"\x89PNG")


def test_students_have_curves_named_by_set_architecture_source_and_seed(tmp_path, monkeypatch):
    monkeypatch.setitem(DATA_SETS, "TinyData", TinyData)
    file = make_distilled().save(tmp_path / "mine.safetensors")
    evaluate_files([str(file)], ["conv:width=4,depth=2"], str(tmp_path / "report"), 1, Recipe(steps=5))
    runs = sorted(path.name for path in (tmp_path / "report" / "tensorboard" / "mine").iterdir())
    assert runs == ["conv-width=4-depth=2-distilled-0", "conv-width=4-depth=2-random-real-0"]
    curves = read(tmp_path / "report" / "tensorboard" / "mine" / runs[0])
    assert {"student/loss", "val/accuracy", "test/accuracy"} <= set(curves.Tags()["scalars"])
