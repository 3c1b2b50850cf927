"""The command line: help at once, one line for every mistake, configuration as Lightning's users know it."""

import json
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers import make_distilled

from lightning_dd.cli import LIGHTNING_VERBS, main
from lightning_dd.distilled.set import DistilledSet
from lightning_dd.utils.errors import UserError
from lightning_dd.verbs import VERBS

CONFIG = str(Path(__file__).parent.parent / "configs" / "mnist5k" / "frepo.yaml")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="has a GPU")
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
    assert all(verb in done.stdout for verb in {**LIGHTNING_VERBS, **VERBS})


def test_distilling_imports_no_library_it_does_not_use(tmp_path):
    script = (
        "import sys; from lightning_dd.cli import main; code = main(sys.argv[1:])\n"
        "print(sorted(sys.modules.keys() & {'datasets', 'transformers', 'sklearn.ensemble', "
        "'lightning_dd.applications.continual', 'lightning_dd.applications.membership'})); sys.exit(code)"
    )
    demo = [*QUICK, "--config", str(Path(CONFIG).parents[1] / "demo.yaml"), "--trainer.limit_val_batches=0"]
    command = [sys.executable, "-c", script, "fit", *demo, f"--trainer.logger.init_args.save_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("verb", "text"), [("evaluate", "--architectures"), ("continual", "equal parts the classes come in")]
)
def test_help_of_our_verbs_needs_no_torch(verb, text):
    script = (
        "import sys; from lightning_dd.cli import main\n"
        f"try: main(['{verb}', '--help'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert text in done.stdout
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
        (["fit", "--config", CONFIG, "--model.probe.stps=3"], ["option of probe 'stps'", "did you mean 'steps'"]),
        (
            ["fit", "--config", CONFIG, "--model.parameterisation", "Latents", "--model.parameterisation.levl=2"],
            ["option of Latents 'levl'", "did you mean 'level'"],
        ),
        (
            ["fit", "--config", CONFIG, "--trainer.callbacks+=MetaDD", "--trainer.callbacks.evry=3"],
            ["option of MetaDD 'evry'", "did you mean 'every'"],
        ),
        (["fit", "--config", CONFIG, "--modl=FRePo"], ["unknown option '--modl'", "did you mean '--model'"]),
        (["evaluate", "x.safetensors", "--protocl", "dsa"], ["'--protocl'", "did you mean '--protocol'"]),
        (["fit", "--config", CONFIG, "--model.ipc=two"], ["FRePo.ipc: expected int, got two"]),
        (["fit", "--config", CONFIG, "--seed=3"], ["option '--seed'", "did you mean '--seed_everything'"]),
        (["evaluate", "x.safetensors", "--seed", "3"], ["option '--seed'", "did you mean '--seeds'"]),
        (["evaluate", "x", "--architectures", "conv", "--output", "o", "--steps=x"], ["--steps: expected int, got x"]),
        (["fit", "--config", CONFIG, "--model.ipc=0"], ["ipc (images per class) must be at least 1, got 0"]),
        (["fit", "--config", CONFIG, "--data.preprocessing=pca"], ["standardise, zca", "'pca'"]),
        (["fit", "--config", "nothing.yaml"], ["unknown configuration", "nothing.yaml"]),
        (["fit", "--config", CONFIG, "--ckpt_path=no.ckpt"], ["ckpt_path 'no.ckpt': no such file"]),
        (["evaluate", "x.safetensors", "--architectures", "conv", "--output", "o"], ["x.safetensors", "no such file"]),
        (["evaluate", "x.safetensors", "--architectures", "conv", "--outputs", "o"], ["--output"]),
        (["export", "no.ckpt", "--output", "o"], ["no.ckpt", "no such file"]),
        (["export", "/dev/zero", "--output", "o"], ["/dev/zero", "no such file"]),
        (["evaluate", "/dev/zero", "--architectures", "conv", "--output", "o"], ["/dev/zero", "no such file"]),
        (["evaluate", "x.safetensors", "--architectures", "conv", "--output", "o", "--lr=nan"], ["lr: expected float"]),
        (["evaluate", "\x1b[2J\n.safetensors", "--architectures", "conv", "--output", "o"], ["'\\x1b[2J\\n.safe"]),
    ],
)
def test_a_mistake_gives_one_line_and_status_2(arguments, parts, capsys, tmp_path):
    assert status(arguments) == 2
    line = only_line(capsys)
    for part in parts:
        assert part in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # nothing half-written


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("--trainer.devices=-3", ["`devices`", "> 0"]),
        ("--trainer.devices=0", ["devices='0'"]),
        ("--trainer.devices=99", ["trainer.devices must be 1 to ", "got 99"]),
        ("--trainer.num_nodes=0", ["`num_nodes`", "positive", "0"]),
        ("--trainer.accelerator=quantum", ["accelerator='quantum'", "cpu"]),
        pytest.param("--trainer.accelerator=gpu", ["accelerator 'gpu': this machine has none"], marks=NO_GPU),
        ("--trainer.strategy=magic", ["strategy='magic'", "ddp"]),
        ("--trainer.precision=fp4", ["trainer.precision: expected", "bf16-mixed", "got fp4"]),
        ("--trainer.gradient_clip_val=nan", ["trainer.gradient_clip_val: expected float", "got nan"]),
        ("--trainer.max_steps=0", ["trainer.max_steps must be at least 1", "got 0"]),
        ("--trainer.max_steps=-5", ["trainer.max_steps must be at least 1", "got -5"]),
        ("--trainer.val_check_interval=0", ["trainer.val_check_interval must be at least 1, got 0"]),
        ("--trainer.val_check_interval=-3", ["trainer.val_check_interval must be at least 1, got -3"]),
        ("--trainer.logger.save_dir=/proc/nothing", ["'/proc/nothing'", "No such file"]),
        ("--seed_everything=-1", ["seed_everything must be in [0, 4294967295], got -1"]),
        ("--seed_everything=9223372036854775808", ["seed_everything must be in [0, 4294967295]"]),
        ("--data.split_seed=-1", ["data.split_seed must be in [0, 4294967295], got -1"]),
        ("--data.val_fraction=nan", ["val_fraction: expected float, got nan"]),
        ("--model.probe.steps=0", ["probe.steps must be at least 1, got 0"]),
        ("--model.probe.lr=-1", ["probe.lr must be positive, got -1"]),
        ("--model.lr=inf", ["lr: expected float, got inf"]),
        ("--model.lr=1e30", ["lr must be positive and below 1e+09, got 1e+30"]),
        ("--model.inner_lr=1e30", ["inner_lr must be positive and below 1e+09, got 1e+30"]),
        ("--ckpt_path=http://127.0.0.1:1/x.ckpt", ["ckpt_path 'http:", "must be a file of this machine"]),
        ("--ckpt_path=file:///etc/hosts", ["ckpt_path 'file:", "must be a file of this machine"]),
        ("--ckpt_path=/dev/zero", ["ckpt_path '/dev/zero': no such file"]),
        ("--ckpt_path=/etc/hosts", ["ckpt_path '/etc/hosts'", "only tensors and numbers"]),
    ],
)
def test_a_setting_no_run_can_have_gives_one_line_and_nothing_is_written(option, parts, capsys, tmp_path):
    assert status(["fit", *QUICK, option]) == 2
    line = only_line(capsys)
    assert [part for part in parts if part not in line] == [], line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("option", "part"),
    [
        ("--lr=1e30", "recipe.lr must be positive and below 1e+09"),
        ("--devices=-3", "`devices`"),
        ("--devices=0", "devices=0"),
        ("--devices=99", "trainer.devices must be 1 to "),
        ("--accelerator=quantum", "accelerator='quantum'"),
        pytest.param("--accelerator=gpu", "accelerator 'gpu': this machine has none", marks=NO_GPU),
        ("--strategy=magic", "strategy='magic'"),
        ('--data_args={"split_seed": -1}', "data.split_seed must be in [0, 4294967295]"),
    ],
)
def test_a_setting_no_student_can_have_gives_one_line(option, part, capsys):
    from lightning_dd.data import MNIST5k

    file = make_distilled(data=MNIST5k).save("set.safetensors")
    arguments = ["evaluate", str(file), "--architectures", "conv:width=4,depth=2", "--output", "report"]
    assert status([*arguments, "--steps=1", "--seeds=1", "--accelerator=cpu", option]) == 2
    assert part in only_line(capsys)
    assert not list(Path("report").rglob("results*"))


