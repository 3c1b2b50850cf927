"""Hide what libraries say that says nothing about this project's runs."""

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NOISE = (
    ".*LeafSpec.*",
    ".*does not have many workers.*",  # the data is on the device already
    ".*LightningCLI's args parameter is intended.*",
    ".*`IterableDataset` has `__len__` defined.*",
    ".*but have no `val_dataloader`.*",
    ".*Total length of `list` across ranks is zero.*",  # data without a validation split
    ".*`max_epochs` was not set.*",  # a student's protocol says how long it is
    ".*WeightAveraging callback with a model that overrides.*",  # a student is on one device
    ".*your dataloader is not resumable.*",  # it need not be: modules draw their own batches
    ".*Glyph .* missing from font.*",  # a class name in letters that matplotlib's font lacks
)


_format, _usual = warnings.formatwarning, threading.excepthook


def quieten() -> None:
    """Filter known noise out of warnings and log, and leave the place in the code out of the project's own warnings.

    TensorBoard's thread does not show where a full disk met it: whoever writes the next curve is told, and ends it all.
    """
    warnings.formatwarning, threading.excepthook = _without_place, _no_writers
    for text in _NOISE:
        warnings.filterwarnings("ignore", message=text)
    warnings.filterwarnings("ignore", module="pytorch_lightning.cli")  # its calls of older jsonargparse functions
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(_no_tips)


@contextmanager
def quiet_trainers() -> Iterator[None]:
    """Keep what Lightning says of each Trainer out of a block, or of a function, that shows many as one bar."""
    quieten()
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric.utilities.seed")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _without_place(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    own = Path(filename).is_relative_to(Path(__file__).parents[1])
    return f"warning: {message}\n" if own else _format(message, category, filename, lineno, line)


def _no_writers(raised: threading.ExceptHookArgs) -> None:
    if not (isinstance(raised.exc_value, OSError) and type(raised.thread).__name__ == "_AsyncWriterThread"):
        _usual(raised)


def _no_tips(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in ("Tip:", "TPU available: False"))
