"""The command line: help at once, one line for every mistake, configuration as Lightning's users know it."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers import make_distilled

from lightning_dd import cli
from lightning_dd.cli import VERBS, main
from lightning_dd.distilled.set import DistilledSet

CONFIG = str(Path(__file__).parent.parent / "configs" / "mnist5k" / "frepo.yaml")
QUICK = [
    "--config",
    CONFIG,
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.enable_progress_bar=false",
    "--model.init_args.architecture=conv:width=4",
    "--model.init_args.probe.steps=1",
    "--model.init_args.real_batch_size=8",
]


def only_line(capsys):
    """The one line on stderr that is about the mistake."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-dd: error:")]
    assert len(lines) == 1
    return lines[0]


def status(arguments):
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code


def test_help_and_version_need_nothing_heavy():
    start = time.monotonic()
    script = (
        "import sys; from lightning_dd.cli import main; code = main(['--help']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert time.monotonic() - start < 30  # a hang; the promise itself (1 s) is the module check above
    assert all(verb in done.stdout for verb in VERBS)


def test_help_of_our_verbs_needs_no_torch():
    script = (
        "import sys; from lightning_dd.cli import main\n"
        "try: main(['evaluate', '--help'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert "--architectures" in done.stdout
    assert main(["--version"]) == 0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["distill"], ["unknown verb 'distill'", "evaluate", "fit"]),
        (["fit", "--config", CONFIG, "--model", "FRePO"], ["unknown class", "'FRePO'", "did you mean 'FRePo'"]),
        (["fit", "--config", CONFIG, "--data", "CIFAR"], ["unknown class", "'CIFAR'", "CIFAR10", "MNIST5k"]),
        (["fit", "--config", CONFIG, "--model.ipcc=3"], ["'ipcc'", "did you mean 'ipc'", "architecture", "pool_size"]),
        (["fit", "--config", CONFIG, "--data.val_fractio=3"], ["'val_fractio'", "did you mean 'val_fraction'"]),
        (["fit", "--config", CONFIG, "--trainer.max_step=3"], ["'max_step'", "did you mean 'max_steps'"]),
        (["fit", "--config", CONFIG, "--model.ipc=two"], ["ipc: expected int, got two"]),
        (["fit", "--config", CONFIG, "--model.ipc=0"], ["ipc (images per class) must be at least 1, got 0"]),
        (["fit", "--config", CONFIG, "--data.preprocessing=pca"], ["standardise, zca", "'pca'"]),
        (["fit", "--config", "nothing.yaml"], ["File does not exist", "nothing.yaml"]),
        (["fit", "--config", CONFIG, "--ckpt_path=no.ckpt"], ["ckpt_path 'no.ckpt': no such file"]),
        (["evaluate", "x.safetensors", "--architectures", "conv", "--output", "o"], ["x.safetensors", "no such file"]),
        (["evaluate", "x.safetensors", "--architectures", "conv", "--outputs", "o"], ["--output"]),
        (["export", "no.ckpt", "--output", "o"], ["no.ckpt", "no such file"]),
    ],
)
def test_a_mistake_gives_one_line_and_status_2(arguments, parts, capsys, tmp_path):
    assert status(arguments) == 2
    line = only_line(capsys)
    for part in parts:
        assert part in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # nothing half-written


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.init_args.ipc=401", "largest possible ipc is"),
        ("--model.init_args.architecture=resnet19", "unknown architecture 'resnet19'"),
        ("--model.init_args.architecture=conv:depth=6", "too small for depth 6"),
    ],
)
def test_settings_that_do_not_fit_the_data_give_one_line_and_status_2(option, message, capsys):
    assert status(["fit", *QUICK, option]) == 2
    assert message in only_line(capsys)


@pytest.mark.parametrize(("wanted", "teacher_steps"), [(False, 60), (True, 61)])
def test_without_progress_bars_a_teacher_has_none_either(wanted, teacher_steps, capsys):
    config = str(Path(CONFIG).with_name("herding.yaml"))
    arguments = [
        f"--config={config}",
        "--trainer.accelerator=cpu",
        f"--trainer.enable_progress_bar={wanted}",
        "--model.init_args.teacher.architecture=convnet:width=8,norm=batch",
        f"--model.init_args.teacher.steps={teacher_steps}",  # of its own, for a cached teacher is not trained
        "--model.init_args.architecture=convnet:width=4",
        "--model.init_args.ipc=1",
        "--model.init_args.probe.steps=1",
    ]
    assert main(["fit", *arguments]) == 0
    printed = capsys.readouterr()
    assert ("training convnet:width=8" in printed.out + printed.err) == wanted


def test_fit_writes_a_set_that_evaluate_and_export_take(capsys, tmp_path):
    assert main(["fit", *QUICK, "--seed_everything=3"]) == 0
    run = tmp_path / "runs" / "mnist5k-frepo" / "version_0"
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["seed_everything"] == 3
    distilled = DistilledSet.load(run / "last.safetensors")
    assert distilled.config["seed"] == 3  # the run's one seed reached the model
    assert distilled.data["name"] == "MNIST5k"
    checkpoint = run / "checkpoints" / "last.ckpt"
    assert main(["export", str(checkpoint), "--output=out/set.safetensors", "--picture=out/set.png"]) == 0
    exported = DistilledSet.load("out/set.safetensors")
    assert exported.images.equal(distilled.images)
    assert Path("out/set.png").read_bytes().startswith(b"\x89PNG")


def test_resuming_with_another_setting_is_refused_not_silently_overridden(capsys, tmp_path):
    assert main(["fit", *QUICK, "--trainer.callbacks.every_n_train_steps=2"]) == 0
    checkpoint = next((tmp_path / "runs").rglob("last.ckpt"))
    capsys.readouterr()
    assert main(["fit", *QUICK, f"--ckpt_path={checkpoint}", "--model.init_args.lr=0.5"]) == 2
    assert "lr is 0.01 there and 0.5 here" in only_line(capsys)
    assert main(["fit", *QUICK, f"--ckpt_path={checkpoint}", "--trainer.max_steps=3"]) == 0


def test_print_config_shows_what_would_run(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", CONFIG, "--print_config"])
    assert stop.value.code in (0, None)
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["init_args"]["ipc"] == 1
    assert shown["data"]["class_path"].endswith("MNIST5k")


def test_num_classes_that_disagree_give_one_line(capsys, tmp_path):
    file = make_distilled(data_name="MNIST5k").save(tmp_path / "three.safetensors")
    arguments = ["evaluate", str(file), "--architectures", "conv:width=4,depth=2", "--output", "report"]
    assert main([*arguments, "--steps=1"]) == 2
    assert "num_classes disagree: the distilled set has 3, MNIST5k has 10" in only_line(capsys)


def test_the_verbs_of_the_help_are_those_that_run():
    from lightning_dd import verbs

    assert set(VERBS) == {*cli._LIGHTNING_VERBS, *verbs.VERBS}
