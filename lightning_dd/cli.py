"""The command line: a thin dispatcher. Nothing heavy is imported before the verb is known."""

import sys
from collections.abc import Sequence

from lightning_dd import __version__
from lightning_dd.utils.errors import UserError, unknown_name

VERBS = {
    "fit": "distil a data set, or train one student on a distilled set",
    "validate": "score a checkpoint on the validation split",
    "test": "score a checkpoint on the test split",
    "predict": "predict the test split with a checkpoint",
    "evaluate": "train architectures x seeds on distilled sets and print one table",
    "scores": "score a set's images with the help of labels and augmentation taken out",
    "membership": "attack networks trained on distilled sets: who was in the data?",
    "continual": "let classes come in steps and learn from distilled sets of the old ones",
    "export": "turn a distiller's checkpoint into a distilled-set file and a picture",
    "convert": "turn a distilled set of another project into a distilled-set file",
}
_LIGHTNING_VERBS = ("fit", "validate", "test", "predict")


def usage() -> str:
    """Return the text of ``lightning-dd --help``."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
    return (
        "usage: lightning-dd VERB [options]\n\n"
        f"Dataset distillation with PyTorch Lightning, version {__version__}.\n\n"
        f"{verbs}\n\n"
        "lightning-dd VERB --help lists a verb's options. Start with:\n"
        "  lightning-dd fit --config configs/mnist5k/frepo.yaml"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; ``None`` takes them from the process.

    Returns:
        The exit status: 0, or 2 after one line on stderr about something the user can mend.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except UserError as error:
        print(f"lightning-dd: error: {error}", file=sys.stderr)
        return 2


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"lightning-dd {__version__}")
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        raise unknown_name("verb", verb, VERBS)
    if verb in _LIGHTNING_VERBS:
        from lightning_dd.trainer_cli import run_lightning

        run_lightning(arguments)
    else:
        from lightning_dd.verbs import run_verb

        run_verb(verb, arguments[1:])
    return 0
