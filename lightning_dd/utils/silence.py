"""Hide what libraries say that says nothing about this project's runs."""

import logging
import warnings

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
)
_BARS = logging.getLogger("lightning_dd.bars")  # logs nothing: its switch is the process's


def quieten(*, bar_only: bool = False) -> None:
    """Filter known noise out of warnings and log.

    Args:
        bar_only: keep Lightning's messages about each Trainer, and bars of trainings within one, out as well: for one
            bar or one line per result over many Trainers.
    """
    for text in _NOISE:
        warnings.filterwarnings("ignore", message=text)
    warnings.filterwarnings("ignore", module="pytorch_lightning.cli")  # its calls of older jsonargparse functions
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(_no_tips)
    if bar_only:
        for name in ("pytorch_lightning", "lightning_fabric.utilities.seed"):
            logging.getLogger(name).setLevel(logging.WARNING)


def show_bars(wanted: bool) -> None:
    """Say whether trainings within the run that follows may show bars of their own."""
    _BARS.disabled = not wanted


def wants_bars() -> bool:
    """Tell whether a training within a run may show a bar of its own."""
    return not _BARS.disabled and logging.getLogger("pytorch_lightning").getEffectiveLevel() < logging.WARNING


def _no_tips(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()
