"""The marker that makes a checkpoint real: what it consists of, with sizes and digests. Published last."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath

FORMAT = 2
NAME = "manifest.json"
_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One complete checkpoint.

    Its files lie in a folder of their own per attempt, so that writing a step again never touches what an
    earlier attempt left.
    """

    step: int
    attempt: str
    saved_at: float
    """Seconds since 1970."""
    files: dict[str, tuple[int, str]]
    """Name below the step's folder -> bytes and SHA-256."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Numbers of this very step."""
    format: int = FORMAT

    @property
    def folder(self) -> str:
        """Of the step, in its store."""
        return folder_of(self.step)

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(size for size, _ in self.files.values())

    def to_bytes(self) -> bytes:
        """JSON that carries a digest of itself."""
        content = asdict(self)
        return json.dumps({"sha256": _digest(content), "content": content}, indent=1).encode()

    @classmethod
    def parse(cls, data: bytes, step: int) -> Manifest:
        """What was published for `step`.

        Raises:
            ValueError: it is damaged, of another step, or of a format that this version doesn't read.
        """
        try:
            raw = json.loads(data)
            content, expected = dict(raw["content"]), raw["sha256"]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{NAME} is torn") from error
        if content.get("format") != FORMAT:
            raise ValueError(f"{NAME} has format {content.get('format')!r}, this version reads {FORMAT}")
        if _digest(content) != expected:
            raise ValueError(f"{NAME} was changed")
        found = cls(**{**content, "files": {name: (size, sha) for name, (size, sha) in content["files"].items()}})
        if found.step != step:
            raise ValueError(f"{NAME} is of step {found.step}")
        for name in found.files:
            parts = PurePosixPath(name).parts
            if not parts or parts[0] != found.attempt or ".." in parts:
                raise ValueError(f"{NAME} names a file outside of its folder")
        return found


def folder_of(step: int) -> str:
    """Name of a step's folder."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step in whose folder the file `name` lies (or that the folder `name` is of); None: in none."""
    match = _FOLDER.fullmatch(name.partition("/")[0])
    return int(match.group(1)) if match else None


def _digest(content: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
