"""Train: `python scripts/train.py key=value ...`, or the same under torchrun."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that isn't installed, as in a container

from trainer import run

if __name__ == "__main__":
    run()
