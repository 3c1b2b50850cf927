"""Our own verbs: a dataclass each, whose fields are the verb's options. Importing this imports nothing heavy."""

from dataclasses import dataclass, field, fields
from typing import Any

ARCHITECTURES = "as name or name:option=value,..., or groups: unseen-small, unseen, frepo-cross, zoo-small"


def _option(text: str, default: Any, **kind: bool) -> Any:
    """An option; of the kinds ``words`` (several of them) and ``positional`` (it needs no ``--name``)."""
    fallback = {"default_factory": default} if callable(default) else {"default": default}
    return field(metadata={"help": text, **kind}, **fallback)


def _required(text: str, **kind: bool) -> Any:
    return field(metadata={"help": text, **kind})


class Verb:
    """A verb; its docstring's first line is the help, ``metadata`` of its fields what is said of each option."""

    def run(self) -> None:
        """Do it."""
        raise NotImplementedError

    @classmethod
    def summary(cls) -> str:
        """Return the first line of the docstring, as the list of verbs shows it."""
        line = (cls.__doc__ or "").partition("\n")[0].rstrip(".")
        return line[0].lower() + line[1:]


@dataclass(kw_only=True)
class _Students:
    """How students are trained."""

    seeds: int = _option("students per architecture and source", 3)
    steps: int | None = _option("training steps of a student, in place of the protocol's", None)
    lr: float | None = _option("peak learning rate of a student, likewise", None)
    batch_size: int | None = _option("synthetic images per step, likewise; at most all", None)
    augment: str | None = _option(
        "operations joined by _, auto for FRePo's, siamese for DSA's, none for none; likewise", None
    )

    def changes(self) -> dict[str, Any]:
        """Return what replaces settings of the protocol."""
        return {"steps": self.steps, "lr": self.lr, "batch_size": self.batch_size, "augment": self.augment}


@dataclass(kw_only=True)
class _Source:
    """How real data is found."""

    data_args: dict[str, Any] = _option("arguments of the data", dict)
    root: str | None = _option("folder of the real data on this machine", None)

    def choice(self) -> Any:
        """Return it as a :class:`~lightning_dd.data.registry.DataChoice`."""
        from lightning_dd.data.registry import DataChoice

        return DataChoice(getattr(self, "data", None), self.data_args, self.root)


@dataclass(kw_only=True)
class _Workers:
    """Where students are trained."""

    accelerator: str = _option("Lightning's Trainer argument", "auto")
    workers: int | str = _option("processes of this machine that train side by side, or auto for one per core", 1)


@dataclass(kw_only=True)
class _Data(_Source):
    """Which real data is meant."""

    data: str | None = _option(
        "real data to score on: a class name, or the class path of your own; what the set says of itself if not given",
        None,
    )


@dataclass(kw_only=True)
class Evaluate(_Students, _Data, _Workers, Verb):
    """Train architectures x seeds on distilled sets and on random real images; print and write one table."""

    files: list[str] = _required("distilled-set files, or run folders", words=True, positional=True)
    architectures: list[str] = _required(f"of the students, {ARCHITECTURES}", words=True)
    output: str = _required("folder of the report and the TensorBoard logs")
    protocol: list[str] = _option(
        "published recipe: frepo, dc, dsa, mtt, glad, sre2l or rded; several make a matrix",
        lambda: ["frepo"],
        words=True,
    )
    ema: float | None = _option("decay of a moving average of the weights; 0 for none", None)
    devices: int = _option("processes per student", 1)
    strategy: str = _option("Lightning's Trainer argument, ddp for several processes", "auto")

    def run(self) -> None:
        """Train and report."""
        from lightning_dd.api import evaluate

        settings = dict(vars(self))
        evaluate(settings.pop("files"), **settings)


@dataclass(kw_only=True)
class Scores(_Students, _Data, _Workers, Verb):
    """Score a set's images with the help of labels and augmentation taken out (DD-Ranking)."""

    files: list[str] = _required("distilled-set files", words=True, positional=True)
    architectures: list[str] = _required(f"of the students, {ARCHITECTURES}", words=True)
    output: str = _required("folder of the report")
    protocol: str = _option("published recipe of the students", "frepo")
    full_steps: int = _option("training steps on the whole real training split", 2000)
    full_lr: float = _option("their peak learning rate", 1e-3)
    full_batch_size: int = _option("their images per step", 128)
    control: str | None = _option(
        "random real images with soft labels of the same teacher, for sets with soft labels", None
    )

    def run(self) -> None:
        """Train and report."""
        from lightning_dd.evaluators.matrix import Hardware
        from lightning_dd.evaluators.robustness import score_files
        from lightning_dd.students.recipe import protocol

        recipe = protocol(self.protocol, **self.changes())
        full = {"steps": self.full_steps, "lr": self.full_lr, "batch_size": self.full_batch_size}
        on_all = protocol("frepo", **full, augment=recipe.augment)
        trained = (self.files, self.architectures, self.output, self.seeds, recipe, on_all)
        score_files(*trained, self.control, self.choice(), Hardware(self.accelerator), self.workers)


