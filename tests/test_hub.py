"""Sharing a set: pushed to and fetched from a local stand-in for the hub's HTTP interface."""

import base64
import hashlib
import json
import re
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from helpers import make_distilled
from test_cli import only_line, status

from lightning_dd import DistilledSet
from lightning_dd.cli import main
from lightning_dd.data import MNIST5k
from lightning_dd.distilled.hub import builtin_sets
from lightning_dd.evaluators.matrix import Row

COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as pushing small files and fetching one needs."""

    files: dict[str, bytes]
    asked: list[str]

    def log_message(self, *args):
        pass

    def answer(self, content=b"", code=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        self.asked.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(
                {
                    "success": True,
                    "commitOid": COMMIT,
                    "commitUrl": f"http://{self.headers['Host']}/datasets/me/digits/commit/{COMMIT}",
                }
            )
        else:
            here = f"http://{self.headers['Host']}"
            self.answer({"url": f"{here}/datasets/me/digits", "name": "me/digits", "id": "me/digits"})

    def do_GET(self):
        self.asked.append(f"{self.command} {self.path}")
        found = re.fullmatch(r"/datasets/me/digits/resolve/[^/]+/(.+)", self.path)
        if not found or found[1] not in self.files:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        content = self.files[found[1]]
        return self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path):
    handler = type("OneHub", (Hub,), {"files": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    yield handler
    server.shutdown()
    server.server_close()


def test_a_pushed_set_is_fetched_wherever_a_file_goes(hub, tmp_path, capsys):
    made = make_distilled(ipc=1, data=MNIST5k, method="FRePo", run={"seed_everything": 3})
    path = made.save(tmp_path / "set.safetensors")
    row = Row("digits", "resnet18", False, "distilled", 0, 0.75, None, None, 10, 1, "FRePo")
    real = Row("digits", "resnet18", False, "random-real", 0, 0.5, None, None, 10, 1, "random-real")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "results.json").write_text(json.dumps([asdict(row), asdict(real)]))
    said = {"sets": {"digits": {"blake2b": hashlib.blake2b(path.read_bytes()).hexdigest()}}}
    (tmp_path / "report" / "provenance.json").write_text(json.dumps(said))
    assert main(["push", str(path), "me/digits", "--licence=cc-by-sa-3.0", "--report=report"]) == 0
    assert "pushed: hf://me/digits" in capsys.readouterr().out
    assert set(hub.files) == {"distilled.safetensors", "README.md", "run.yaml"}
    card = hub.files["README.md"].decode()
    for part in (
        'license: "cc-by-sa-3.0"',
        "FRePo of MNIST5k, 1 image(s) per class",
        "half squared error",
        "| `resnet18` | no | 75.0 | 50.0 |",
        "seed_everything: 3",
        "10 classes x 1 images of 1x28x28",
    ):
        assert part in card
    assert str(tmp_path) not in card
    assert DistilledSet.load("hf://me/digits").images.equal(made.images)
    assert main(["info", "hf://me/digits"]) == 0
    assert "FRePo: 10 classes" in capsys.readouterr().out
    arguments = ["--architectures=conv:width=4,depth=2", "--steps=1", "--seeds=1", "--accelerator=cpu", "--output=r"]
    assert main(["evaluate", "hf://me/digits", *arguments]) == 0


def test_a_report_of_other_files_is_refused(tmp_path, capsys):
    path = make_distilled().save(tmp_path / "set.safetensors")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "results.json").write_text("[]")
    (tmp_path / "report" / "provenance.json").write_text('{"sets": {}}')
    assert status(["push", str(path), "me/digits", "--report=report"]) == 2
    assert "report 'report' is of other files" in only_line(capsys)


@pytest.mark.parametrize(
    ("address", "message"),
    [("hf://me/nothing", "cannot be fetched"), ("hf://me", "must be hf://user/name"), ("hf://a//b", "must be hf://")],
)
def test_what_is_not_there_is_one_line(hub, address, message, capsys):
    assert status(["info", address]) == 2
    assert message in only_line(capsys)


def test_offline_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    path = make_distilled().save(tmp_path / "set.safetensors")
    assert status(["push", str(path), "me/digits"]) == 2
    assert "needs a hub that can be reached" in only_line(capsys)
    assert status(["info", "hf://me/digits"]) == 2
    assert "needs a hub that can be reached" in only_line(capsys)


def test_sets_that_come_with_the_package_are_named_wherever_a_file_goes(capsys, tmp_path):
    sets = builtin_sets()
    assert len(sets) >= 6
    for address, path in sets.items():
        distilled, size = DistilledSet.load(address), path.stat().st_size
        assert size < 4 * distilled.images.numel() + 40_000  # no matrices travel along
        data = {"MNIST5k": "mnist5k", "ParquetImages": "cifar10"}[distilled.data["name"]]
        said = f"builtin:{data}_{distilled.method}_ipc{distilled.ipc}".lower()
        assert (said, distilled.run["seed_everything"]) == (address, 0)
    assert main(["info", "builtin:mnist5k_frepo_ipc1"]) == 0
    assert main(["export", "builtin:mnist5k_frepo_ipc1", "--format=npz", "--output=a.npz"]) == 0
    quick = ["--architectures=conv:width=4,depth=2,norm=none", "--seeds=1", "--steps=1", "--accelerator=cpu"]
    assert main(["evaluate", "builtin:mnist5k_frepo_ipc1", "--output=report", *quick]) == 0
    assert json.loads((tmp_path / "report" / "results.json").read_text())[0]["set"] == "mnist5k_frepo_ipc1"


@pytest.mark.parametrize("address", ["builtin:mnist5k_frepo", "builtin:../sets/mnist5k_frepo_ipc1", "builtin:"])
def test_no_other_address_leads_into_the_package(address, capsys):
    assert status(["info", address]) == 2
    assert f"unknown set '{address}'" in only_line(capsys)
