"""Jobs of a Kubernetes cluster: a manifest from the configuration, handed over with kubectl."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError
from trainer.launch import containers
from trainer.launch import kubernetes_parts as parts
from trainer.launch.base import LaunchedJob, Launcher, LaunchJob
from trainer.launch.instances import devices, instance
from trainer.launch.kubernetes_parts import HyperPod, Kind, Pull, Volume
from trainer.secrets import redacted, redacted_words
from trainer.stop import seconds

if TYPE_CHECKING:
    from trainer.launch.kubernetes_job import PodsJob

_NUMBERS = (("nodes", 1, 5000), ("processes", 1, 128), ("gpus", 0, 128), ("efa", 0, 128), ("restarts", 0, 1000),
            ("jobs", 1, 1000))  # fmt: skip
_POSITIVE = ("min_nodes", "max_nodes", "step", "slow_tokens_per_s", "slow_lines", "node_restarts", "full_restarts")
_RESTARTS = 3


@dataclass(kw_only=True)
class KubernetesLauncher(Launcher):
    """Starts the training script in pods of a cluster; restarted pods go on from the newest checkpoint."""

    kind: Kind = Kind.pytorchjob
    """pytorchjob, hyperpod, jobset or trainjob: what the cluster's operator understands."""
    image: str | None = None
    """Of the container, with this package in it: `registry/name:tag`."""
    namespace: str | None = None
    """null: as kubectl's context says."""
    context: str | None = None
    """Of kubectl's configuration; null: the current one."""

    nodes: int = 1
    processes: int | None = None
    """Of each node; null: one per GPU, or 1 without GPUs."""
    instance_type: str | None = None
    """EC2's name of the machines: the job waits for such nodes, and knows their GPUs and EFA interfaces."""
    gpus: int | None = None
    """`nvidia.com/gpu` of each node; null: all that the type has."""
    efa: int | None = None
    """`vpc.amazonaws.com/efa` of each node; null: all that the type has, where there are several nodes."""
    cpu: str | None = None
    """Of each node, such as 90; null: what is left."""
    memory: str | None = None
    """Of each node, such as 900Gi; null: what is left."""
    hugepages: str | None = None
    """`hugepages-2Mi` of each node for EFA, such as 5120Mi; null: none, and EFA is told to do without."""
    shared_memory: str | None = None
    """Limit of /dev/shm, which lies in the node's memory and counts as the container's; null: half of the node's."""

    volumes: dict[str, Any] = field(default_factory=dict)
    """Name -> `claim:/path`, or {claim, path, read_only}, or {host, path, read_only}."""
    run_root: str | None = None
    """Folder on one of the volumes for the runs' folders; null: as run.dir and checkpoint.folder say."""
    workdir: str | None = None
    """Folder of the image to start in; null: the image's own."""
    script: str | None = None
    """Where a script of your own lies in the image; null: below `workdir`, as --script says."""

    environment: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)
    """Variable -> `secret/entry` of the cluster; the value never comes here."""
    labels: dict[str, str] = field(default_factory=dict)
    """Of the job and its pods."""
    annotations: dict[str, str] = field(default_factory=dict)
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[str] = field(default_factory=list)
    """`key=value:Effect`, `key:Effect` or `key`."""
    service_account: str | None = None
    priority_class: str | None = None
    queue: str | None = None
    """Of Kueue."""
    pull: Pull = Pull.missing
    pull_secrets: list[str] = field(default_factory=list)

    restarts: int | None = None
    """Times to go on after a crash; null: 3, or as a TrainJob's runtime says."""
    grace: str = "5m"
    """Between the signal to stop and the kill, for a checkpoint."""
    max_run: str | None = None
    """Longest time in all, such as 12h; null: no limit."""
    keep: str | None = None
    """How long the finished job stays to be looked at; null: 1d, or as a TrainJob's runtime says."""
    hyperpod: HyperPod = field(default_factory=HyperPod)
    runtime: str | None = None
    """Of a TrainJob; null: torch-distributed."""
    jobs: int | None = None
    """Of a sweep, at the same time; null: all."""

    def __post_init__(self) -> None:
        containers.refuse_numbers(self, _NUMBERS)
        for key in ("grace", "max_run", "keep"):
            seconds(getattr(self, key), f"launcher.{key}")
        for key in ("start_time", "hang_time", "restart_period"):
            seconds(getattr(self.hyperpod, key), f"launcher.hyperpod.{key}")
        self._refuse_names()
        self._refuse_contradictions()
        self._refuse_elastic()

    @property
    def at_once(self) -> int | None:
        return self.jobs

    @property
    def per_node(self) -> tuple[int, int]:
        """GPUs and EFA interfaces of each node.

        Raises:
            ConfigError: they aren't known, or the type hasn't so many.
        """
        return devices(self.instance_type, self.gpus, self.efa, self.most_nodes)

    @property
    def most_nodes(self) -> int:
        """As many nodes as the job may get."""
        return max(self.nodes, self.hyperpod.max_nodes or 0, *self.hyperpod.node_counts)

    @property
    def processes_now(self) -> int:
        """Of each node."""
        return self.processes or max(1, self.per_node[0])

    @property
    def restarts_now(self) -> int:
        """Times to go on after a crash."""
        return _RESTARTS if self.restarts is None else self.restarts

    @property
    def grace_s(self) -> int:
        """Between the signal to stop and the kill."""
        return round(seconds(self.grace, "launcher.grace") or 0)

    @property
    def mounted(self) -> list[Volume]:
        """`volumes`, read."""
        return [parts.volume(name, given) for name, given in self.volumes.items()]

    def check(self, jobs: Sequence[LaunchJob]) -> None:
        containers.image(self.image)
        gpus, efa = self.per_node
        if self.processes is not None and gpus and self.processes > gpus:
            raise ConfigError(
                f"launch: processes={self.processes}, and a node has {gpus} GPUs. Take one process per GPU "
                "(launcher.processes, launcher.gpus)."
            )
        if self.hugepages is not None and not efa:
            raise ConfigError(
                f"launch: hugepages={self.hugepages} are for EFA, and no interface is asked for. Set launcher.efa, or "
                "leave them out (launcher.hugepages)."
            )
        for job in jobs:
            if not job.script.is_file():
                raise ConfigError(f"launch: there is no script {job.script}. Name a file (--script).")
            self.words_of(job)
            containers.script_in_image(job, self.script, self.workdir)

    def shown(self, job: LaunchJob) -> str:
        from trainer.launch.kubernetes_manifest import as_yaml

        self._tell(job)
        hidden = LaunchJob(
            name=job.name, script=job.script, overrides=tuple(redacted_words(job.overrides)), folder=job.folder
        )
        return as_yaml(redacted(self.manifest(hidden))).rstrip("\n")

    def start(self, job: LaunchJob) -> LaunchedJob:
        return self._submitted(job)

    def find(self, job: LaunchJob, handle: str) -> LaunchedJob | None:
        """A job that was started before; None: it was deleted.

        Args:
            job: what was started.
            handle: its name in the cluster.
        """
        from trainer.launch.kubernetes_job import Kubectl, PodsJob

        found = PodsJob(job, handle, self.kind, Kubectl(self.namespace, self.context))
        return found if found.is_there() else None

    def run(self, job: LaunchJob) -> int:
        from trainer.launch.kubernetes_follow import follow

        self._tell(job)
        return follow(self._submitted(job), sys.stdout)

    def manifest(self, job: LaunchJob) -> dict[str, Any]:
        """What is handed over for a job, which `check` found good."""
        from trainer.launch.kubernetes_manifest import manifest

        return manifest(
            self,
            run=_run_of(job),
            words=self.words_of(job),
            script=containers.script_in_image(job, self.script, self.workdir),
            now=datetime.now(UTC),
        )

    def words_of(self, job: LaunchJob) -> list[str]:
        """The job's, with the run's folder on a volume.

        Raises:
            ConfigError: some of them don't fit.
        """
        containers.refuse_flags(job.overrides)
        paths = [volume.path for volume in self.mounted]
        words = containers.words_in_image(job.overrides, _run_of(job), self.run_root, paths)
        if self.hyperpod.elastic:
            self._refuse_sizes(words, paths)
        return words

    def remarks(self, job: LaunchJob) -> list[str]:
        """What a person should know before it costs something."""
        words, (_, efa) = self.words_of(job), self.per_node
        found = containers.shared_remarks(
            job,
            words,
            "better keep it in a secret of the cluster (launcher.secrets)",
            [volume.path for volume in self.mounted],
        )
        if self.most_nodes > 1 and not efa:
            known = instance(self.instance_type)
            has = f"{self.instance_type} has no EFA" if known is not None and not known.efa else "no EFA is asked for"
            found.append(f"{has}: the {self.most_nodes} nodes talk over TCP")
        if self.hyperpod.elastic and containers.given(words, "trainer.global_batch") is None:
            ranks = [nodes * self.processes_now for nodes in self.hyperpod.sizes(self.nodes)]
            found.append(f"elastic: trainer.global_batch must be a multiple of each of {ranks} ranks")
        return found

    def _tell(self, job: LaunchJob) -> None:
        for line in self.remarks(job):
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def _submitted(self, job: LaunchJob) -> PodsJob:
        from trainer.launch.kubernetes_job import Kubectl, PodsJob

        made = self.manifest(job)
        submitted = PodsJob(job, made["metadata"]["name"], self.kind, Kubectl(self.namespace, self.context))
        submitted.hand_over(made)
        return submitted

    def _refuse_names(self) -> None:
        if self.namespace is not None:
            parts.label(self.namespace, "launcher.namespace")
        for key in ("service_account", "priority_class", "queue", "runtime"):
            if (name := getattr(self, key)) is not None:
                parts.subdomain(name, f"launcher.{key}")
        if self.instance_type is not None:
            parts.refuse_map({"node.kubernetes.io/instance-type": self.instance_type}, "instance_type")
        for name in self.pull_secrets:
            parts.subdomain(name, "launcher.pull_secrets")
        for key in ("cpu", "memory", "hugepages", "shared_memory"):
            if (amount := getattr(self, key)) is not None:
                parts.quantity(amount, f"launcher.{key}")
        for key in ("labels", "annotations", "node_selector"):
            parts.refuse_map(getattr(self, key), key)
        for key in ("workdir", "run_root"):
            if (folder := getattr(self, key)) is not None:
                parts.path(folder, f"launcher.{key}")
        for text in self.tolerations:
            parts.toleration(text)
        containers.refuse_environment(self.environment, self.secrets)
        for name, given in self.secrets.items():
            parts.secret(name, given)
        paths = [volume.path for volume in self.mounted]
        if twice := next((path for path in paths if paths.count(path) > 1 or path == "/dev/shm"), None):  # noqa: S108
            raise ConfigError(f"launch: two volumes at {twice}. Choose another path for one (launcher.volumes).")

    def _refuse_contradictions(self) -> None:
        if "node.kubernetes.io/instance-type" in self.node_selector and self.instance_type is not None:
            raise ConfigError(
                "launch: instance_type and node_selector both name the machines' type. Leave one of them out "
                "(launcher.instance_type, launcher.node_selector)."
            )
        if self.kind is not Kind.hyperpod and self.hyperpod != HyperPod():
            raise ConfigError(
                f"launch: launcher.hyperpod is for kind=hyperpod, and kind={self.kind.name}. Set "
                "launcher.kind=hyperpod, or leave it out (launcher.hyperpod)."
            )
        if self.kind is not Kind.trainjob:
            if self.runtime is not None:
                raise ConfigError(
                    f"launch: runtime={self.runtime} is a TrainJob's, and kind={self.kind.name}. Set "
                    "launcher.kind=trainjob, or leave it out (launcher.runtime)."
                )
            return
        fixed = {"restarts": self.restarts, "priority_class": self.priority_class, "workdir": self.workdir,
                 "keep": self.keep}  # fmt: skip
        fixed["pull"] = None if self.pull is Pull.missing else self.pull.name
        for key, value in fixed.items():
            if value is not None:
                raise ConfigError(
                    f"launch: a TrainJob takes {key} from its runtime. Leave {key}={value} out, or use kind=jobset "
                    f"(launcher.{key}, launcher.kind)."
                )

    def _refuse_elastic(self) -> None:
        pod = self.hyperpod
        for key in _POSITIVE:
            if (value := getattr(pod, key)) is not None and not 1 <= value <= 10**9:
                raise ConfigError(f"launch: {key}={value} is below 1 (launcher.hyperpod.{key}).")
        counts = pod.node_counts
        if counts and (pod.min_nodes, pod.max_nodes, pod.step) != (None, None, 1):
            raise ConfigError(
                f"launch: node_counts={counts} says it all. Leave min_nodes, max_nodes and step out "
                "(launcher.hyperpod.node_counts)."
            )
        if counts != sorted(set(counts)) or any(count < 1 for count in counts):
            raise ConfigError(
                f"launch: node_counts={counts} don't rise from 1 or more. Write them as in [1,2,4] "
                "(launcher.hyperpod.node_counts)."
            )
        sizes = pod.sizes(self.nodes)
        if pod.elastic and (self.nodes not in sizes or sizes[-1] != self.most_nodes):
            said = f"with node_counts={counts}" if counts else f"from min_nodes={pod.min_nodes} in steps of {pod.step}"
            raise ConfigError(
                f"launch: {said} the job can't have nodes={self.nodes} and at most {self.most_nodes}. Choose numbers "
                "that are reached (launcher.hyperpod, launcher.nodes)."
            )

    def _refuse_sizes(self, words: Sequence[str], mounted: Sequence[str]) -> None:
        """An elastic job goes on from its checkpoint with other numbers of ranks, over which a step is spread."""
        if not containers.outlives(words, mounted):
            raise ConfigError(
                "launch: an elastic job begins again whenever nodes come or go, since its checkpoints end with the "
                "containers. Put the run on a volume, or set checkpoint.folder=s3://... (launcher.run_root)."
            )
        batch = containers.given(words, "trainer.global_batch")
        for nodes in self.hyperpod.sizes(self.nodes):
            ranks = nodes * self.processes_now
            if batch is not None and batch.isdecimal() and int(batch) % ranks:
                raise ConfigError(
                    f"launch: trainer.global_batch={batch} isn't a multiple of {ranks} ranks, which the job has on "
                    f"{nodes} nodes. Change one of them (trainer.global_batch, launcher.hyperpod)."
                )


def _run_of(job: LaunchJob) -> str:
    return job.name if job.folder is None else f"{job.folder.parent.name}-{job.name}"