def test_a_run_that_is_never_validated_says_so(capsys):
    with pytest.warns(UserWarning, match="val_check_interval=50 is beyond the run's 2 steps"):
        assert main(["fit", *QUICK, "--trainer.val_check_interval=50"]) == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.init_args.ipc=401", "class '0' has 360 images; the largest possible ipc is 360"),
        ('--data={"class_path": "ClassSubset", "init_args": {"source": "MNIST5k", "classes": [3]}}', "at least two"),
        ("--model.init_args.ipc=100000000", "lower ipc or the batch size"),
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


def test_fit_ends_with_the_exact_next_command_which_runs(capsys, tmp_path):
    assert main(["fit", *QUICK]) == 0
    said = capsys.readouterr().out
    run = Path("runs/mnist5k-frepo/version_0")
    for line in (f"{run / 'best.safetensors'}", f"last set, outer step 2: {run / 'last.safetensors'}"):
        assert line in said
    words = shlex.split(next(line for line in said.splitlines() if line.startswith("next: ")).removeprefix("next: "))
    assert words[:3] == ["lightning-dd", "evaluate", str(run)]
    words[words.index("unseen-small")] = "convnet:width=4,depth=2"
    assert main([*words[1:], "--steps=1", "--seeds=1", "--accelerator=cpu"]) == 0
    rows = json.loads((run / "report" / "results.json").read_text())
    assert {row["set"] for row in rows} == {"FRePo-MNIST5k-ipc1-seed0"}
    assert {row["architecture"] for row in rows} == {"conv:width=4,norm=none", "convnet:width=4,depth=2"}


