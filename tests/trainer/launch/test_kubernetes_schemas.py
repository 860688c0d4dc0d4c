"""Each manifest against the schema that its operator's authors publish, and what a schema is worth: each key changed,
each value of another type."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.launch import schemas
from tests.trainer.launch.environments import NEEDS, environment
from tests.trainer.launch.test_kubernetes_manifest import VOLUMES, made
from trainer.launch.instances import INSTANCES
from trainer.launch.kubernetes_parts import HyperPod, Kind, Pull

pytestmark = [NEEDS, pytest.mark.timeout(900)]

PACKAGES = ("kubernetes-validate==1.37.0", "kubeflow-trainer-api==2.3.0", "kubeflow-training==1.9.4")
ALONE = ("sagemaker-hyperpod==3.12.0",)
FREE = {"labels", "annotations", "nodeSelector", "requests", "limits"}
"""Whose keys are anybody's."""
WORDS = ("trainer.max_steps=3", "trainer.global_batch=64", "data.path=${oc.env:HOME}/a b'c\"")
EVERYTHING: dict[str, Any] = {
    "nodes": 2, "instance_type": "p5.48xlarge", "gpus": None, "namespace": "training", "cpu": "90", "memory": "900Gi",
    "hugepages": "5120Mi", "shared_memory": "200Gi", "run_root": "/fsx/runs", "environment": {"LEVEL": "3"},
    "volumes": {**VOLUMES, "raw": {"host": "/mnt/x", "path": "/raw", "read_only": True},
                "more": {"claim": "c", "path": "/more", "read_only": True}},
    "secrets": {"HF_TOKEN": "hub/token"}, "labels": {"team": "nlp"}, "annotations": {"note": "x y"},
    "node_selector": {"zone": "a"}, "tolerations": ["nvidia.com/gpu:NoSchedule", "a=b", "c"],
    "service_account": "trainer", "queue": "shared", "pull_secrets": ["registry"], "grace": "2m", "max_run": "12h",
}  # fmt: skip
NOT_OF_A_TRAINJOB: dict[str, Any] = {
    "restarts": 5, "keep": "2h", "priority_class": "high", "workdir": "/workspace", "pull": Pull.always,
}  # fmt: skip
ELASTIC = HyperPod(node_counts=[1, 2, 4], slow_tokens_per_s=1000, healthy_only=True)


def whole(kind: Kind) -> dict[str, Any]:
    """The manifest with all that the launcher can say."""
    more = {} if kind is Kind.trainjob else NOT_OF_A_TRAINJOB
    own = {"hyperpod": ELASTIC} if kind is Kind.hyperpod else {"runtime": "mine"} if kind is Kind.trainjob else {}
    return made(*WORDS, **{**EVERYTHING, **more, **own, "kind": kind})


def wrongs(manifests: list[dict[str, Any]]) -> list[str]:
    """What is said against each of them."""
    python = environment((*PACKAGES, "pydantic>=2.11"), ALONE)
    done = subprocess.run(
        [str(python), str(Path(schemas.__file__))], input=json.dumps(manifests), stdout=subprocess.PIPE, text=True,
        timeout=600, check=True,
    )  # fmt: skip
    found: list[str] = json.loads(done.stdout)
    return found


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each key and each entry."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def changed(manifest: dict[str, Any], path: tuple[Any, ...], key: Any, value: Any) -> dict[str, Any]:
    """With another key or value at the end of the way."""
    copied = copy.deepcopy(manifest)
    parent: Any = copied
    for each in path[:-1]:
        parent = parent[each]
    if key != path[-1]:
        del parent[path[-1]]
    parent[key] = value
    return copied


def at(manifest: Any, path: tuple[Any, ...]) -> Any:
    for each in path:
        manifest = manifest[each]
    return manifest


@pytest.mark.parametrize("kind", Kind)
def test_manifest_is_valid_with_everything_and_with_nothing(kind: Kind) -> None:
    assert wrongs([whole(kind), made(*WORDS, kind=kind), made(*WORDS, kind=kind, nodes=2)]) == ["", "", ""]


@pytest.mark.parametrize("kind", Kind)
def test_every_changed_key_and_every_wrong_type_is_caught(kind: Kind) -> None:
    manifest = whole(kind)
    ways = [path for path in places(manifest["spec"], ("spec",)) if not FREE & set(path[:-1])]
    keys = [(path, changed(manifest, path, f"{path[-1]}X", at(manifest, path))) for path in ways
            if isinstance(path[-1], str) and path[-2:-1] != ("pytorchReplicaSpecs",)]  # fmt: skip
    types = [(path, changed(manifest, path, path[-1], _other(at(manifest, path)))) for path in ways]
    said = wrongs([each for _, each in (*keys, *types)])
    missed = [path for (path, _), found in zip((*keys, *types), said, strict=True) if not found]
    print(f"{kind.value}: {len(keys)} keys, {len(types)} types, missed {missed}")
    assert len(keys) > 40
    assert len(types) > 60
    assert missed == []


def _other(value: Any) -> Any:
    """Of another type."""
    return {"a": 1} if isinstance(value, str | list) else "text"


def test_instances_are_those_of_aws() -> None:
    python = environment((*PACKAGES, "pydantic>=2.11"), ALONE)
    program = (
        "import importlib.util as u, json, pathlib\n"
        "folder = pathlib.Path(next(iter(u.find_spec('sagemaker').submodule_search_locations)))\n"
        "spec = u.spec_from_file_location('constants', folder / 'hyperpod' / 'training' / 'constants.py')\n"
        "module = u.module_from_spec(spec)\nspec.loader.exec_module(module)\n"
        "print(json.dumps(module.INSTANCE_RESOURCES))\n"
    )
    done = subprocess.run([str(python), "-c", program], stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    theirs = json.loads(done.stdout)
    both = [name for name in INSTANCES if f"ml.{name}" in theirs]
    assert len(both) >= 25
    for name in both:
        ours, other = INSTANCES[name], theirs[f"ml.{name}"]
        found = (ours.gpus, ours.efa, ours.cpus, ours.memory_gib)
        assert found == (other["gpu"], other["efa"], other["cpu"], other["memory"]), name
