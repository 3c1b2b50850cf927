"""``python -m lightning_dd`` is ``lightning-dd``."""

import sys

from lightning_dd.cli import main

if __name__ == "__main__":
    sys.exit(main())
