"""Every method of every committed comparison can still be started as its file says."""

from pathlib import Path

import pytest
import yaml
from pytorch_lightning import Trainer

from lightning_dd.distillers import Distiller
from lightning_dd.lightning_cli import run_lightning

ROOT = Path(__file__).parent.parent
RUNS = [
    (path.stem, method)
    for path in sorted((ROOT / "benchmarks" / "comparisons").glob("*.yaml"))
    for method in yaml.safe_load(path.read_text(encoding="utf-8"))["methods"]
]


@pytest.mark.parametrize(("name", "method"), RUNS)
def test_a_recorded_command_can_be_run_again(name, method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr(Trainer, "fit", lambda self, model, **kwargs: started.append(model))
    experiment = yaml.safe_load((ROOT / "benchmarks" / "comparisons" / f"{name}.yaml").read_text(encoding="utf-8"))
    options = [*experiment.get("options", []), *(experiment["methods"][method] or [])]
    config = ROOT / experiment["configs"] / f"{method.partition('.')[0]}.yaml"
    run_lightning(["fit", f"--config={config}", f"--model.init_args.ipc={experiment['ipc']}", *options])
    (model,) = started
    assert isinstance(model, Distiller)
    assert model.ipc == experiment["ipc"]
