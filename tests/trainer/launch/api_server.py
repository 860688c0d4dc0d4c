"""As much of Kubernetes' API as the real kubectl asks for: it keeps jobs and pods in memory, and runs nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

RESOURCES = {
    "kubeflow.org/v1": ("pytorchjobs", "PyTorchJob"),
    "sagemaker.amazonaws.com/v1": ("hyperpodpytorchjobs", "HyperPodPyTorchJob"),
    "jobset.x-k8s.io/v1alpha2": ("jobsets", "JobSet"),
    "trainer.kubeflow.org/v1alpha1": ("trainjobs", "TrainJob"),
}
_VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]


class Cluster:
    """What there is, and what was asked."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        """Path -> object."""
        self.log = ""
        self.asked: list[str] = []

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        if (found := _discovery(path)) is not None:
            return 200, found
        if path.endswith("/log"):
            return 200, self.log
        if method == "POST":
            body.setdefault("metadata", {})["uid"] = str(len(self.objects))
            self.objects[f"{path}/{body['metadata']['name']}"] = body
            return 201, body
        if method == "GET" and path in self.objects:
            return 200, self.objects[path]
        if method == "DELETE" and path in self.objects:
            del self.objects[path]
            return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success"}
        if method == "GET" and path.rpartition("/")[2] in ("pods", *(name for name, _ in RESOURCES.values())):
            wanted = dict(each.split("=") for each in query.get("labelSelector", [""])[0].split(",") if each)
            items = [each for key, each in self.objects.items() if key.startswith(f"{path}/")
                     and wanted.items() <= each["metadata"].get("labels", {}).items()]  # fmt: skip
            return 200, {"kind": "List", "apiVersion": "v1", "metadata": {}, "items": items}
        reason = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
        return 404, {**reason, "message": f"{path} not found"}


def _discovery(path: str) -> Any:
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        groups = []
        for each in RESOURCES:
            version = {"groupVersion": each, "version": each.partition("/")[2]}
            groups.append({"name": each.partition("/")[0], "versions": [version], "preferredVersion": version})
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    if path == "/api/v1":
        pods = {"name": "pods", "singularName": "pod", "namespaced": True, "kind": "Pod", "verbs": _VERBS}
        return {"kind": "APIResourceList", "groupVersion": "v1", "resources": [pods]}
    if (group := path.removeprefix("/apis/")) in RESOURCES:
        name, kind = RESOURCES[group]
        one = {"name": name, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": _VERBS}
        return {"kind": "APIResourceList", "groupVersion": group, "resources": [one]}
    if path == "/openapi/v3":
        return {"paths": {f"apis/{each}": {"serverRelativeURL": f"/openapi/v3/apis/{each}"} for each in RESOURCES}}
    if (group := path.removeprefix("/openapi/v3/apis/")) in RESOURCES:
        name, kind = RESOURCES[group]
        is_kind = {"group": group.partition("/")[0], "version": group.partition("/")[2], "kind": kind}
        strict = {"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}
        change = {"parameters": [strict], "x-kubernetes-group-version-kind": is_kind, "responses": {}}
        where = f"/apis/{group}/namespaces/{{namespace}}/{name}/{{name}}"
        about = {"title": "x", "version": "1"}
        return {"openapi": "3.0.0", "info": about, "paths": {where: {"patch": change}}, "components": {"schemas": {}}}
    return None


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """One on 127.0.0.1, with a configuration for kubectl in `folder/config`."""
    kept = Cluster()

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            parts = urlsplit(self.path)
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            kept.asked.append(f"{self.command} {self.path}")
            body = json.loads(text) if text else None
            code, answer = kept.answer(self.command, parts.path, parse_qs(parts.query), body)
            plain = isinstance(answer, str)
            data = answer.encode() if plain else json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "text/plain" if plain else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = do_PATCH = _handle  # noqa: N815

        def log_message(self, *words: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    where = {"server": f"http://127.0.0.1:{server.server_port}"}
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "here",
        "clusters": [{"name": "here", "cluster": where}], "users": [{"name": "me", "user": {}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me", "namespace": "training"}}],
    }  # fmt: skip
    (folder / "config").write_text(json.dumps(config))
    try:
        yield kept
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
