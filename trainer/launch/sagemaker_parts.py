"""The parts of a SageMaker job's settings that have a form of their own."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from strategies.errors import ConfigError, nearest


class Distribution(Enum):
    """Who starts the processes of each host."""

    torchrun = "torchrun"
    """Our own program in the container, which passes a stop on to the processes."""
    mpi = "mpi"
    """SageMaker's toolkit in the image, with mpirun."""
    smddp = "smddp"
    """The same, with the mpirun of SageMaker's data parallel library."""
    torch_distributed = "torch_distributed"
    pytorchddp = "pytorchddp"
    deepspeed = "deepspeed"
    smdistributed = "smdistributed"


_OLD_NAMES = {
    Distribution.torch_distributed: Distribution.torchrun,
    Distribution.pytorchddp: Distribution.torchrun,
    Distribution.deepspeed: Distribution.torchrun,
    Distribution.smdistributed: Distribution.smddp,
}
_TOLD = {
    Distribution.torch_distributed: "SDK's name for torchrun",
    Distribution.pytorchddp: "the SDK's name for DDP under mpirun; torchrun does the same here, with strategy=ddp",
    Distribution.deepspeed: "no launcher of SageMaker's (its SDK ignored the word); torchrun starts it here, and "
    "strategy=zero1, zero2 or zero3 chooses DeepSpeed",
    Distribution.smdistributed: "the SDK's name for its libraries; of these smddp is taken here, and the model "
    "parallel one's sharding is strategy=mics or strategy=fsdp_hybrid",
}


def today(distribution: Distribution) -> Distribution:
    """`distribution` without old names."""
    return _OLD_NAMES.get(distribution, distribution)


def about_old_name(distribution: Distribution) -> str | None:
    """One line for a person who used an old name."""
    if distribution not in _TOLD:
        return None
    name, now = distribution.name, today(distribution).name
    return f"launcher.distribution={name} is {_TOLD[distribution]}: taken as {now}."


class Mode(Enum):
    """How a channel's data comes to the container."""

    file = "File"
    """Copied to its disk before the job starts."""
    fastfile = "FastFile"
    """Read from S3 as it is opened, by a file system."""


@dataclass(kw_only=True)
class Network:
    """Where the machines stand."""

    subnets: list[str] = field(default_factory=list)
    """Of a VPC; none: SageMaker's own network."""
    security_groups: list[str] = field(default_factory=list)
    """Of that VPC. For EFA between hosts, one that lets everything in from itself, and everything out to itself."""
    isolated: bool = False
    """The container reaches nothing: no packages are installed, no models are downloaded."""
    encrypted: bool = False
    """What the hosts say to each other is encrypted, which takes time."""

    def __post_init__(self) -> None:
        if bool(self.subnets) != bool(self.security_groups):
            raise ConfigError(
                f"launch: a VPC takes both: subnets={self.subnets} and security_groups={self.security_groups}. Give "
                "the other one too (launcher.network.subnets, launcher.network.security_groups)."
            )


@dataclass(kw_only=True)
class Registry:
    """Where a private image comes from."""

    vpc: bool = False
    """The registry is reached through the job's VPC."""
    credentials: str | None = None
    """ARN of the Lambda function that gives the registry's name and password."""

    def __post_init__(self) -> None:
        if self.credentials is not None and not self.vpc:
            raise ConfigError(
                "launch: credentials are for a registry in a VPC, and vpc=false. Set launcher.registry.vpc=true "
                "(launcher.registry.credentials)."
            )


