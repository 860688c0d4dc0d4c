"""Which instance type this machine is, or is said to be."""

from __future__ import annotations

import json
from pathlib import Path

from strategies import ec2
from strategies.errors import ConfigError, nearest
from trainer.doctor.check import text_of
from trainer.instances import instances

_SAGEMAKER = Path("/opt/ml/input/config/resourceconfig.json")


def given(name: str) -> str:
    """An instance type that somebody wrote down, without SageMaker's `ml.`.

    Raises:
        ConfigError: there is nothing to hold it against.
    """
    found = name.strip().lower().removeprefix("ml.")
    if found not in instances():
        raise ConfigError(
            f"doctor: nothing is known of the instance type {name}. {nearest(found, instances())} (--instance-type)."
        )
    return found


def detected() -> str | None:
    """This machine's, as far as SageMaker's variable or file or the firmware's tables say so."""
    if said := ec2.instance_type():
        return said
    if written := text_of(_SAGEMAKER):
        try:
            return str(json.loads(written)["current_instance_type"]).removeprefix("ml.")
        except (ValueError, KeyError, TypeError):
            return None
    return None
