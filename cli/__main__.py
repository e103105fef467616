"""``python -m fasttrain.cli``."""

import sys

from fasttrain.cli import run

sys.exit(run())
