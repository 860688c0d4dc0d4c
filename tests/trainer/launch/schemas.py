"""Checks manifests against schemas of other packages, in an environment that has them; see test_kubernetes_schemas.

Reads JSON on stdin: a list of manifests. Writes JSON on stdout: for each what is wrong with it, or "".
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_KUBERNETES = "1.33"


def wrong(manifest: dict[str, Any]) -> str:
    """What the schemas of its kind and of Kubernetes itself say against it."""
    whole = {"JobSet": _jobset, "TrainJob": _trainjob, "PyTorchJob": _pytorchjob, "HyperPodPyTorchJob": _hyperpod}
    try:
        return whole[manifest["kind"]](manifest) or _pods(manifest)
    except Exception as error:  # each package has its own
        return f"{type(error).__name__}: {error}".splitlines()[0][:300] or "refused"


def _unequal(read: Any, given: Any, path: str = "") -> str:
    """Where what a model makes of a manifest differs from it: models drop what they don't know."""
    if isinstance(read, dict) and isinstance(given, dict):
        for key in sorted(read.keys() | given.keys()):
            if key not in read or key not in given:
                return f"{path}.{key} is {'dropped' if key in given else 'added'}"
            if found := _unequal(read[key], given[key], f"{path}.{key}"):
                return found
        return ""
    if isinstance(read, list) and isinstance(given, list) and len(read) == len(given):
        pairs = enumerate(zip(read, given, strict=True))
        return next(filter(None, (_unequal(*pair, f"{path}[{number}]") for number, pair in pairs)), "")
    return "" if read == given and type(read) is type(given) else f"{path}: {given!r} is read as {read!r}"


def _jobset(manifest: dict[str, Any]) -> str:
    from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

    read = JobsetV1alpha2JobSet.from_dict(manifest)
    return _unequal(json.loads(json.dumps(read.to_dict(), default=str)), manifest)


def _trainjob(manifest: dict[str, Any]) -> str:
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    read = TrainerV1alpha1TrainJob.from_dict(manifest)
    return _unequal(json.loads(json.dumps(read.to_dict(), default=str)), manifest)


def _pytorchjob(manifest: dict[str, Any]) -> str:
    from kubeflow.training import models
    from kubernetes import client

    for name in dir(models):
        if name.startswith("KubeflowOrg"):
            setattr(client.models, name, getattr(models, name))

    class Answer:
        data = json.dumps(manifest)

    reader = client.ApiClient()
    read = reader.deserialize(Answer, "KubeflowOrgV1PyTorchJob")
    return _unequal(reader.sanitize_for_serialization(read), manifest)


def _hyperpod(manifest: dict[str, Any]) -> str:
    if found := [key for key in manifest if key not in ("apiVersion", "kind", "metadata", "spec")]:
        return f"{found} is no part of a manifest"
    model = _config()._HyperPodPytorchJob
    read = model.model_validate(manifest["spec"], by_name=True, by_alias=False, strict=True)
    return _unequal(read.model_dump(exclude_none=True, exclude_unset=True), manifest["spec"], ".spec")


def _config() -> ModuleType:
    """The resource's model alone: the package around it wants the rest of AWS's."""
    place = importlib.util.find_spec("sagemaker")
    assert place is not None
    folder = Path(next(iter(place.submodule_search_locations or ()))) / "hyperpod" / "training"
    path = folder / "config" / "hyperpod_pytorch_job_unified_config.py"
    spec = importlib.util.spec_from_file_location("hyperpod_config", path)
    assert spec is not None
    assert spec.loader is not None
    if spec.name not in sys.modules:
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[spec.name]


def _pods(manifest: dict[str, Any]) -> str:
    """The pods, and the jobs around them, by the strict schemas of Kubernetes' own kinds."""
    import kubernetes_validate

    found: list[dict[str, Any]] = []
    spec = manifest["spec"]
    for each in spec.get("pytorchReplicaSpecs", {}).values():
        found.append(_pod(each["template"]))
    for each in spec.get("replicaSpecs", []):
        found.append(_pod(each["template"]))
    for each in spec.get("replicatedJobs", []):
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **each["template"]}
        found.append(job)
    for each in found:
        kubernetes_validate.validate(each, _KUBERNETES, strict=True)
    return ""


def _pod(template: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": "x", **template.get("metadata", {})}
    return {**template, "apiVersion": "v1", "kind": "Pod", "metadata": metadata}


if __name__ == "__main__":
    json.dump([wrong(manifest) for manifest in json.load(sys.stdin)], sys.stdout)