def test_resuming_with_another_setting_is_refused_not_silently_overridden(capsys, tmp_path):
    assert main(["fit", *QUICK, "--trainer.callbacks.every_n_train_steps=2"]) == 0
    checkpoint = next((tmp_path / "runs").rglob("last.ckpt"))
    capsys.readouterr()
    assert main(["fit", *QUICK, f"--ckpt_path={checkpoint}", "--model.init_args.lr=0.5"]) == 2
    assert "lr is 0.01 there and 0.5 here" in only_line(capsys)
    assert main(["fit", *QUICK, f"--ckpt_path={checkpoint}", "--trainer.max_steps=3"]) == 0
    told = re.search(r"best set, .*: (\S+)", capsys.readouterr().out)
    assert told is None or Path(told[1]).is_file()  # the best one may be that of the run before


def test_print_config_shows_what_would_run(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", CONFIG, "--print_config"])
    assert stop.value.code in (0, None)
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["init_args"]["ipc"] == 1
    assert shown["data"]["class_path"].endswith("MNIST5k")


@pytest.mark.parametrize(
    ("options", "note", "mean", "std"),
    [
        (["cifar10/dc", "--data", "SVHN"], "data.std of CIFAR10 left out: the data is SVHN", None, None),
        (["cifar10/mtt", "--model.ipc=50", "--data=SVHN"], "data.std of CIFAR10 left out", None, None),
        (["tiny_imagenet/dm", "--data", "SVHN"], "data.mean and data.std of TinyImageNet left out", None, None),
        (
            ["tiny_imagenet/dm", "--config=svhn/dc", "--data.mean=[0,0,0]"],
            "data.mean and data.std of",
            [0, 0, 0],
            "own",
        ),
        (["cifar10/dc", "--data.class_path=SVHN", "--data.mean=[0.5,0.5,0.5]"], "data.std of", [0.5, 0.5, 0.5], None),
        (["svhn/dc", "--data.mean=[1,1,1]", "--data=SVHN"], "", [1.0, 1.0, 1.0], "own"),
    ],
)
def test_a_mean_chosen_for_one_data_set_does_not_travel_to_another(options, note, mean, std, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", *options, "--print_config"])
    found = capsys.readouterr()
    data = yaml.safe_load(found.out)["data"]
    assert data["class_path"] == "lightning_dd.data.SVHN"
    assert (data["init_args"]["mean"], data["init_args"]["std"]) == (mean, [0.198, 0.201, 0.197] if std else None)
    assert note in found.err
    assert bool(note) == bool(found.err)


def test_num_classes_that_disagree_give_one_line(capsys, tmp_path):
    made = replace(make_distilled(), data={"name": "MNIST5k"})
    file = made.save(tmp_path / "three.safetensors")
    arguments = ["evaluate", str(file), "--architectures", "conv:width=4,depth=2", "--output", "report"]
    assert main([*arguments, "--steps=1"]) == 2
    assert "num_classes disagree: the distilled set has 3, MNIST5k has 10" in only_line(capsys)


def test_a_configuration_is_found_by_its_name_and_names_the_run(capsys, monkeypatch, tmp_path):
    for name in ("mnist5k/frepo", "mnist5k/frepo.yaml", "configs/mnist5k/frepo.yaml"):
        with pytest.raises(SystemExit):
            main(["fit", "--config", name, "--print_config"])
        shown = yaml.safe_load(capsys.readouterr().out)
        assert shown["model"]["class_path"].endswith("FRePo")
        assert shown["trainer"]["logger"]["init_args"]["name"] == "mnist5k-frepo"
    assert status(["fit", "--config", "mnist5k/freepo"]) == 2
    assert "unknown configuration 'mnist5k/freepo'; did you mean 'mnist5k/frepo'?" in only_line(capsys)


def test_what_configurations_need_not_say(capsys):
    given = ["--config", "metadd", "--trainer.callbacks.every=1", "--trainer.callbacks+=MetaFeatureImages"]
    with pytest.raises(SystemExit):
        main(["fit", "--config", "mnist5k/dm", *given, "--print_config"])
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    names = [callback["class_path"].rpartition(".")[2] for callback in trainer["callbacks"]]
    always = ["SyntheticImages", "ExportDistilledSet", "DistillationProgress", "LearningRateMonitor", "ModelCheckpoint"]
    assert names == [*always, "MetaFeatureImages", "MetaDD", "MetaFeatureImages"]
    assert trainer["callbacks"][6]["init_args"]["every"] == 1  # the preset puts MetaDD last, so that one word is enough
    assert (trainer["check_val_every_n_epoch"], trainer["num_sanity_val_steps"], trainer["devices"]) == (None, 0, 1)


def test_validation_and_checkpoints_follow_the_length_of_the_run(monkeypatch):
    seen = {}

    def fit(self, *args, **kwargs):
        seen["validate"] = self.val_check_interval
        seen["keep"] = self.checkpoint_callback._every_n_train_steps

    monkeypatch.setattr("pytorch_lightning.Trainer.fit", fit)
    for steps, options, expected in (
        (400, [], {"validate": 100, "keep": 100}),
        (20_000, [], {"validate": 5000, "keep": 1000}),
        (400, ["--trainer.val_check_interval=7"], {"validate": 7, "keep": 7}),
        (3, [], {"validate": 1, "keep": 1}),
    ):
        assert main(["fit", "--config", "mnist5k/frepo", f"--trainer.max_steps={steps}", *options]) == 0
        assert seen == expected


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("configs", "mnist5k/frepo"),
        ("methods", "FRePo"),
        ("protocols", "dsa"),
        ("data", "MNIST5k"),
        ("sets", "builtin:mnist5k_dm_ipc1"),
    ],
)
def test_list_names_what_there_is(what, name, capsys):
    assert main(["list", what]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[0] == name for line in lines)
    assert main(["list", what, name[:4]]) == 0
    assert all(name[:4] in line for line in capsys.readouterr().out.splitlines())


