"""AWS on 127.0.0.1: moto's server, which also keeps the requests as they came and can be told what to answer."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

ROLE = "arn:aws:iam::123456789012:role/training"
IMAGE = "763104351884.dkr.ecr.us-east-1.amazonaws.com/pytorch-training:2.9.0-gpu-py312"
NEEDED = ("launcher=sagemaker", f"launcher.role={ROLE}", f"launcher.image={IMAGE}", "launcher.bucket=models/mine",
          "launcher.instance_type=g5.2xlarge", "launcher.region=us-east-1")  # fmt: skip


class Service:
    """What it was asked, and what it shall answer instead of moto."""

    def __init__(self) -> None:
        self._application = DomainDispatcherApplication(create_backend_app)
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, Callable[[dict[str, Any]], dict[str, Any] | None]] = {}
        """Action -> what is answered; None: moto's own answer."""

    def __call__(self, environment: dict[str, Any], start: Any) -> Any:
        of_batch = re.fullmatch(r"/v1/([a-z]+)", str(environment.get("PATH_INFO", "")))
        target = of_batch[1] if of_batch else str(environment.get("HTTP_X_AMZ_TARGET", ""))
        if not target:
            return self._application(environment, start)
        body = environment["wsgi.input"].read(int(environment.get("CONTENT_LENGTH") or 0))
        environment["wsgi.input"] = io.BytesIO(body)
        action, asked = target.rpartition(".")[2], json.loads(body or b"{}")
        self.requests.append((action, asked))
        answer = self.answers[action](asked) if action in self.answers else None
        if answer is None:
            return self._application(environment, start)
        status = "400 Bad Request" if "__type" in answer else "200 OK"
        start(status, [("Content-Type", "application/x-amz-json-1.1")])
        return [json.dumps(answer).encode()]

    def asked(self, action: str) -> list[dict[str, Any]]:
        """The requests of one kind."""
        return [body for name, body in self.requests if name == action]


@pytest.fixture(scope="session")
def service_process() -> Iterator[tuple[str, Service]]:
    service = Service()
    server = make_server("127.0.0.1", 0, service, threaded=True)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", service
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def aws(service_process: tuple[str, Service], monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """The service, with credentials in the environment and an empty memory."""
    import boto3

    endpoint, service = service_process
    no_files = "/nonexistent"
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": no_files,
        "AWS_SHARED_CREDENTIALS_FILE": no_files,
    }.items():
        monkeypatch.setenv(name, value)
    files = boto3.client("s3")
    if not any(bucket["Name"] == "models" for bucket in files.list_buckets()["Buckets"]):
        files.create_bucket(Bucket="models")
    files.close()
    monkeypatch.setattr("trainer.launch.following.EVERY_S", 0.01)
    service.requests.clear()
    service.answers.clear()
    yield service
    service.answers.clear()
