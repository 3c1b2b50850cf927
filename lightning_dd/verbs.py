"""Our own verbs: a dataclass each, whose fields are the verb's options. Importing this imports nothing heavy."""

from dataclasses import dataclass
from typing import Any

from lightning_dd import applications
from lightning_dd.parsing import Verb, option
from lightning_dd.utils.errors import UserError, printable

ARCHITECTURES = "as name or name:option=value,..., or groups: unseen-small, unseen, frepo-cross, zoo-small"


@dataclass(kw_only=True)
class _Students:
    """How students are trained."""

    seeds: int = option("students per architecture and source", 3)
    steps: int | None = option("training steps of a student, in place of the protocol's", None)
    lr: float | None = option("peak learning rate of a student, likewise", None)
    batch_size: int | None = option("synthetic images per step, likewise; at most all", None)
    augment: str | None = option(
        "operations joined by _, paths to your own by +, auto for FRePo's, siamese for DSA's, or none; likewise", None
    )


@dataclass(kw_only=True)
class _Data:
    """Which real data is meant, and how it is found."""

    data: str | None = option(
        "real data to score on: a class name, or the class path of your own; what the set says of itself if not given",
        None,
    )
    data_args: dict[str, Any] = option("arguments of the data", dict)
    root: str | None = option("folder of the real data on this machine", None)

    def choice(self) -> Any:
        """Return it as a :class:`~lightning_dd.data.parts.DataChoice`."""
        from lightning_dd.data.parts import DataChoice

        return DataChoice(self.data, self.data_args, self.root)


@dataclass(kw_only=True)
class _Workers:
    """Where students are trained."""

    accelerator: str = option("Lightning's Trainer argument", "auto")
    workers: int | str = option("processes that train side by side; auto is one per core, or per GPU", "auto")


@dataclass(kw_only=True)
class Evaluate(_Students, _Data, _Workers, Verb):
    """Train architectures x seeds on distilled sets and on random real images; print and write one table."""

    files: list[str] = option("distilled-set files, or run folders", words=True, positional=True)
    architectures: list[str] = option(f"of the students, {ARCHITECTURES}", words=True)
    output: str = option("folder of the report and the TensorBoard logs")
    protocol: list[str] = option(
        "published recipe: frepo, dc, dsa, mtt, glad, sre2l or rded; several make a matrix",
        lambda: ["frepo"],
        words=True,
    )
    ema: float | None = option("decay of a moving average of the weights; 0 for none", None)
    devices: int = option("processes per student", 1)
    strategy: str = option("Lightning's Trainer argument, ddp for several processes", "auto")
    names: list[str] = option("what the sets are called in the report, one for each file", list, words=True)
    labels: list[str] = option(
        "every set once more with these labels: hard, static (a teacher's, of the images), dynamic (of new views in "
        "every pass) or seen (likewise, of the network it was distilled with, trained on it), and random real images "
        "with the same beside",
        list,
        words=True,
    )
    teacher: list[str] = option("architectures of the teacher of those; several are a committee", list, words=True)
    teacher_steps: int = option("training steps of each on the real data", 1000)
    probe: str | None = option(
        "train a linear layer alone, on frozen features of these weights: default or a name that timm or torchvision "
        "publishes, or a file",
        None,
    )

    def run(self) -> None:
        """Train and report."""
        from lightning_dd.api import evaluate
        from lightning_dd.pretrained import Teacher

        settings = dict(vars(self))
        asked, steps = settings.pop("teacher"), settings.pop("teacher_steps")
        teacher = Teacher(list(asked), steps=steps) if asked else None
        evaluate(settings.pop("files"), **settings, teacher=teacher)


@dataclass(kw_only=True)
class Scores(_Students, _Data, _Workers, Verb):
    """Score a set's images with the help of labels and augmentation taken out (DD-Ranking)."""

    files: list[str] = option("distilled-set files", words=True, positional=True)
    architectures: list[str] = option(f"of the students, {ARCHITECTURES}", words=True)
    output: str = option("folder of the report")
    protocol: str = option("published recipe of the students", "frepo")
    full_steps: int = option("training steps on the whole real training split", 2000)
    full_lr: float = option("their peak learning rate", 1e-3)
    full_batch_size: int = option("their images per step", 128)
    control: str | None = option(
        "random real images with soft labels of the same teacher, for sets with soft labels", None
    )

    def run(self) -> None:
        """Train and report."""
        from lightning_dd.evaluators.matrix import Hardware
        from lightning_dd.evaluators.robustness import score_files
        from lightning_dd.students.recipe import protocol

        changes = {"steps": self.steps, "lr": self.lr, "batch_size": self.batch_size, "augment": self.augment}
        recipe = protocol(self.protocol, **changes)
        full = {"steps": self.full_steps, "lr": self.full_lr, "batch_size": self.full_batch_size}
        on_all = protocol("frepo", **full, augment=recipe.augment)
        trained = (self.files, self.architectures, self.output, self.seeds, recipe, on_all)
        score_files(*trained, self.control, self.choice(), Hardware(self.accelerator), self.workers)


