"""What is asked of a cluster: a few calls of kubectl, and what it says as one line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from strategies.errors import ConfigError
from trainer.launch.base import LaunchedJob, LaunchJob, State, Status
from trainer.launch.following import newest_numbers
from trainer.launch.kubernetes_manifest import JOB, RUN, as_yaml
from trainer.launch.kubernetes_parts import Kind
from trainer.stop import EXIT_STOPPED, EXIT_WRONG_INPUT

RESOURCES = {
    Kind.pytorchjob: "pytorchjobs.kubeflow.org",
    Kind.hyperpod: "hyperpodpytorchjobs.sagemaker.amazonaws.com",
    Kind.jobset: "jobsets.jobset.x-k8s.io",
    Kind.trainjob: "trainjobs.trainer.kubeflow.org",
}
_ENDS = {"Succeeded": State.finished, "Completed": State.finished, "Complete": State.finished, "Failed": State.failed}
_PATIENCE_S = 10.0
_TIMEOUT_S = 60.0
_TAIL = 200
"""Lines of a log that are looked through for the newest numbers."""
_FIXES = {
    "Unauthorized": "Log in again",
    "Forbidden": "Your account may not do that; ask whoever manages the cluster",
    "no matches for kind": "The cluster lacks this operator: install it, or use another (launcher.kind)",
    "doesn't have a resource type": "The cluster lacks this operator: install it, or use another (launcher.kind)",
    "context": "Choose one of kubectl config get-contexts (launcher.context)",
    "namespaces": "Make the namespace, or choose another (launcher.namespace)",
    "connection": "Look at kubectl cluster-info (launcher.context)",
}


class Kubectl:
    """The program of that name, for one namespace.

    Args:
        namespace: None: as its configuration says.
        context: None: the current one.

    Raises:
        ConfigError: it isn't there.
    """

    def __init__(self, namespace: str | None, context: str | None) -> None:
        program = shutil.which("kubectl")
        if program is None:
            raise ConfigError(
                "launch: kubectl isn't installed, which launcher=kubernetes needs. Install it, or take the manifest of "
                "--dry-run elsewhere (launcher)."
            )
        self.words = [program]
        if context is not None:
            self.words.append(f"--context={context}")
        if namespace is not None:
            self.words.append(f"--namespace={namespace}")

    def run(self, *words: str, given: str | None = None) -> str:
        """What it prints.

        Args:
            words: after those of the namespace.
            given: to its input.

        Raises:
            ConfigError: it fails, in its own words.
        """
        try:
            done = subprocess.run(
                [*self.words, *words], input=given, capture_output=True, text=True, errors="replace",
                timeout=_TIMEOUT_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise ConfigError(
                f"launch: kubectl {words[0]} gave no answer in {_TIMEOUT_S:.0f} s. Look at kubectl cluster-info "
                "(launcher.context)."
            ) from error
        if done.returncode == 0:
            return done.stdout
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = (lines[-1] if lines else f"exit code {done.returncode}").rstrip(".")
        fix = next((fix for word, fix in _FIXES.items() if word in said), "See what it says (launcher)")
        raise ConfigError(f"launch: kubectl {words[0]} fails: {said}. {fix}.")

    def get(self, *words: str) -> dict[str, Any] | None:
        """What there is, read; None: nothing of this name."""
        try:
            found: dict[str, Any] = json.loads(self.run("get", *words, "--output=json"))
        except ConfigError as error:
            if "NotFound" in str(error):
                return None
            raise
        return found


class PodsJob(LaunchedJob):
    """A job that the cluster has; asked about at most every ten seconds."""

    def __init__(
        self, job: LaunchJob, name: str, kind: Kind, kubectl: Kubectl, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.job = job
        self.name = name
        self.kind, self.kubectl, self._now = kind, kubectl, now
        self._asked = -_PATIENCE_S
        self._known = Status(state=State.waiting)
        self._stopped = False

    @property
    def handle(self) -> str:
        """Its name in the cluster."""
        return self.name

    @property
    def resource(self) -> str:
        """As kubectl knows it."""
        return f"{RESOURCES[self.kind]}/{self.name}"

    def hand_over(self, manifest: Mapping[str, Any]) -> None:
        """Have the cluster make it.

        Raises:
            ConfigError: it doesn't, or another job of the same run is at work.
        """
        self._refuse_second(manifest)
        self.kubectl.run("apply", "--filename=-", given=as_yaml(dict(manifest)))

    def is_there(self) -> bool:
        """Whether the cluster still knows it."""
        return self.kubectl.get(self.resource) is not None

    def status(self) -> Status:
        if not self._known.state.over and self._now() - self._asked >= _PATIENCE_S:
            self._asked = self._now()
            found = self.look()
            numbers = {} if found.state is State.waiting else newest_numbers(self._last_lines())
            self._known = Status(state=found.state, detail=found.detail, metrics={**self._known.metrics, **numbers})
        return self._known

    def look(self) -> Status:
        """How it does now, without numbers."""
        described, pods = self.kubectl.get(self.resource), self.pods()
        if described is None:
            return Status(state=State.running, detail="ending") if pods else Status(state=State.stopped)
        return status_of(described, pods)

    def pods(self) -> list[dict[str, Any]]:
        """Those that train, the first node's first."""
        found = self.kubectl.get("pods", self._selector)
        return sorted([] if found is None else found["items"], key=_order)

    def stop(self) -> None:
        """Delete it: its processes are asked to stop, with time for a checkpoint; asked again, without."""
        self.kubectl.run("delete", self.resource, "--wait=false", "--ignore-not-found")
        if self._stopped:
            self.kubectl.run("delete", "pods", self._selector, "--grace-period=1", "--wait=false")
        self._stopped, self._asked = True, -_PATIENCE_S

    @property
    def _selector(self) -> str:
        return f"--selector={JOB}={self.name}"

    def _last_lines(self) -> Sequence[str]:
        try:
            pods = [pod for pod in self.pods() if phase(pod) != "Pending"]
            words = (pods[0]["metadata"]["name"], f"--container={container_of(self.kind)}", f"--tail={_TAIL}")
            return self.kubectl.run("logs", *words).splitlines()
        except (ConfigError, IndexError):  # no pod yet, or gone in between
            return []

    def _refuse_second(self, manifest: Mapping[str, Any]) -> None:
        run = manifest["metadata"]["labels"][RUN]
        try:
            found = self.kubectl.get(RESOURCES[self.kind], f"--selector={RUN}={run}")
        except ConfigError as error:
            if "orbidden" in str(error):  # who may make jobs may not be allowed to list them
                return
            raise
        for each in [] if found is None else found.get("items", []):
            if not status_of(each, []).state.over:
                raise ConfigError(
                    f"launch: the job {each['metadata']['name']} of the same run is still at work, and both would "
                    "write to the same folder. Delete it, or choose another name (run.name)."
                )


