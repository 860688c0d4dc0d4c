"""Fixtures for all tests."""

from __future__ import annotations

import os

# Read when huggingface_hub is imported; without it, a name that is not there is asked for again and again.
os.environ["HF_HUB_OFFLINE"] = "1"
# torch's stores ask for the name of each address that connects. A name server that drops a question now and then holds
# them up for glibc's 5 s; a test never needs its answer.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

pytest_plugins = ["strategies.testing"]
