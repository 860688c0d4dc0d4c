"""Fixtures for all tests."""

from __future__ import annotations

import os

# Read when huggingface_hub is imported; without it, a name that is not there is asked for again and again.
os.environ["HF_HUB_OFFLINE"] = "1"

pytest_plugins = ["strategies.testing"]