@dataclass(kw_only=True)
class Membership(_Source, _Workers, Verb):
    """Attack networks trained on distilled sets: who was in the data?"""

    methods: dict[str, list[str] | str] = _required(
        "by name, configurations of a distiller with options of fit, or distilled-set files, one a seed"
    )
    output: str = _required("folder of the report and all networks' answers")
    data: str = _required("class name of the data whose training split the members are drawn from")
    members: int = _required("training images that are distilled, per seed")
    lengths: list[int] = _required("training steps after which a victim is attacked")
    held_out: int = _option("non-members cut from the training split; 0 takes the test split", 0)
    seeds: int = _option("disjoint sets of members, each distilled with its own seed", 1)
    victims: int = _option("networks per source and seed", 5)
    architecture: str = _option("of the victims", "conv:norm=none")
    lr: float = _option("constant learning rate of Adam", 3e-4)
    batch_size: int = _option("images per step, at most all", 256)
    real_batch_size: int = _option("the same for training on all members", 1024)
    augment: str = _option("operations joined by _, auto for FRePo's, none for none", "auto")
    real_augment: str | None = _option("the same for training on all members; as augment if not given", None)
    attacks: list[str] | None = _option(
        "of threshold, logistic, mlp, forest, neighbours and lira; all if not given", None
    )
    folds: int = _option("cross-validation of the four learned attacks", 5)
    attack_rows: int = _option("members and non-members a learned attack is given, at most", 2000)
    shadows: int = _option("LiRA's shadow models per real source and seed, 0 or an even number from 4", 0)
    distil_shadows: int = _option(
        "LiRA's shadow models per method and seed, each with a distillation of its own; likewise", 0
    )
    val_fraction: float = _option("share of the members kept from training for a distiller's validation", 0.0)

    def run(self) -> None:
        """Distil, train, attack and report."""
        from pathlib import Path

        from lightning_dd.applications.membership.experiment import ATTACKS, Experiment
        from lightning_dd.applications.membership.run import run_membership
        from lightning_dd.experiment import parse_methods
        from lightning_dd.students.recipe import Recipe

        settings = {item.name: getattr(self, item.name) for item in fields(Experiment) if hasattr(self, item.name)}
        settings |= {
            "output": Path(self.output),
            "data": self.choice(),
            "methods": parse_methods(self.methods, finished=True),
            "lengths": tuple(self.lengths),
            "recipe": Recipe(
                lr=self.lr, warmup=0, schedule="constant", batch_size=self.batch_size, augment=self.augment
            ),
            "attacks": tuple(self.attacks or ATTACKS),
        }
        run_membership(Experiment(**settings), self.workers)


@dataclass(kw_only=True)
class Continual(_Source, Verb):
    """Let classes come in steps, keep a distilled set of each, and train students after every step."""

    methods: dict[str, list[str]] = _required(
        "by name, configuration files of a distiller (the later layered over the earlier) and options of fit"
    )
    architectures: list[str] = _required("of the students, names of the factory", words=True)
    output: str = _required("folder of the report and of everything distilled; an interrupted experiment goes on")
    data: str = _option("class name of the data", "MNIST5k")
    steps: int = _option("equal parts the classes come in", 5)
    ipc: int = _option("images kept of every class", 20)
    orders: int = _option("class orders, drawn by the seeds 0, 1, ...", 5)
    students: int = _option("students per architecture, method, order and step", 1)
    protocol: str = _option("published recipe of the students on the memory", "frepo")
    student_steps: int | None = _option("training steps of a student, in place of the protocol's", None)
    lr: float | None = _option("its peak learning rate, likewise", None)
    batch_size: int | None = _option("images per step, likewise; at most all", None)
    augment: str | None = _option("operations joined by _; auto, siamese or none; likewise", None)
    joint: bool = _option("also train students on all real images of the classes seen, as the upper line", True)
    joint_steps: int = _option("their training steps", 2000)
    joint_lr: float = _option("their peak learning rate", 1e-3)
    joint_batch_size: int = _option("their images per step", 128)
    accelerator: str = _option("Lightning's Trainer argument; auto leaves distillers what they say", "auto")

    def run(self) -> None:
        """Distil, train and report."""
        from lightning_dd.applications.continual import Plan, run_continual
        from lightning_dd.experiment import parse_methods
        from lightning_dd.students.recipe import protocol

        settings = {"lr": self.lr, "batch_size": self.batch_size, "augment": self.augment}
        upper = {"steps": self.joint_steps, "lr": self.joint_lr, "batch_size": self.joint_batch_size}
        plan = Plan(
            **{name: getattr(self, name) for name in ("steps", "ipc", "orders")},
            data=self.choice(),
            architectures=tuple(self.architectures),
            students=self.students,
            recipe=protocol(self.protocol, steps=self.student_steps, **settings),
            joint=protocol("frepo", **upper, augment=self.augment) if self.joint else None,
            accelerator=self.accelerator,
        )
        run_continual(parse_methods(self.methods), plan, self.output)


