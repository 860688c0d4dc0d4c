"""A place for checkpoints: a folder, and a bucket of a real S3 server on loopback."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

Application = Callable[[Any, Any], Any]


class Unreliable:
    """An S3 server of which every `failing`-th request fails with 503, once that is set."""

    def __init__(self, application: Application) -> None:
        self._application = application
        self._lock = threading.Lock()
        self.failing = 0
        self.requests = 0
        self.failed = 0

    def __call__(self, environment: Any, start: Any) -> Any:
        with self._lock:
            self.requests += 1
            fails = self.failing and self.requests % self.failing == 0
            self.failed += bool(fails)
        if not fails:
            return self._application(environment, start)
        environment["wsgi.input"].read(int(environment.get("CONTENT_LENGTH") or 0))
        start("503 Service Unavailable", [("Content-Type", "application/xml")])
        return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[tuple[str, Unreliable]]:
    """Address and server of an S3 on 127.0.0.1, for the whole session."""
    application = Unreliable(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", application
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def s3(s3_server: tuple[str, Unreliable], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Unreliable]]:
    """An empty prefix of a bucket, with credentials in the environment; and the server."""
    import fsspec

    endpoint, server = s3_server
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # of a server before, which may have gone
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    if not files.exists("runs"):
        files.mkdir("runs")
    yield f"s3://runs/{uuid.uuid4().hex[:8]}", server
    server.failing = 0


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Address of an empty place for checkpoints."""
    if request.param == "folder":
        return str(tmp_path / "checkpoints")
    address: str = request.getfixturevalue("s3")[0]
    return address
