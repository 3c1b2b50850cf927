"""Bad settings, files and data: each ends with status 2 and one line that names it and what is accepted."""

import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_distilled
from test_cli import only_line, status

from lightning_dd.data import MNIST5k

RESULTS = {".safetensors", ".ckpt", ".png", ".npz", ".json", ".csv"}

SETTINGS = {
    "dm": {
        "--model.ipc=-1": "ipc (images per class) must be at least 1, got -1",
        "--model.ipc=[1]": "DM.ipc: expected int, got [1]",
        "--model.real_batch_size=0": "real_batch_size must be at least 1, got 0",
        "--model.lr=0": "lr must be positive, got 0.0",
        "--model.lr=nan": "DM.lr: expected float, got nan",
        "--model.labels=hot": "labels of DM must be one of hard, centred, soft, got 'hot'",
        "--model.init=rael": "init must be 'real', 'patches' or 'noise', got 'rael'",
        "--model.augment=flipp": "unknown augmentation 'flipp'; did you mean 'flip'?",
        "--model.architecture=": "cannot read architecture '': write name or name:option=value",
        "--model.architecture=conv:width": "cannot read the options of architecture 'conv:width'",
        "--model.architecture=conv:width=-3": "width must be a whole number of at least 1, got -3",
        "--model.architecture=conv:norm=lazy": "unknown norm 'lazy'; did you mean 'layer'?",
        "--model.architecture={conv: -1}": "architecture must be a name, names, or names with positive probabilities",
        "--model.architecture=os.system": "architecture 'os.system' is no subclass of lightning_dd.models.",
        "--model.architecture=no_such.Net": "architecture 'no_such.Net' cannot be imported",
        "--model.distance=far": "unknown distance 'far'; known: characteristic, mean, mmd",
        "--model.extractors=-1": "unknown extractors '-1'; known: interpolated, random, trained",
        "--model.parameterisation=Pixel": "unknown class for parameterisation 'Pixel'; did you mean 'Pixels'? known: ",
        "--model={class_path: DM": "unknown class for model '{class_path:'",
        "--model=3": "unknown class for model '3'; known: ",
        "--model=torch.nn.Linear": "--model: 'torch.nn.Linear' is no subclass of LightningModule",
    },
    "dc": {
        "--model.inner_lr=0": "inner_lr must be positive, got 0.0",
        "--model.pool_size=1000000000": "pool_size=1000000000 networks take ",
        "--model.inner_steps=-1": "inner_steps must be at least 1, got -1",
        "--model.pool_size=0": "pool_size must be at least 1, got 0",
    },
    "dsa": {"--model.augment=color_spin": "unknown augmentation 'spin'; known: color, crop"},
    "mtt": {
        "--model.experts=0": "experts must be at least 1, got 0",
        "--model.syn_steps=0": "syn_steps must be at least 1, got 0",
        "--model.max_start_epoch=-1": "max_start_epoch must be at least 1, got -1",
        "--model.expert_epochs=0": "expert_epochs must be at least 1, got 0",
        "--model.trajectory_epochs=0": "trajectory_epochs must be at least max_start_epoch - 1 + expert_epochs",
        "--model.lr_step_size=-1": "unknown option of MTT 'lr_step_size'; did you mean 'step_size'?",
    },
    "frepo": {
        "--model.pool_size=-2": "pool_size must be at least 1, got -2",
        "--model.views=-1": "views must be at least 0, got -1",
        "--model.kernels=0": "kernels must be at least 1, got 0",
        "--model.perturb=-1": "perturb must be at least 0, got -1.0",
        "--model.ridge=-1": "ridge must be at least 0, got -1.0",
        "--model.ridge=inf": "FRePo.ridge: expected float, got inf",
        "--model.probe.steps=1e9x": "probe.steps: expected int, got 1e9x",
        "--optimizer=Adam": "optimizer: every model here makes its own; set its rate by model.lr",
    },
    "sre2l": {
        "--model.jitter=-1": "jitter must be at least 0, or a pair of the smallest and the largest roll, got -1",
        "--model.min_scale=2": "min_scale must be in (0, 1], got 2.0",
        "--model.temperature=0": "unknown option of SRe2L 'temperature'; known: architecture",
        "--model.bn_weight=-1": "bn_weight must be at least 0, got -1.0",
        "--model.teacher.steps=0": "training on the real data: steps must be at least 1, got 0",
        "--model.teacher.file=none.pt": "teacher.file 'none.pt': no such file",
        "--model.teacher.architecture=convnet:norm=none": "choose one with batch normalisation, as convnet:norm=batch",
    },
    "rded": {
        "--model.crops=0": "crops must be at least 1, got 0",
        "--model.tiles=0": "unknown option of RDED 'tiles'; known: architecture, candidates, crop",
    },
}
"""Of methods, by configuration."""