@dataclass(frozen=True, kw_only=True)
class Channel:
    """Data that lies at `/opt/ml/input/data/NAME` while the job runs."""

    uri: str | None = None
    """`s3://bucket/prefix`."""
    mode: Mode = Mode.file
    sharded: bool = False
    """Each host gets a part of the objects."""
    file_system: str | None = None
    """`fs-...` of FSx for Lustre or EFS, in place of `uri`."""
    type: str = "FSxLustre"
    path: str | None = None
    """Directory in the file system; for Lustre it begins with the mount name."""
    writable: bool = False

    def as_request(self, name: str) -> dict[str, Any]:
        """In the service's form."""
        if self.file_system is not None:
            source = {
                "FileSystemDataSource": {
                    "FileSystemId": self.file_system,
                    "FileSystemType": self.type,
                    "DirectoryPath": self.path,
                    "FileSystemAccessMode": "rw" if self.writable else "ro",
                }
            }
            return {"ChannelName": name, "DataSource": source}
        spread = "ShardedByS3Key" if self.sharded else "FullyReplicated"
        source = {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": self.uri, "S3DataDistributionType": spread}}
        return {"ChannelName": name, "DataSource": source, "InputMode": self.mode.value}


_KEYS = {"uri": str, "mode": str, "sharded": bool, "file_system": str, "type": str, "path": str, "writable": bool}
_FILE_SYSTEMS = {"fsx": "FSxLustre", "fsxlustre": "FSxLustre", "lustre": "FSxLustre", "efs": "EFS"}


def channel(name: str, given: Any) -> Channel:
    """A channel from its settings: an address of S3, or a dictionary.

    Raises:
        ConfigError: they make no channel.
    """
    key = f"launcher.channels.{name}"
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name) or name == "code":
        reason = (
            "is taken by the code that is sent"
            if name == "code"
            else "has other characters than letters, digits, . _ -"
        )
        raise ConfigError(f"launch: the channel's name {name!r} {reason}. Choose another ({key}).")
    values = {"uri": given} if isinstance(given, str) else given
    if not isinstance(values, dict):
        raise ConfigError(f"launch: {key}={given!r} is no channel. Give s3://bucket/prefix ({key}).")
    for word, value in values.items():
        if word not in _KEYS:
            raise ConfigError(f"launch: a channel has no {word!r}. {nearest(str(word), _KEYS)} ({key})")
        if not isinstance(value, _KEYS[word]):
            raise ConfigError(f"launch: {value!r} is no {_KEYS[word].__name__} ({key}.{word}).")
    return _of_file_system(key, values) if "file_system" in values else _of_s3(key, values)


def _of_s3(key: str, values: dict[str, Any]) -> Channel:
    uri, mode = str(values.get("uri", "")), str(values.get("mode", "file")).lower()
    if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?", uri) or len(uri) > 1024:
        raise ConfigError(f"launch: {uri!r} is no address in S3. Write s3://bucket/prefix ({key}).")
    if mode == "pipe":
        raise ConfigError(
            f"launch: mode=pipe gives no files, which training reads. Set mode=fastfile, which copies nothing either "
            f"({key}.mode)."
        )
    if mode not in Mode.__members__:
        raise ConfigError(f"launch: mode={mode} is not a choice. {nearest(mode, Mode.__members__)} ({key}.mode)")
    for word in ("type", "path", "writable"):
        if word in values:
            raise ConfigError(f"launch: {word} is a file system's, and this is S3. Leave it out ({key}.{word}).")
    return Channel(uri=uri, mode=Mode[mode], sharded=values.get("sharded", False))


def _of_file_system(key: str, values: dict[str, Any]) -> Channel:
    name, kind = values["file_system"], _FILE_SYSTEMS.get(str(values.get("type", "fsx")).lower())
    path = values.get("path")
    if not re.fullmatch(r"fs-[0-9a-f]{8,18}", name):
        raise ConfigError(f"launch: {name!r} is no file system. Write fs-0123456789abcdef0 ({key}.file_system).")
    if kind is None:
        raise ConfigError(f"launch: type={values['type']} is not a choice. Choices: fsx, efs. ({key}.type)")
    if not path or not str(path).startswith("/"):
        raise ConfigError(
            f"launch: which directory of {name}? Give one that begins with /; of Lustre, with the mount name, as in "
            f"/abcdefgh/data ({key}.path)."
        )
    for word in ("uri", "mode", "sharded"):
        if word in values:
            raise ConfigError(f"launch: {word} is S3's, and this is a file system. Leave it out ({key}.{word}).")
    return Channel(file_system=name, type=kind, path=path, writable=values.get("writable", False))
