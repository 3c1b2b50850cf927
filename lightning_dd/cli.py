"""The command line: a thin dispatcher. Nothing heavy is imported before the verb is known."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning_dd import __version__
from lightning_dd.utils.errors import UserError, of_system, printable, unknown_name
from lightning_dd.utils.machine import settle
from lightning_dd.verbs import VERBS

LIGHTNING_VERBS = {
    "fit": "distil a data set, or train one student on a distilled set",
    "validate": "score a checkpoint on the validation split",
    "test": "score a checkpoint on the test split",
    "predict": "predict the test split with a checkpoint",
}


def usage() -> str:
    """Return the text of ``lightning-dd --help``."""
    table = LIGHTNING_VERBS | {name: verb.summary() for name, verb in VERBS.items()}
    width = max(map(len, table))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in table.items())
    return (
        "usage: lightning-dd VERB [options]\n\n"
        f"Dataset distillation with PyTorch Lightning, version {__version__}.\n\n"
        f"{verbs}\n\n"
        "lightning-dd VERB --help lists a verb's options; --debug shows where an error was raised. Start with:\n"
        "  lightning-dd fit --config mnist5k/frepo"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; ``None`` takes them from the process.

    Returns:
        The exit status: 0, or 2 after one line on stderr about something the user can mend; 130 after Ctrl-C and 143
        after SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    settle()
    if not debug:  # pages of frames where a process of several is gone, of which our own line tells
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        with _ended_by_sigterm():
            status = _dispatch([word for word in arguments if word != "--debug"])
        sys.stdout.flush()
        return status
    except (KeyboardInterrupt, SystemExit) as error:
        cause = error if isinstance(error, KeyboardInterrupt) else error.__context__  # Lightning puts one for the other
        if not isinstance(cause, KeyboardInterrupt):
            raise
        print("lightning-dd: stopped; run the same command again: what is finished is kept", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(cause, _Terminated) else signal.SIGINT)
    except BrokenPipeError:  # whoever reads the output has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes
        return 1
    except UserError as error:
        if debug:
            raise
        print(f"lightning-dd: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that was taken away
        if debug:
            raise
        print(f"lightning-dd: error: {printable(of_system(error))}", file=sys.stderr)
        return 2


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end a block in order: workers are ended, too, and files are left whole."""

    def end(number: int, frame: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"lightning-dd {__version__}")
        return 0
    verb = arguments[0]
    if verb in LIGHTNING_VERBS:
        from lightning_dd.lightning_cli import run_lightning

        run_lightning(arguments)
    elif verb in VERBS:
        from lightning_dd.parsing import parse_verb

        parse_verb(verb, VERBS[verb], arguments[1:]).run()
    else:
        raise unknown_name("verb", verb, [*LIGHTNING_VERBS, *VERBS])
    return 0
