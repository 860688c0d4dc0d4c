"""Pieces of the Kubernetes launcher's settings, and the forms that Kubernetes asks of names and numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from strategies.errors import ConfigError

_LABEL = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"  # RFC 1123
_SUBDOMAIN = rf"{_LABEL}(?:\.{_LABEL})*"
_WORD = r"[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?"
_QUANTITY = r"[0-9]+(?:\.[0-9]+)?(?:m|k|[MGTPE]|[KMGTPE]i)?"
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")


class Kind(Enum):
    """What is made of a job; each needs its operator in the cluster."""

    pytorchjob = "PyTorchJob"
    """Kubeflow's training operator, up to version 1."""
    hyperpod = "HyperPodPyTorchJob"
    """SageMaker HyperPod's training operator."""
    jobset = "JobSet"
    """Kubernetes' own JobSet."""
    trainjob = "TrainJob"
    """Kubeflow's trainer, version 2."""


class Pull(Enum):
    """When a node fetches the image."""

    missing = "IfNotPresent"
    always = "Always"
    never = "Never"


@dataclass(kw_only=True)
class HyperPod:
    """What only `kind=hyperpod` has."""

    min_nodes: int | None = None
    """Elastic: the job goes on with as few; null: always `nodes`."""
    max_nodes: int | None = None
    """Elastic: the job may get as many; null: always `nodes`."""
    step: int = 1
    """Elastic: nodes come and go in groups of so many."""
    node_counts: list[int] = field(default_factory=list)
    """Elastic: the numbers of nodes that the job may have, such as [1,2,4], in place of the three above."""
    start_time: str = "30m"
    """From the start of the processes to the first line of a step; later, the job counts as hanging."""
    hang_time: str = "30m"
    """Between two lines of steps; later, the job counts as hanging and its processes are started again."""
    slow_tokens_per_s: int | None = None
    """With less at `slow_lines` lines in a row, the processes are started again; null: never."""
    slow_lines: int = 25
    node_restarts: int = 3
    """New starts of the processes before all containers are made anew."""
    full_restarts: int = 1
    """Times that all containers are made anew, in each `restart_period`."""
    restart_period: str = "6h"
    healthy_only: bool = False
    """Only nodes that passed HyperPod's deep health checks."""

    @property
    def elastic(self) -> bool:
        """The number of nodes may change while the job runs."""
        return self.min_nodes is not None or self.max_nodes is not None or bool(self.node_counts)

    def sizes(self, nodes: int) -> Sequence[int]:
        """Numbers of nodes that the job may have, the least first."""
        if self.node_counts:
            return self.node_counts
        least = nodes if self.min_nodes is None else self.min_nodes
        most = nodes if self.max_nodes is None else self.max_nodes
        return range(least, most + 1, self.step)


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A place of the container that outlives it."""

    name: str
    path: str
    claim: str | None = None
    """PersistentVolumeClaim."""
    host: str | None = None
    """Folder of the node."""
    read_only: bool = False

    def source(self) -> dict[str, Any]:
        """For the pod."""
        if self.claim is not None:
            claim: dict[str, Any] = {"claimName": self.claim}
            return {"name": self.name, "persistentVolumeClaim": claim | ({"readOnly": True} if self.read_only else {})}
        return {"name": self.name, "hostPath": {"path": self.host, "type": "Directory"}}

    def mount(self) -> dict[str, Any]:
        """For the container."""
        return {"name": self.name, "mountPath": self.path} | ({"readOnly": True} if self.read_only else {})


def volume(name: str, given: Any) -> Volume:
    """A volume from its settings: `claim:/path`, or a dictionary.

    Raises:
        ConfigError: they make none.
    """
    key = f"launcher.volumes.{name}"
    label(name, key)
    if name == "shm":
        raise ConfigError(f"launch: the volume {name} is made by itself. Choose another name ({key}).")
    values = dict(zip(("claim", "path"), given.split(":", 1), strict=False)) if isinstance(given, str) else given
    kinds = {"claim": str, "host": str, "path": str, "read_only": bool}
    if not isinstance(values, dict):
        raise ConfigError(f"launch: {given!r} is no volume. Write claim:/path ({key}).")
    for word, value in values.items():
        if word not in kinds:
            raise ConfigError(f"launch: a volume has no {word!r}. Choices: {', '.join(kinds)} ({key}).")
        if not isinstance(value, kinds[word]):
            raise ConfigError(f"launch: {value!r} is no {kinds[word].__name__} ({key}.{word}).")
    if ("claim" in values) == ("host" in values):
        raise ConfigError(f"launch: is the volume {name} a claim, or a folder of the host? Give one of both ({key}).")
    if "claim" in values:
        subdomain(values["claim"], f"{key}.claim")
    path(values.get("path", ""), f"{key}.path")
    if "host" in values:
        path(values["host"], f"{key}.host")
    return Volume(name=name, **values)


def path(text: str, key: str) -> str:
    """A folder from the root on.

    Raises:
        ConfigError: it is none.
    """
    if not re.fullmatch(r"/[^:\0]+", text) or ".." in text.split("/"):
        raise ConfigError(f"launch: {text!r} is no folder from / on. Write one, such as /data ({key}).")
    return text


def label(text: str, key: str, longest: int = 63) -> str:
    """A name by RFC 1123: what most things in Kubernetes are called.

    Raises:
        ConfigError: it is none.
    """
    if not re.fullmatch(_LABEL, text) or len(text) > longest:
        raise ConfigError(
            f"launch: {text!r} is no name for Kubernetes. Use at most {longest} small letters, digits and -, and "
            f"begin and end with a letter or digit ({key})."
        )
    return text


def subdomain(text: str, key: str) -> str:
    """The same in several parts with dots between.

    Raises:
        ConfigError: it is none.
    """
    if not re.fullmatch(_SUBDOMAIN, text) or len(text) > 253:
        raise ConfigError(
            f"launch: {text!r} is no name for Kubernetes. Use small letters, digits, - and ., and begin and end with "
            f"a letter or digit ({key})."
        )
    return text


def quantity(text: str, key: str) -> str:
    """An amount with its unit.

    Raises:
        ConfigError: it is none.
    """
    if not re.fullmatch(_QUANTITY, text) or not re.search(r"[1-9]", text):
        raise ConfigError(f"launch: {text!r} is no quantity. Write it as in 500m, 8 or 64Gi ({key}).")
    return text


def refuse_map(values: dict[str, str], field: str) -> None:
    """Labels, annotations and selectors whose names or values Kubernetes doesn't take.

    Raises:
        ConfigError: names the entry.
    """
    for name, value in values.items():
        key = f"launcher.{field}.{name}"
        before, slash, word = name.rpartition("/")
        bad_prefix = slash and not (re.fullmatch(_SUBDOMAIN, before) and len(before) <= 253)
        if bad_prefix or not re.fullmatch(_WORD, word) or len(word) > 63:
            raise ConfigError(
                f"launch: {name!r} is no key for Kubernetes. Write name or example.com/name, with letters, digits, "
                f"- _ and . ({key})."
            )
        if field != "annotations" and value and (not re.fullmatch(_WORD, value) or len(value) > 63):
            raise ConfigError(
                f"launch: {name} can't have the value {value!r}. Use at most 63 letters, digits, - _ and . ({key})."
            )


def toleration(text: str) -> dict[str, str]:
    """From `key=value:Effect`, `key:Effect` or `key`, as taints are written.

    Raises:
        ConfigError: it is none.
    """
    key = "launcher.tolerations"
    found = re.fullmatch(r"([^=:\s]+)(?:=([^:\s]+))?(?::(\w+))?", text)
    if found is None or (found[3] is not None and found[3] not in _EFFECTS):
        raise ConfigError(
            f"launch: {text!r} is no toleration. Write key=value:Effect, key:Effect or key, with one of "
            f"{', '.join(_EFFECTS)} ({key})."
        )
    name, value, effect = found.groups()
    refuse_map({name: value or ""}, "tolerations")
    made = {"key": name} | ({"operator": "Exists"} if value is None else {"operator": "Equal", "value": value})
    return made if effect is None else made | {"effect": effect}


def secret(name: str, given: str) -> dict[str, Any]:
    """A variable whose value lies in a secret of the cluster: `secret/key`.

    Raises:
        ConfigError: it names none.
    """
    key = f"launcher.secrets.{name}"
    where, slash, entry = given.partition("/")
    if not slash or not re.fullmatch(r"[-._A-Za-z0-9]{1,253}", entry):
        raise ConfigError(
            f"launch: {name} is read from which entry of which secret? Write secret/entry; the value itself stays in "
            f"the cluster ({key})."
        )
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": subdomain(where, key), "key": entry}}}