ANY_RUN = {
    "--data.val_fraction=1": "data.val_fraction must be in [0, 1), got 1.0",
    "--data.val_fraction=-0.1": "data.val_fraction must be in [0, 1), got -0.1",
    "--data.mean=[0.1,0.2]": "data.mean must be one number per channel, 1 here, got 2",
    "--data.std=[0]": "data.std must be positive, got 0.0",
    "--data.zca_ridge=-1": "data.zca_ridge must be positive, got -1.0",
    "--data.zca_block=-1": "data.zca_block must be at least 1, got -1",
    "--data.batch_size=0": "unknown option of MNIST5k 'batch_size'; did you mean 'eval_batch_size'?",
    "--data.eval_batch_size=0": "data.eval_batch_size must be at least 1, got 0",
    "--data.image_size=0": "unknown option of MNIST5k 'image_size'",
    "--data.workers=-1": "data.workers must be at least 0, got -1",
    "--data.split_seed=x": "MNIST5k.split_seed: expected int, got x",
    "--data.on_disk=perhaps": "MNIST5k.on_disk: expected bool, got perhaps",
    "--data=ImageFolder": "the following arguments are required: root, image_size",
    "--trainer.callbacks+=os.system": "trainer.callbacks: 'os.system' is no subclass of Callback",
    "--trainer.callbacks+=MetaDD": "the following arguments are required: architectures",
    "--trainer.callbacks+=ModelCheckpoint": "more than one stateful callback of type `ModelCheckpoint`",
    "--trainer.limit_val_batches=-1": "invalid value -1.0 for limit_val_batches, it has to be in [0.0, 1.0] or an int",
    "--trainer.limit_train_batches=0": "trainer.limit_train_batches must be positive, got 0.0",
    "--trainer.overfit_batches=-1": "invalid value -1 for overfit_batches",
    "--trainer.log_every_n_steps=-1": "trainer.log_every_n_steps must be at least 0, got -1",
    "--trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches must be at least 1, got 0",
    "--trainer.gradient_clip_val=-1": "trainer.gradient_clip_val must be at least 0, got -1.0",
    "--trainer.gradient_clip_algorithm=hard": "hard is invalid. Allowed algorithms: ['value', 'norm']",
    "--trainer.min_steps=2": "trainer.min_steps must be at most trainer.max_steps, 1, got 2",
    "--trainer.plugins=none": "unknown class for trainer.plugins 'none'",
    "--trainer.max_epochs=0": "trainer.max_epochs must be at least 1, got 0",
    "--trainer.max_epochs=-7": "`max_epochs` must be a non-negative integer or -1. You passed in -7",
    "--trainer.check_val_every_n_epoch=0": "trainer.check_val_every_n_epoch must be at least 1, got 0",
    "--trainer.val_check_interval=1.5": "trainer.val_check_interval must be in [0, 1], got 1.5",
    "--trainer.max_time=soon": "is not a valid duration. Expected a string in the format DD:HH:MM:SS",
    "--trainer.profiler=fancy": "it can only be one of ['simple', 'advanced', 'pytorch', 'xla']",
    "--trainer.logger=Wandb": "unknown class for trainer.logger 'Wandb'; did you mean 'WandbLogger'?",
    "--trainer.deterministic=maybe": "trainer.deterministic: expected bool, 'warn', got maybe",
    "--trainer.benchmark=2": "trainer.benchmark: expected bool, got 2",
    "--trainer.num_nodes=two": "trainer.num_nodes: expected int, got two",
    "--trainer.reload_dataloaders_every_n_epochs=-1": "should be an int >= 0, got -1",
    "--seed_everything=x": "--seed_everything: expected bool, int, got x",
    "--ckpt_path=": "ckpt_path '': no such file",
    "--ckpt_path=.": "ckpt_path '.': no such file",
    "--config=FILES/bad.yaml": "bad.yaml' is not YAML: while parsing a flow node",
    "--config=FILES/binary.yaml": "binary.yaml' is not YAML: 'utf-8' codec can't decode",
    "--config=FILES/list.yaml": "list.yaml' must hold settings by name, found a list",
    "--config=FILES/bomb.yaml": "bomb.yaml' stands for more than 100000 settings: use fewer aliases",
    "--config=FILES": "unknown configuration",
}
"""Of any run's data and Trainer."""

