"""``python -m lightning_dd`` is ``lightning-dd``."""

import sys

from lightning_dd.cli import main

sys.exit(main())