def test_list_architectures_takes_a_pattern(capsys):
    assert main(["list", "architectures", "resnet10t"]) == 0
    assert capsys.readouterr().out.split() == ["resnet10t", "timm"]
    assert status(["list", "colours"]) == 2
    assert main(["list"]) == 0
    assert "architectures  " in capsys.readouterr().out


def test_a_pattern_in_other_letters_is_found_and_one_that_finds_nothing_is_said(capsys):
    assert main(["list", "methods", "frepo"]) == 0
    assert capsys.readouterr().out.startswith("FRePo")
    assert status(["list", "methods", "covn"]) == 2
    assert only_line(capsys).endswith("no name contains 'covn'")


def test_a_reader_that_stops_reading_is_no_error():
    script = (
        "import os, sys\nfrom lightning_dd.cli import main\n"
        "reader, writer = os.pipe()\nos.close(reader)\nos.dup2(writer, 1)\nsys.exit(main(['list', 'configs']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("setting", "name"), [("model", "FRePo"), ("data", "ImageFolder"), ("model.labels", "Teacher")]
)
def test_help_on_a_setting_names_the_classes_it_takes(setting, name, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--{setting}.help"])
    assert stop.value.code == 0
    assert re.search(rf"^  {name}\w* +\w", capsys.readouterr().out, re.MULTILINE)


def test_debug_shows_where_an_error_was_raised():
    with pytest.raises(UserError, match="no such file"):
        main(["export", "no.ckpt", "--output", "o", "--debug"])


def test_relabel_gives_a_set_a_teachers_labels(tmp_path):
    from lightning_dd.data import MNIST5k

    file = make_distilled(data=MNIST5k).save(tmp_path / "hard.safetensors")
    options = [
        "--teacher",
        "convnet:width=8,norm=batch",
        "--teacher_steps=60",
        "--epochs=2",
        "--output=soft.safetensors",
    ]
    assert main(["relabel", str(file), *options]) == 0
    done = DistilledSet.load("soft.safetensors")
    assert (done.label_kind, done.views.epochs, done.ipc) == ("soft", 2, 1)


def test_relabel_takes_what_a_configuration_says_of_teachers_and_views(tmp_path, capsys):
    from lightning_dd.data import MNIST5k
    from lightning_dd.models import build_network

    file = make_distilled(data=MNIST5k).save(tmp_path / "hard.safetensors")
    weights = tmp_path / "teacher.pt"
    network = build_network("convnet:width=4", 10, (1, 28, 28), seed=0)
    torch.save({name: torch.zeros_like(value) for name, value in network.state_dict().items()}, weights)
    words = ["relabel", str(file), "--teacher=convnet:width=4", "--epochs=2", "--output=soft.safetensors"]
    assert main([*words, f"--teacher_file={weights}"]) == 2
    assert "at chance" in capsys.readouterr().err  # so the file was read
    trained = ["--teacher_protocol=sre2l_cifar", "--teacher_epochs=1"]
    assert main([*words, *trained, "--teacher_steps=5"]) == 2
    assert "steps goes without a protocol" in capsys.readouterr().err
    assert main([*words, "--teacher_weights=default"]) == 2
    assert "convnet" in capsys.readouterr().err
    options = ["--padding=4", "--mix=mixup", "--tiles=2", "--protocol=sre2l_cifar", "--train_mode=true"]
    assert main([*words, *trained, *options]) == 0
    done = DistilledSet.load("soft.safetensors")
    said = done.training["relabelled"]["labels"]["init_args"]
    assert (said["teacher"]["protocol"], said["teacher"]["epochs"]) == ("sre2l_cifar", 1)
    assert (said["padding"], said["mix"], said["tiles"], said["train_mode"]) == (4, "mixup", 2, True)
    parts = (done.views.outside, done.views.shares, done.views.tiles, done.views.order)
    assert all(part is not None for part in parts)
    assert done.views.crops[..., 2:].eq(1).all()


def test_bare_names_need_no_import_in_a_fresh_process():
    distilling = [
        *("--model=FRePo", "--data=CIFAR10", "--trainer.callbacks+=MetaDD", "--trainer.callbacks.architectures=[a,b]"),
        *("--model.parameterisation=Latents", '--model.labels={"class_path": "TeacherLabels"}'),
    ]
    training = ["--model=Student", "--data=DistilledData", "--data.file=set.safetensors"]
    script = (
        "from lightning_dd.cli import main\n"
        f"for arguments in ({distilling}, {training}):\n"
        "    try: main(['fit', *arguments, '--print_config'])\n"
        "    except SystemExit as stop: assert not stop.code, arguments"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    shown = done.stdout + done.stderr
    names = ("FRePo", "CIFAR10", "MetaDD", "Latents", "TeacherLabels", "Student", "DistilledData")
    assert all(re.search(rf"class_path: lightning_dd\.[\w.]*{name}\b", shown) for name in names), shown


def test_what_no_run_can_be_made_of_is_not_among_the_models():
    from lightning_dd.lightning_cli import known_classes

    assert {"FRePo", "Student"} <= known_classes("model").keys()
    assert not {"Healthy", "Resumable", "Distiller"} & known_classes("model").keys()