SEVERAL = {
    "--model.parameterisation=MultiFormation --model.parameterisation.factor=0": "from 2 to 8, got 0",
    "--model.parameterisation=MultiFormation --model.parameterisation.factor=99": "from 2 to 8, got 99",
    "--model.parameterisation=Pyramid --model.parameterisation.levels=0": "pyramid: levels must be at least 1, got 0",
    "--model.parameterisation=Latents --model.parameterisation.generator=mine.pt": "must be the path of a class",
    "--model.parameterisation=Latents --model.parameterisation.level=9": "latents: level must be 0 to 3",
    "--model.parameterisation=Latents --model.parameterisation.lr_styles=-1": "latents: lr_styles must be positive",
    "--trainer.callbacks+=SyntheticImages --trainer.callbacks.every=0": "SyntheticImages.every must be at least 1",
    "--trainer.callbacks+=MetaDD --trainer.callbacks.architectures=[]": "architecture must be a name, names",
    "--trainer.callbacks+=MetaDD --trainer.callbacks.architectures=[covn]": "needs at least 2 architectures",
}
"""Two words for a mistake."""

EVALUATE = "evaluate FILES/set.safetensors --architectures conv --output o"
METHODS = '--methods={"dm":["mnist5k/dm"]}'
MEMBERSHIP = f"membership --output o --data MNIST5k {METHODS}"
CONTINUAL = f"continual --architectures conv --output o {METHODS}"
CONVERT = "convert --data=MNIST5k --preprocessing=pixels --output=o"
VERBS = {
    "info": "the following arguments are required: file",
    "info FILES/none.safetensors": "none.safetensors': no such file",
    "info FILES": "the folder holds neither best.safetensors nor last.safetensors",
    "info FILES/text.safetensors": "not a safetensors file, or truncated",
    "info hf://no": "must be hf://user/name, hf://user/name@revision or hf://user/name/file",
    "list methods nothing": "list methods: no name contains 'nothing'",
    "list colours": "unknown list 'colours'; known: architectures, cells, configs",
    "evaluate FILES/set.safetensors --architectures covn --output o": "'covn'; did you mean 'conv'?",
    f"{EVALUATE} --seeds=0": "seeds must be at least 1, got 0",
    f"{EVALUATE} --steps=0": "recipe.steps must be at least 1, got 0",
    f"{EVALUATE} --lr=0": "recipe.lr must be positive, got 0.0",
    f"{EVALUATE} --batch_size=0": "recipe.batch_size must be at least 1, got 0",
    "export FILES/text.ckpt --output o": "text.ckpt': not a file of torch.save, or truncated",
    "export FILES/pickle.ckpt --output o": "because only tensors and numbers are safe to load",
    "export FILES/list.ckpt --output o": "the checkpoint was not written by a lightning_dd distiller",
    "export FILES/format.ckpt --output o": "the checkpoint has format 9, this lightning_dd reads 2",
    "export FILES/junk.ckpt --output o": "junk.ckpt': damaged, or of another version ('hyper_parameters')",
    "export FILES/set.safetensors --output o --format=gif": "unknown format 'gif'",
    f"{MEMBERSHIP} --members=0 --lengths=[1]": "members must be at least 1, got 0",
    f"{MEMBERSHIP} --members=10 --lengths=[2,1]": "lengths must be increasing numbers of steps from 1, got [2, 1]",
    f"{MEMBERSHIP} --members=10 --lengths=[1] --attacks=[guess]": "unknown attack 'guess'",
    f"{MEMBERSHIP} --members=10 --lengths=[1] --shadows=3": "shadows must be 0 or an even number from 4, got 3",
    f"{MEMBERSHIP} --members=10 --lengths=[1] --victims=0": "victims must be at least 1, got 0",
    "continual --architectures conv --output o": "the following arguments are required: methods",
    f"{CONTINUAL} --steps=0": "steps must be at least 1, got 0",
    f"{CONTINUAL} --ipc=0": "ipc must be at least 1, got 0",
    f"{CONTINUAL} --orders=0": "orders must be at least 1, got 0",
    f"{CONVERT} --layout=zip --images=a": "unknown layout 'zip'",
    f"{CONVERT} --layout=frepo --images=a.npz": "images 'a.npz': layout frepo is a file, and there is none",
    f"{CONVERT} --layout=frepo --images=FILES/text.npz": "text.npz' is not an .npz file of arrays",
    f"{CONVERT} --layout=frepo --images=FILES/objects.npz": "objects.npz' is not an .npz file of arrays",
    f"{CONVERT} --layout=frepo --images=FILES/other.npz": "other.npz' has no entry 'image'; found pictures",
    f"{CONVERT} --layout=frepo --images=FILES/far.npz": "pixels must lie in [0, 1], found 1e+06",
    f"{CONVERT} --layout=frepo --images=FILES/nan.npz": "images or labels hold NaN or infinite values",
    f"{CONVERT} --layout=dc --images=FILES/list.ckpt": "list.ckpt' has no entry 'data'; found list",
}
"""Of our own verbs."""


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder of files that are not what they should be, and of one good set."""
    folder = tmp_path_factory.mktemp("files")
    make_distilled(data=MNIST5k).save(folder / "set.safetensors")
    for name in ("text.safetensors", "text.ckpt", "text.npz"):
        (folder / name).write_text("hello")
    (folder / "pickle.ckpt").write_bytes(pickle.dumps(print))
    torch.save({"lightning_dd": {"format": 2, "method": "DM"}, "state_dict": {}}, folder / "junk.ckpt")
    torch.save({"lightning_dd": {"format": 9}}, folder / "format.ckpt")
    torch.save([1, 2], folder / "list.ckpt")
    pixels, labels = np.zeros((10, 28, 28, 1), np.float32), np.eye(10, dtype=np.float32)
    np.savez(folder / "good.npz", image=pixels - 1, label=labels)
    np.savez(folder / "far.npz", image=pixels + 1e6, label=labels)
    np.savez(folder / "nan.npz", image=pixels * np.nan, label=labels)
    np.savez(folder / "small.npz", image=pixels[:, :8], label=labels)
    np.savez(folder / "other.npz", pictures=pixels)
    np.savez(folder / "objects.npz", image=np.array([print, None]), label=labels)
    (folder / "bad.yaml").write_text("model: [\n")
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    names = "abcdefghij"
    rows = [f"{name}: &{name} [{','.join([f'*{old}'] * 9)}]" for old, name in pairwise(names)]
    (folder / "bomb.yaml").write_text("\n".join(["a: &a [1]", *rows]))
    return folder


def refused(words, part, files, capsys):
    assert status([word.replace("FILES", str(files)) for word in words]) == 2
    line = only_line(capsys)
    assert part in line
    assert not line.rstrip().endswith("known:")
    assert not [path for path in Path().rglob("*") if path.suffix in RESULTS]
    assert not Path("runs").exists()


def run_of(config, *words):
    return ["fit", "--config", f"mnist5k/{config}", "--trainer.accelerator=cpu", "--trainer.max_steps=1", *words]


@pytest.mark.parametrize(("config", "word"), [(config, word) for config in SETTINGS for word in SETTINGS[config]])
def test_a_setting_of_a_method(config, word, files, capsys):
    refused(run_of(config, word), SETTINGS[config][word], files, capsys)


@pytest.mark.parametrize("word", ANY_RUN)
def test_a_setting_of_any_run(word, files, capsys):
    refused(run_of("frepo", word), ANY_RUN[word], files, capsys)


@pytest.mark.parametrize("words", SEVERAL)
def test_settings_of_what_a_run_is_made_of(words, files, capsys):
    refused(run_of("dm", *words.split()), SEVERAL[words], files, capsys)


@pytest.mark.parametrize("words", VERBS)
def test_a_word_of_a_verb(words, files, capsys):
    refused(words.split(), VERBS[words], files, capsys)


def test_there_are_enough_of_them():
    assert len(ANY_RUN) + len(SEVERAL) + len(VERBS) + sum(map(len, SETTINGS.values())) >= 120
