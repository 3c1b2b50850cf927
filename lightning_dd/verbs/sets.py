"""Verbs that make distilled-set files."""

import inspect
from typing import Any


def export(checkpoint: str, output: str, picture: str | None = None) -> None:
    """Turn a distiller's checkpoint into a distilled-set file.

    Args:
        checkpoint: a checkpoint written by ``fit``.
        output: the distilled-set file to write.
        picture: a PNG of the images to write as well.
    """
    from lightning_dd.callbacks.images import write_picture
    from lightning_dd.distillers.load import distilled_from_checkpoint

    distilled = distilled_from_checkpoint(checkpoint)
    print(f"wrote {distilled.save(output)}")
    if picture is not None:
        print(f"wrote {write_picture(distilled, picture)}")


def convert(
    layout: str,
    images: str,
    data: str,
    preprocessing: str,
    output: str,
    labels: str | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    experiment: int = 0,
    architecture: str | None = None,
    method: str | None = None,
    root: str | None = None,
    data_args: dict[str, Any] | None = None,
) -> None:
    """Turn a distilled set of another project into a distilled-set file that ``evaluate`` takes.

    Args:
        layout: frepo (.npz, or .pt of its PyTorch branch), dc (res_*.pt of DC, DSA and DM), mtt (images_*.pt and
            labels_*.pt of MTT and DATM), sre2l or rded (folders of images).
        images: the file, or the folder of one folder per class.
        data: class name of the data set the images stand for.
        preprocessing: the space the images are in: pixels, standardise, zca (FRePo's) or kornia-zca (MTT's, DATM's).
        output: the distilled-set file to write.
        labels: the second file of layout mtt.
        mean: channel means, as [0.49,0.48,0.45]; the project's own if not given.
        std: channel standard deviations, likewise.
        experiment: which of the sets in a file of layout dc.
        architecture: what the set was distilled with, so that tables can say ``seen``.
        method: what made the set, if not what the layout is named after.
        root: folder of the data set.
        data_args: further arguments of the data set.
    """
    from lightning_dd.distilled.convert import convert_set, summary

    settings = {name: value for name, value in locals().items() if name in inspect.signature(convert_set).parameters}
    distilled = convert_set(**settings)
    print(f"wrote {distilled.save(output)}: {summary(distilled)}")
