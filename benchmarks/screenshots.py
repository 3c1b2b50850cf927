"""Pictures of a report and of TensorBoard for the pages, by a headless Chromium.

    lightning-dd fit --config mnist5k/frepo --config demo
    lightning-dd evaluate runs/demo/distil --config evaluate/mnist5k --output runs/demo/report
    python benchmarks/screenshots.py --report runs/demo/report --logdir runs/demo

Look at them before they are committed.
"""

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_PATIENCE = 120  # seconds for TensorBoard to answer


def browser() -> str | None:
    """Return the path of the first browser that is installed, if any."""
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


def shoot(address: str, picture: Path, size: tuple[int, int], seconds: int = 0) -> Path:
    """Write what a browser shows of an address as a PNG of ``size`` pixels, when its clock has run for ``seconds``."""
    program = browser()
    if program is None:
        sys.exit(f"no browser: install one of {', '.join(BROWSERS)}")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={size[0]},{size[1]}"]
    if seconds:
        options.append(f"--virtual-time-budget={1000 * seconds}")
    with tempfile.TemporaryDirectory() as profile:
        words = [program, *options, f"--user-data-dir={profile}", f"--screenshot={picture.resolve()}", address]
        subprocess.run(words, check=True, capture_output=True, timeout=300)
    return picture


def shoot_board(logdir: Path, picture: Path, size: tuple[int, int]) -> Path:
    """Start TensorBoard on a free port of this machine, write what it shows, and stop it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "tensorboard.main", f"--logdir={logdir}", f"--port={port}"]
    board = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}/"
        for _ in range(_PATIENCE):
            try:
                with urlopen(f"{address}data/plugin/images/tags") as answer:
                    if answer.read() != b"{}":
                        break
            except OSError:
                pass
            time.sleep(1)
        return shoot(f"{address}#images", picture, size, seconds=60)
    finally:
        board.terminate()
        board.wait()


def main() -> None:
    """Take both pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--report", type=Path, required=True, help="folder of an evaluation")
    parser.add_argument("--logdir", type=Path, required=True, help="of TensorBoard, a folder of runs")
    parser.add_argument("--output", type=Path, default=FIGURES)
    options = parser.parse_args()
    page = (options.report / "report.html").resolve().as_uri()
    print(shoot(page, options.output / "report.png", (1160, 1560)))
    print(shoot_board(options.logdir, options.output / "tensorboard.png", (1200, 540)))


if __name__ == "__main__":
    main()
