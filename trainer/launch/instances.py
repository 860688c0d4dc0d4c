"""What a launcher asks for on each machine of a type."""

from __future__ import annotations

from dataclasses import dataclass

from strategies.errors import ConfigError
from trainer.instances import instances


@dataclass(frozen=True)
class Instance:
    """One type of machine."""

    gpus: int
    efa: int
    """EFA interfaces."""
    cpus: int
    memory_gib: int


INSTANCES = {
    each.type: Instance(each.gpus, each.efa, each.cpus, each.memory_gib)
    for each in instances().values()
    if each.gpus and each.cpus is not None and each.memory_gib is not None
}


def instance(name: str | None) -> Instance | None:
    """What a type has; with or without SageMaker's `ml.`. None: no type was named, or it isn't known here."""
    return None if name is None else INSTANCES.get(name.removeprefix("ml."))


def devices(name: str | None, gpus: int | None, efa: int | None, nodes: int) -> tuple[int, int]:
    """GPUs and EFA interfaces to ask for on each machine.

    Args:
        name: of the type; None: the numbers are given.
        gpus: None: all that the type has.
        efa: None: all that the type has where several machines talk to each other, none where there is one.
        nodes: machines of the job.

    Raises:
        ConfigError: the type isn't known and a number is missing, or the type doesn't have so many.
    """
    known = instance(name)
    if known is None:
        if gpus is None:
            what = "no instance type is given" if name is None else f"what {name} has isn't known here"
            raise ConfigError(f"launch: {what}. Say how many GPUs a machine has, 0 for none (launcher.gpus).")
        return gpus, efa or 0
    if gpus is not None and gpus > known.gpus:
        raise ConfigError(f"launch: gpus={gpus}, and {name} has {known.gpus}. Take fewer (launcher.gpus).")
    if efa is not None and efa > known.efa:
        has = f"has {known.efa}" if known.efa else "has no EFA"
        fix = "Take fewer" if known.efa else "Leave it out, or take a type that has it, such as p4d.24xlarge"
        raise ConfigError(f"launch: efa={efa}, and {name} {has}. {fix} (launcher.efa, launcher.instance_type).")
    return known.gpus if gpus is None else gpus, efa if efa is not None else known.efa if nodes > 1 else 0