def container_of(kind: Kind) -> str:
    """The name of the container that trains."""
    return "pytorch" if kind in (Kind.pytorchjob, Kind.hyperpod) else "node"


def phase(pod: Mapping[str, Any]) -> str:
    """Of a pod: Pending, Running, Succeeded, Failed or Unknown."""
    return str(pod.get("status", {}).get("phase", "Pending"))


def status_of(described: Mapping[str, Any], pods: Sequence[Mapping[str, Any]]) -> Status:
    """How a job does, from what the cluster says of it and its pods."""
    conditions = [each for each in described.get("status", {}).get("conditions", []) if each.get("status") == "True"]
    for each in conditions:
        state = _ENDS.get(str(each["type"]))
        if state is State.failed:
            code = exit_code_of(pods)
            why = " ".join(str(each.get("message") or each.get("reason") or "").split())
            detail = f"{why} (exit code {code})" if pods and code != 1 else why
            return Status(state=State.stopped if code == EXIT_STOPPED else State.failed, detail=detail)
        if state is not None:
            return Status(state=state)
    if any(phase(pod) == "Running" for pod in pods):
        return Status(state=State.running, detail=_restarts(pods))
    return Status(state=State.waiting, detail=next(filter(None, map(_waits_for, pods)), ""))


def exit_code_of(pods: Sequence[Mapping[str, Any]]) -> int:
    """Of a failed job: 2 wrong input, 75 stopped with a checkpoint, else 1."""
    codes = [end["exitCode"] for pod in pods for end in _ends(pod)]
    for code in (EXIT_WRONG_INPUT, EXIT_STOPPED):
        if code in codes and all(each in (0, code) or code == EXIT_WRONG_INPUT for each in codes):
            return code
    return 1


def _ends(pod: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The newest end of each container that ended and isn't the operator's."""
    found = []
    for each in pod.get("status", {}).get("containerStatuses", []):
        for state in (each.get("state", {}), each.get("lastState", {})):
            if "terminated" in state:
                found.append(state["terminated"])
                break
    return found


def _waits_for(pod: Mapping[str, Any]) -> str:
    status = pod.get("status", {})
    for each in (*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])):
        waiting = each.get("state", {}).get("waiting")
        if waiting and waiting.get("reason") not in (None, "PodInitializing"):
            return ": ".join(str(waiting[key]) for key in ("reason", "message") if waiting.get(key))
    for each in status.get("conditions", []):
        if each.get("type") == "PodScheduled" and each.get("status") == "False":
            return f"{each.get('reason', '')}: {' '.join(str(each.get('message', '')).split())}"
    return ""


def _restarts(pods: Sequence[Mapping[str, Any]]) -> str:
    counts = [
        int(each.get("restartCount", 0)) for pod in pods for each in pod.get("status", {}).get("containerStatuses", [])
    ]
    return f"started again {max(counts)} times" if any(counts) else ""


def _order(pod: Mapping[str, Any]) -> tuple[bool, int, str]:
    """The first node's before the others'."""
    metadata = pod["metadata"]
    labels, name = metadata.get("labels", {}), str(metadata["name"])
    index = labels.get("batch.kubernetes.io/job-completion-index") or labels.get("training.kubeflow.org/replica-index")
    number = int(index) if str(index).isdecimal() else int((re.findall(r"\d+", name) or ["0"])[-1])
    return labels.get("training.kubeflow.org/replica-type", "master") != "master", number, name