@dataclass(kw_only=True)
class Info(Verb):
    """Say what a distilled set is and how it was made."""

    file: str = option("a distilled-set file, or a run's folder", positional=True)
    config: bool = option("print the run as a configuration that fit takes instead", False, flag=True)

    def run(self) -> None:
        """Print it."""
        from lightning_dd.api import nearest_cell
        from lightning_dd.distilled.card import facts_of
        from lightning_dd.distilled.set import DistilledSet, find_set

        path = find_set(self.file)
        distilled = DistilledSet.load(path)
        if self.config:
            import yaml

            from lightning_dd.reproduce import run_of

            print(yaml.safe_dump(run_of(distilled), sort_keys=False, allow_unicode=True), end="")
            return
        for name, text in facts_of(distilled, path).items():
            print(f"{name:<14} {printable(text)}")
        if text := nearest_cell(distilled):
            print(text)


@dataclass(kw_only=True)
class Reproduce(Verb):
    """Run a distilled set's own run again and compare."""

    file: str = option("a distilled-set file, or a run's folder", positional=True)
    output: str | None = option("a new folder for the run; the next version in runs/reproduced if not given", None)
    root: str | None = option("folder of the real data on this machine, where it is your own", None)
    accelerator: str = option("Lightning's Trainer argument", "auto")
    trust: bool = option("let the file name classes of other packages, which are imported and run", False)

    def run(self) -> None:
        """Run and compare."""
        from lightning_dd.reproduce import reproduce

        print(reproduce(**vars(self)))


@dataclass(kw_only=True)
class Export(Verb):
    """Turn a checkpoint into a distilled-set file, or either into images, parquet or npz, and a picture."""

    file: str = option("a checkpoint written by fit, a distilled-set file, or a run's folder", positional=True)
    output: str = option("the file to write; of images, the folder")
    format: str = option("set, images (a folder per class), parquet (the Hugging Face layout) or npz", "set")
    picture: str | None = option("a PNG of the images to write as well", None)

    def run(self) -> None:
        """Write the file."""
        from pathlib import Path

        from lightning_dd.callbacks.pictures import write_picture
        from lightning_dd.distilled.export import export_set
        from lightning_dd.distilled.hub import is_address
        from lightning_dd.distilled.set import DistilledSet
        from lightning_dd.distillers.checkpoint import distilled_from_checkpoint

        finished = self.file.endswith(".safetensors") or is_address(self.file) or Path(self.file).is_dir()
        distilled = DistilledSet.load(self.file) if finished else distilled_from_checkpoint(self.file)
        for line in export_set(distilled, self.format, self.output):
            print(line)
        if self.picture is not None:
            print(f"wrote {write_picture(distilled, self.picture)}")


@dataclass(kw_only=True)
class Push(Verb):
    """Put a distilled set on the Hugging Face hub, with a card and its configuration."""

    file: str = option("a distilled-set file, or a run's folder", positional=True)
    repo: str = option("user/name; hf://user/name then names the set wherever a file goes", positional=True)
    licence: str = option("of the real data, as hubs name it (cc-by-4.0)", "unknown")
    report: str | None = option("folder of an evaluation of this file, whose accuracies the card shows", None)
    private: bool = option("let nobody else see a new repository", False)

    def run(self) -> None:
        """Write the card and push."""
        from pathlib import Path

        import yaml

        from lightning_dd.distilled.card import data_card
        from lightning_dd.distilled.hub import FILE, push_files
        from lightning_dd.distilled.set import DistilledSet, find_set

        path = find_set(self.file)
        distilled = DistilledSet.load(path)
        card = data_card(distilled, path, self.licence, Path(self.report) if self.report else None)
        run = yaml.safe_dump(distilled.run, sort_keys=False, allow_unicode=True)
        files = {FILE: path, "README.md": card.encode(), "run.yaml": run.encode()}
        print(f"pushed: {push_files(self.repo, files, self.private)}")


