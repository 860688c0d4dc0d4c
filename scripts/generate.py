"""The same as `shardwright generate`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that isn't installed, as in a container

from trainer.cli import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
