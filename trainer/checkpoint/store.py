"""Where checkpoints lie: a folder, or whatever fsspec can address. Not collective: what one rank sees."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast, final

from strategies.errors import ConfigError
from trainer.place import at_home
from trainer.pulse import PULSE

_CHUNK = 1 << 20


class AbstractStore(ABC):
    """Files by name: relative, with `/` between the parts.

    Raises:
        OSError: from every method, where the medium fails.
    """

    address: str

    @abstractmethod
    def sizes(self, below: str = "") -> dict[str, int]:
        """Bytes of every file whose name begins with the folder `below`; empty if there is none."""

    @abstractmethod
    def open(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """For reading; seekable."""

    @abstractmethod
    def create(self, name: str) -> contextlib.AbstractContextManager[HashedFile]:
        """For writing from the start; durable once the context has been left."""

    @abstractmethod
    def publish(self, name: str, data: bytes) -> None:
        """Write a small file that is there wholly or not at all, and durable; replaces an older one."""

    @abstractmethod
    def remove(self, names: Iterable[str]) -> None:
        """Delete files in the order given; those that aren't there don't matter."""

    def read(self, name: str) -> bytes:
        """A small file's content."""
        with self.open(name) as file:
            return file.read()

    def digest(self, name: str) -> str:
        """SHA-256 of a file's content, in hexadecimal."""
        found = hashlib.sha256()
        with self.open(name) as file:
            while chunk := file.read(_CHUNK):
                found.update(chunk)
                PULSE.beat()
        return found.hexdigest()


@final
class HashedFile(io.RawIOBase):
    """A file that is written from start to end, and knows its size and SHA-256."""

    def __init__(self, raw: BinaryIO) -> None:
        super().__init__()
        self._raw = raw
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)
        self.size = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if len(view) < _CHUNK:
            self._digest.update(view)
            self._raw.write(view)
        else:  # at the same time, and done with before the caller uses the memory again
            hashed = self._hasher.submit(self._digest.update, view)
            try:
                self._raw.write(view)
            finally:
                hashed.result()
        self.size += len(view)
        PULSE.beat()
        return len(view)

    def tell(self) -> int:
        return self.size

    def writable(self) -> bool:
        return True

    def flush(self) -> None:
        """What is durable is decided by the store, at the end."""

    def close(self) -> None:
        """The store closes it."""

    def hexdigest(self) -> str:
        """Of what was written so far."""
        return self._digest.hexdigest()


@final
class FolderStore(AbstractStore):
    """A folder of this machine, or one that several machines share (NFS, FSx)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = str(folder)

    def sizes(self, below: str = "") -> dict[str, int]:
        found: dict[str, int] = {}
        for parent, _, names in os.walk(self.folder / below):
            for name in names:
                path = Path(parent, name)
                with contextlib.suppress(FileNotFoundError):
                    found[path.relative_to(self.folder).as_posix()] = path.stat().st_size
        return found

    def open(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        return (self.folder / name).open("rb")

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[HashedFile]:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as raw:
            yield HashedFile(raw)
            raw.flush()
            os.fsync(raw.fileno())
        for folder in (path.parent, *path.parent.relative_to(self.folder).parents):
            _sync(self.folder / folder)

    def publish(self, name: str, data: bytes) -> None:
        fresh = f"{name}.{uuid.uuid4().hex[:8]}"
        with self.create(fresh) as file:
            file.write(data)
        path = self.folder / name
        (self.folder / fresh).replace(path)
        _sync(path.parent)

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            path = self.folder / name
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            for parent in path.relative_to(self.folder).parents[:-1]:
                with contextlib.suppress(OSError):  # not empty
                    (self.folder / parent).rmdir()


@final
class ObjectStore(AbstractStore):
    """Anything that fsspec knows by its address: `s3://`, and others whose library is there.

    Credentials, region and endpoint come from where the library looks for them (for S3: environment, profile,
    instance role), never from the configuration.

    Raises:
        ConfigError: the library of that address isn't installed.
    """

    def __init__(self, address: str) -> None:
        import fsspec

        protocol = address.partition("://")[0]
        options: dict[str, Any] = {"use_listings_cache": False}
        if protocol == "s3":
            options["config_kwargs"] = {"retries": {"mode": "standard", "max_attempts": 10}}
        try:
            self._files, self._root = fsspec.url_to_fs(address.rstrip("/"), **options)
        except (ImportError, ValueError) as error:
            fix = "pip install 'shardwright[aws]'" if protocol == "s3" else "Install it, or use a folder or s3://"
            raise ConfigError(
                f"Checkpoints: {address} can't be opened: {' '.join(str(error).split())}. {fix} (checkpoint.folder)."
            ) from error
        self.address = address.rstrip("/")

    def sizes(self, below: str = "") -> dict[str, int]:
        with _as_os_error():
            found = cast(dict[str, dict[str, Any]], self._files.find(f"{self._root}/{below}".rstrip("/"), detail=True))
        return {name.removeprefix(f"{self._root}/"): int(entry["size"]) for name, entry in found.items()}

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        with _as_os_error(), self._files.open(f"{self._root}/{name}", "rb") as file:
            yield file

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[HashedFile]:
        with _as_os_error():
            raw = self._files.open(f"{self._root}/{name}", "wb")
            try:
                yield HashedFile(raw)
            except BaseException:
                with contextlib.suppress(Exception):
                    raw.discard()
                raise
            raw.close()

    def publish(self, name: str, data: bytes) -> None:
        with _as_os_error():
            self._files.pipe_file(f"{self._root}/{name}", data)

    def remove(self, names: Iterable[str]) -> None:
        with _as_os_error():
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm_file(f"{self._root}/{name}")


def open_store(address: str) -> AbstractStore:
    """The store at a folder's path or an address with `://`.

    Raises:
        ConfigError: nothing installed knows such an address.
    """
    if address.startswith("file://"):
        return FolderStore(Path(address.removeprefix("file://")))
    return ObjectStore(address) if "://" in address else FolderStore(at_home(address).absolute())


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Object stores' libraries have exceptions of their own (no credentials, no such bucket, throttled)."""
    try:
        yield
    except (OSError, ConfigError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
