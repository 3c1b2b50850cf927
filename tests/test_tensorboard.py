"""What a person finds in TensorBoard after a distillation and an evaluation."""

import pytest
import torch
import yaml
from helpers import TinyData, make_distilled, tiny_trainer
from pytorch_lightning.callbacks import LearningRateMonitor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lightning_dd.callbacks import DistillationProgress, PoolAlternation, SyntheticImages
from lightning_dd.callbacks.pictures import image_grid, named_grid
from lightning_dd.data import DATA_SETS
from lightning_dd.distillers import FRePo
from lightning_dd.distillers.base import Probe
from lightning_dd.evaluators.evaluate import evaluate_files
from lightning_dd.students.recipe import Recipe
from lightning_dd.utils.board import Board


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return events.Reload()


@pytest.fixture
def board(tmp_path):
    logger = Board(tmp_path, name="run", version="v", default_hp_metric=False)
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
    assert "epoch" not in board.Tags()["scalars"]  # there is one
    assert [event.step for event in board.Scalars("outer/loss")] == [1, 3, 5]
    total = [event.value for event in board.Scalars("outer/loss")]
    parts = [a.value + b.value for a, b in zip(board.Scalars("outer/krr"), board.Scalars("outer/label"), strict=True)]
    assert total == pytest.approx(parts, rel=1e-5)
    assert all(event.value > 0 for event in board.Scalars("gradient/images"))


def test_images_and_label_maps_are_there_from_start_to_end(board):
    assert {event.step for event in board.Images("synthetic/images")} == {0, 2, 4, 6}
    assert len(board.Images("synthetic/labels")) >= 4
    assert board.Images("synthetic/images")[-1].encoded_image_string.startswith(b"\x89PNG")


def test_settings_are_a_table_and_the_run_and_its_set_are_texts(board):
    plugin = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(plugin).session_start_info.hparams
    assert settings["real_batch_size"].number_value == 8
    assert settings["probe.steps"].number_value == 3
    assert settings["architecture"].string_value == "conv:width=4,depth=2"
    score = HParamsPluginData.FromString(board.SummaryMetadata("_hparams_/experiment").plugin_data.content)
    assert [info.name.tag for info in score.experiment.metric_infos] == ["val/accuracy"]
    run, card = (board.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode() for tag in ("run", "set"))
    assert yaml.safe_load(run.strip("`"))["model"]["init_args"]["real_batch_size"] == 8
    assert "| set | FRePo: 3 classes x 1 images of 1x8x8 |" in card


def test_columns_of_a_picture_are_named(board):
    names = ("ape", "bee", "cow")
    figure = named_grid(image_grid(torch.rand(6, 1, 8, 8), 2), names)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == list(names)
    width = axes.images[0].get_array().shape[1]
    assert [round(3 * tick / width, 1) for tick in axes.get_xticks()] == [0.5, 1.5, 2.5]
    last = board.Images("synthetic/images")[-1]
    assert last.height > image_grid(torch.rand(3, 1, 8, 8), 1).shape[1]  # there is room for names


def test_students_have_curves_named_by_set_architecture_source_and_seed(tmp_path, monkeypatch):
    monkeypatch.setitem(DATA_SETS, "TinyData", TinyData)
    file = make_distilled().save(tmp_path / "mine.safetensors")
    evaluate_files([str(file)], ["conv:width=4,depth=2"], str(tmp_path / "report"), 1, Recipe(steps=5))
    runs = sorted(path.name for path in (tmp_path / "report" / "tensorboard" / "mine").iterdir())
    assert runs == ["conv-width=4-depth=2-distilled-0", "conv-width=4-depth=2-random-real-0"]
    curves = read(tmp_path / "report" / "tensorboard" / "mine" / runs[0])
    assert {"student/loss", "val/accuracy", "test/accuracy"} <= set(curves.Tags()["scalars"])


def test_a_failed_run_takes_away_only_what_it_made_and_only_without_a_curve(tmp_path):
    def failed(name, *curves):
        logger = Board(tmp_path / "runs", name=name, version="v", default_hp_metric=False)
        logger.log_hyperparams({"lr": 1})
        for curve in curves:
            logger.log_metrics(curve, 1)
        logger.finalize("failed")

    failed("refused")
    assert not (tmp_path / "runs").exists()
    failed("curves", {"loss": 1.0})
    failed("refused")
    (tmp_path / "runs" / "older" / "v").mkdir(parents=True)
    failed("older")
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"curves", "older"}