@dataclass(kw_only=True)
class Export(Verb):
    """Turn a distiller's checkpoint into a distilled-set file and a picture."""

    checkpoint: str = _required("a checkpoint written by fit", positional=True)
    output: str = _required("the distilled-set file to write")
    picture: str | None = _option("a PNG of the images to write as well", None)

    def run(self) -> None:
        """Write the file."""
        from lightning_dd.callbacks.pictures import write_picture
        from lightning_dd.distillers.checkpoint import distilled_from_checkpoint

        distilled = distilled_from_checkpoint(self.checkpoint)
        print(f"wrote {distilled.save(self.output)}")
        if self.picture is not None:
            print(f"wrote {write_picture(distilled, self.picture)}")


@dataclass(kw_only=True)
class Relabel(_Data, Verb):
    """Give a finished set a teacher's labels, or a committee's."""

    file: str = _required("a distilled-set file, ours or converted", positional=True)
    teacher: list[str] = _required("architectures of the teachers; several are a committee", words=True)
    output: str = _required("the distilled-set file to write")
    teacher_steps: int = _option("training steps of each teacher on the real data", 1000)
    teacher_lr: float = _option("their peak learning rate", 2e-3)
    epochs: int = _option("epochs of views that are labelled and stored; 0 labels the images only", 300)
    min_scale: float = _option("smallest area of a view's crop as a share of the image's", 0.08)
    temperature: float = _option("of the students' softmax", 20.0)
    seed: int = _option("of the views", 0)

    def run(self) -> None:
        """Write the relabelled file."""
        from lightning_dd.distilled.datamodule import real_data_of
        from lightning_dd.distilled.set import DistilledSet
        from lightning_dd.pretrained import Teacher
        from lightning_dd.synthetic.labels import TeacherLabels, relabel

        distilled = DistilledSet.load(self.file)
        teacher = Teacher(list(self.teacher), steps=self.teacher_steps, lr=self.teacher_lr)
        labels = TeacherLabels(teacher, self.epochs, self.min_scale, self.temperature)
        done = relabel(distilled, labels, real_data_of(distilled, self.choice()), self.teacher[0], self.seed)
        print(f"wrote {done.save(self.output)}")


@dataclass(kw_only=True)
class Convert(_Source, Verb):
    """Turn a distilled set of another project into a distilled-set file that evaluate takes."""

    layout: str = _required(
        "frepo (.npz, or .pt of its PyTorch branch), dc (res_*.pt of DC, DSA and DM), mtt (images_*.pt and labels_*.pt "
        "of MTT and DATM), sre2l or rded (folders of images)"
    )
    images: str = _required("the file, or the folder of one folder per class")
    data: str = _required("class name of the data set the images stand for")
    preprocessing: str = _required(
        "the space the images are in: pixels, standardise, zca (FRePo's) or kornia-zca (MTT's, DATM's)"
    )
    output: str = _required("the distilled-set file to write")
    labels: str | None = _option("the second file of layout mtt", None)
    mean: list[float] | None = _option("channel means, as [0.49,0.48,0.45]; the project's own if not given", None)
    std: list[float] | None = _option("channel standard deviations, likewise", None)
    experiment: int = _option("which of the sets in a file of layout dc", 0)
    architecture: str | None = _option("what the set was distilled with, so that tables can say seen", None)
    method: str | None = _option("what made the set, if not what the layout is named after", None)

    def run(self) -> None:
        """Write the file."""
        from lightning_dd.distilled.convert import convert_set, summary

        settings = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "output"}
        distilled = convert_set(**settings)
        print(f"wrote {distilled.save(self.output)}: {summary(distilled)}")


@dataclass(kw_only=True)
class List(Verb):
    """Name what there is: configs, methods, architectures, protocols or data."""

    what: str = _required("configs, methods, architectures, protocols or data", positional=True)
    pattern: str = _option("show only names that contain this", "", positional=True)

    def run(self) -> None:
        """Print a line each."""
        from lightning_dd.listing import listing

        for name, text in listing(self.what, self.pattern):
            print(f"{name:<28} {text}".rstrip())


VERBS: dict[str, type[Verb]] = {
    "evaluate": Evaluate,
    "scores": Scores,
    "membership": Membership,
    "continual": Continual,
    "relabel": Relabel,
    "export": Export,
    "convert": Convert,
    "list": List,
}
"""The verbs by name."""