@dataclass(kw_only=True)
class Relabel(_Data, Verb):
    """Give a finished set a teacher's labels, or a committee's."""

    file: str = option("a distilled-set file, ours or converted", positional=True)
    teacher: list[str] = option("architectures of the teachers; several are a committee", words=True)
    output: str = option("the distilled-set file to write")
    teacher_steps: int = option("training steps of each teacher on the real data", 1000)
    teacher_lr: float = option("their peak learning rate", 2e-3)
    teacher_protocol: str | None = option(
        "a published training of the teachers in place of these, sre2l_cifar or sre2l_tiny", None
    )
    teacher_epochs: int | None = option("epochs of it, if not the published ones", None)
    teacher_file: str | None = option("a trained teacher of your own: one of the cache, or weights", None)
    teacher_weights: str | None = option("what timm or torchvision publishes: default, or a name of theirs", None)
    epochs: int = option("epochs of views that are labelled and stored; 0 labels the images only", 300)
    min_scale: float = option("smallest area of a view's crop as a share of the image's", 0.08)
    padding: int = option("pixels of black around an image, from which a crop of its size is cut instead", 0)
    mix: str = option("what is done with another image's view: cutmix, mixup or none", "cutmix")
    tiles: int = option("along a side of an image, shuffled in every view (RDED); 1 for none", 1)
    train_mode: bool = option("have the teachers' batch normalisation use the statistics of each batch", False)
    protocol: str = option("published recipe of the students, whose batches are mixed among themselves", "sre2l")
    temperature: float = option("of the students' softmax", 20.0)
    seed: int = option("of the views", 0)

    def run(self) -> None:
        """Write the relabelled file."""
        from lightning_dd.distilled.datamodule import real_data_of
        from lightning_dd.distilled.set import DistilledSet
        from lightning_dd.pretrained import Teacher
        from lightning_dd.synthetic.labels import TeacherLabels, relabel

        distilled = DistilledSet.load(self.file)
        how = {name: getattr(self, f"teacher_{name}") for name in ("protocol", "epochs", "file", "weights")}
        names = ("epochs", "min_scale", "temperature", "padding", "mix", "tiles", "protocol", "train_mode")
        teacher = Teacher(list(self.teacher), steps=self.teacher_steps, lr=self.teacher_lr, **how)
        labels = TeacherLabels(teacher, **{name: getattr(self, name) for name in names})
        done = relabel(distilled, labels, real_data_of(distilled, self.choice()), self.teacher[0], self.seed)
        print(f"wrote {done.save(self.output)}")


@dataclass(kw_only=True)
class Convert(_Data, Verb):
    """Turn a distilled set of another project into a distilled-set file that evaluate takes."""

    layout: str = option(
        "frepo (.npz, or .pt of its PyTorch branch), dc (res_*.pt of DC, DSA and DM), mtt (images_*.pt and labels_*.pt "
        "of MTT and DATM), sre2l or rded (folders of images)"
    )
    images: str = option("the file, or the folder of one folder per class")
    data: str = option("class name of the data set the images stand for")
    preprocessing: str = option(
        "the space the images are in: pixels, standardise, zca (FRePo's) or kornia-zca (MTT's, DATM's)"
    )
    output: str = option("the distilled-set file to write")
    labels: str | None = option("the second file of layout mtt", None)
    mean: list[float] | None = option("channel means, as [0.49,0.48,0.45]; the project's own if not given", None)
    std: list[float] | None = option("channel standard deviations, likewise", None)
    experiment: int = option("which of the sets in a file of layout dc", 0)
    architecture: str | None = option("what the set was distilled with, so that tables can say seen", None)
    method: str | None = option("what made the set, if not what the layout is named after", None)

    def run(self) -> None:
        """Write the file."""
        from lightning_dd.distilled.convert import convert_set, summary

        settings = dict(vars(self))
        output = settings.pop("output")
        distilled = convert_set(**settings)
        print(f"wrote {distilled.save(output)}: {summary(distilled)}")


@dataclass(kw_only=True)
class List(Verb):
    """Name what there is: configs, cells of papers' tables, methods, architectures, protocols, data or sets."""

    what: str = option("configs, cells, methods, architectures, protocols, data or sets", "", positional=True)
    pattern: str = option("show only names that contain this", "", positional=True)

    def run(self) -> None:
        """Print a line each."""
        from lightning_dd.listing import listed

        found = [(name, text) for name, text in listed(self.what) if self.pattern.lower() in name.lower()]
        if not found:
            raise UserError(f"list {self.what}: no name contains '{self.pattern}'")
        for name, text in found:
            print(f"{name:<28} {text}".rstrip())


VERBS: dict[str, type[Verb]] = {
    "evaluate": Evaluate,
    "scores": Scores,
    "membership": applications.Membership,
    "continual": applications.Continual,
    "info": Info,
    "reproduce": Reproduce,
    "relabel": Relabel,
    "export": Export,
    "push": Push,
    "convert": Convert,
    "list": List,
}
"""The verbs by name."""
