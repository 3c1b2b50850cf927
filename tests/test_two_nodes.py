"""Two nodes: two launcher agents on the loopback address with a static rendezvous, one process each."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_distilled

from lightning_dd.data import MNIST5k
from lightning_dd.distilled.set import DistilledSet

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow  # four imports of Lightning at once


def on_two_nodes(arguments):
    """Run ``lightning-dd`` under two agents and return what they printed."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    agents = []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": ""}
    for rank in range(2):
        launch = ["-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1"]
        meeting = ["--rdzv-backend=static", f"--rdzv-endpoint=127.0.0.1:{port}", "--master-addr=127.0.0.1"]
        command = [sys.executable, *launch, *meeting, f"--master-port={port}", "-m", "lightning_dd", *arguments]
        agents.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    try:
        outputs = [agent.communicate(timeout=240)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # ends its workers too
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)
    return outputs


def distil(folder, *extra):
    return [
        "fit",
        "--config=configs/mnist5k/frepo.yaml",
        "--trainer.max_steps=3",
        "--trainer.accelerator=cpu",
        "--trainer.strategy=ddp",
        "--trainer.limit_val_batches=0",
        "--model.init_args.architecture=conv:width=4,depth=2",
        "--model.init_args.real_batch_size=32",
        f"--trainer.logger.init_args.save_dir={folder}",
        "--trainer.logger.init_args.name=run",
        "--trainer.logger.init_args.version=0",
        *extra,
    ]


def test_a_set_distilled_on_two_nodes_is_that_of_two_processes_of_one(tmp_path):
    on_two_nodes(distil(tmp_path / "nodes", "--trainer.num_nodes=2", "--trainer.devices=1"))
    command = [sys.executable, "-m", "lightning_dd", *distil(tmp_path / "node", "--trainer.devices=2")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, timeout=240, check=True, capture_output=True)
    found = [DistilledSet.load(next((tmp_path / name).rglob("last.safetensors"))) for name in ("nodes", "node")]
    assert torch.equal(found[0].images, found[1].images)
    assert torch.equal(found[0].labels, found[1].labels)


def test_two_nodes_share_the_students_of_an_evaluation(tmp_path):
    make_distilled(data=MNIST5k).save(tmp_path / "set.safetensors")
    arguments = [
        "evaluate",
        str(tmp_path / "set.safetensors"),
        "--architectures=conv:width=4,depth=2,norm=none",
        "--seeds=2",
        "--steps=4",
        "--accelerator=cpu",
        f"--output={tmp_path / 'report'}",
    ]
    outputs = on_two_nodes(arguments)
    assert sum("report:" in output for output in outputs) == 1
    rows = json.loads((tmp_path / "report" / "results.json").read_text())
    assert len(rows) == 4
    assert len(list((tmp_path / "report" / "cells").glob("*.json"))) == 4
