"""EC2's machines with NVIDIA GPUs, as far as a launcher has to know what to ask for."""

from __future__ import annotations

from dataclasses import dataclass

from strategies.errors import ConfigError


@dataclass(frozen=True)
class Instance:
    """One type of machine."""

    gpus: int
    efa: int
    """EFA interfaces."""
    cpus: int
    memory_gib: int


# Type: GPUs, EFA interfaces, vCPUs, GiB. Source: EC2's instance type pages; tests/trainer/launch/cluster compares it
# with the table in AWS's own sagemaker-hyperpod.
_TABLE = """
p3dn.24xlarge 8 1 96 768
p4d.24xlarge 8 4 96 1152
p4de.24xlarge 8 4 96 1152
p5.4xlarge 1 1 16 256
p5.48xlarge 8 32 192 2048
p5e.48xlarge 8 32 192 2048
p5en.48xlarge 8 16 192 2048
p6-b200.48xlarge 8 8 192 2048
g4dn.xlarge 1 0 4 16
g4dn.2xlarge 1 0 8 32
g4dn.4xlarge 1 0 16 64
g4dn.8xlarge 1 1 32 128
g4dn.12xlarge 4 1 48 192
g4dn.16xlarge 1 1 64 256
g5.xlarge 1 0 4 16
g5.2xlarge 1 0 8 32
g5.4xlarge 1 0 16 64
g5.8xlarge 1 1 32 128
g5.12xlarge 4 1 48 192
g5.16xlarge 1 1 64 256
g5.24xlarge 4 1 96 384
g5.48xlarge 8 1 192 768
g6.xlarge 1 0 4 16
g6.2xlarge 1 0 8 32
g6.4xlarge 1 0 16 64
g6.8xlarge 1 1 32 128
g6.12xlarge 4 1 48 192
g6.16xlarge 1 1 64 256
g6.24xlarge 4 1 96 384
g6.48xlarge 8 1 192 768
g6e.xlarge 1 0 4 32
g6e.2xlarge 1 0 8 64
g6e.4xlarge 1 0 16 128
g6e.8xlarge 1 1 32 256
g6e.12xlarge 4 1 48 384
g6e.16xlarge 1 1 64 512
g6e.24xlarge 4 2 96 768
g6e.48xlarge 8 4 192 1536
"""

INSTANCES = {
    name: Instance(*map(int, numbers)) for name, *numbers in (line.split() for line in _TABLE.strip().splitlines())
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
