"""The same as `shardwright container`: the entry point of a SageMaker training job."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that isn't installed, as in a container

from trainer.cli import main

if __name__ == "__main__":
    main(["container", *sys.argv[1:]])
