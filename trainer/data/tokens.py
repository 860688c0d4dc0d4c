"""Token numbers that lie on disk already, read in place."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, final

import numpy as np

from strategies.errors import ConfigError
from strategies.world import World
from trainer.data.base import Data, Samples, Say, Tokenizer
from trainer.data.cache import Cache, MakeReport, fingerprint, on_first_rank, reporter
from trainer.data.documents import ArrayFile, Documents, TokenArray
from trainer.data.language import AbstractTokenStream
from trainer.data.packing import Packing
from trainer.data.tokenizers import first_line, make_tokenizer

_CHUNK = 1 << 24


class TokenType(Enum):
    """The numbers in a raw file, in this machine's byte order."""

    uint16 = "uint16"
    uint32 = "uint32"
    int32 = "int32"
    int64 = "int64"


@final
@dataclass(kw_only=True)
class TokenData(AbstractTokenStream):
    """Memory-mapped token arrays: `.npy`, or raw files of nothing but numbers."""

    paths: list[str] = field(default_factory=list)
    """Files, read one after another as one stream."""
    validation_paths: list[str] = field(default_factory=list)
    """Files to hold out; with them, the share `validation` of the end of `paths` isn't used."""
    type: TokenType = TokenType.uint16
    """The numbers in files that aren't `.npy`."""
    tokenizer: str | None = None
    """What made the tokens, to show text, and for the boundary; None: not known."""
    boundary: int | None = None
    """The token between documents; None: the tokenizer's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.boundary is not None and self.boundary < 0:
            raise ConfigError(f"TokenData: boundary={self.boundary} is negative. Give a token (data.boundary).")
        paths = [*self.paths, *self.validation_paths]
        if self.type is not TokenType.uint16 and paths and all(path.endswith(".npy") for path in paths):
            raise ConfigError(
                f"TokenData: type={self.type.name} is for raw files, and .npy files say their own. "
                "Leave it out (data.type)."
            )

    def build(self, world: World, cache: Path, say: Say) -> Data:
        """See `AbstractData.build`."""
        found = on_first_rank(world, lambda: self._index(cache, reporter(world, say)))
        parts = {name: self._part(cache, part) for name, part in found["parts"].items()}
        return Data(
            train=parts["train"],
            validation=parts.get("validation"),
            tokenizer=make_tokenizer(self.tokenizer) if self.tokenizer else None,
            largest_token=max(part["largest"] for part in found["parts"].values()),
            description=found["description"],
        )

    def _index(self, folder: Path, make_report: MakeReport) -> dict[str, Any]:
        """Find where documents start and where the held-out part does."""
        tokenizer = make_tokenizer(self.tokenizer) if self.tokenizer else None
        boundary = tokenizer.boundary if self.boundary is None and tokenizer is not None else self.boundary
        if boundary is None and (self.isolate_documents or self.packing is not Packing.windows):
            raise ConfigError(
                "TokenData: the token between documents isn't known. Give it (data.boundary), or the tokenizer "
                "(data.tokenizer), or use data.isolate_documents=false with data.packing=windows."
            )
        cache = Cache(folder)
        train = self._scanned(cache, self.paths, "paths", boundary, tokenizer, make_report)
        if self.validation_paths:
            held_out = self._scanned(cache, self.validation_paths, "validation_paths", boundary, tokenizer, make_report)
            parts = {"train": train, "validation": held_out}
        else:
            parts = self._cut(folder, train) if self.validation else {"train": train}
        for part in parts.values():
            plan = self._plan(cache, [part["index"], part["start"], part["stop"]], self._documents(folder, part))
            part["plan"] = plan.name if plan else None
        counts = ", ".join(f"{p['stop'] - p['start']:,} tokens to {_USES[name]}" for name, p in parts.items())
        return {"parts": parts, "description": f"{', '.join(self.paths)}: {counts}"}

    def _open(self, paths: Sequence[str], key: str) -> list[ArrayFile]:
        if not paths:
            raise ConfigError(f"TokenData: no files are given. Name some (data.{key}).")
        files = []
        for path in map(Path, paths):
            file = ArrayFile(path, None if path.suffix == ".npy" else self.type.value)
            try:
                wrong = file.values.ndim != 1 or file.values.dtype.kind not in "iu"
                shape = f"{file.values.dtype} of shape {file.values.shape}"
            except (OSError, ValueError) as error:
                why = "it is no .npy file of numbers" if "allow_pickle" in str(error) else first_line(error)
                raise ConfigError(
                    f"TokenData: {path} can't be read: {why}. Correct it (data.{key}, data.type)."
                ) from error
            if wrong:
                raise ConfigError(
                    f"TokenData: {path} holds {shape}, not a row of whole numbers. Convert it (data.{key})."
                )
            files.append(file)
        return files

    def _scanned(
        self,
        cache: Cache,
        paths: Sequence[str],
        key: str,
        boundary: int | None,
        tokenizer: Tokenizer | None,
        make_report: MakeReport,
    ) -> dict[str, Any]:
        files = self._open(paths, key)
        stream = TokenArray(files)

        def scan(target: Path) -> None:
            starts, largest, smallest = [np.zeros(1, dtype=np.int64)], 0, 0
            with make_report("Indexing tokens", len(stream)) as report:
                for start in range(0, len(stream), _CHUNK):
                    tokens = stream.read(start, start + _CHUNK)
                    largest, smallest = max(largest, int(tokens.max())), min(smallest, int(tokens.min()))
                    if boundary is not None:
                        found = np.flatnonzero(tokens == boundary) + start
                        starts.append(found[found > 0])
                    report.advance(len(tokens))
            np.save(target / "offsets.npy", np.concatenate([*starts, [len(stream)]]))
            (target / "summary.json").write_text(json.dumps({"largest": largest, "smallest": smallest}))

        digests = [[fingerprint(Path(path)), str(file.values.dtype)] for path, file in zip(paths, files, strict=True)]
        entry = cache.entry("index", [digests, boundary], scan)
        summary = json.loads((entry / "summary.json").read_text())
        limit = tokenizer.vocabulary_size if tokenizer is not None else math.inf
        if summary["smallest"] < 0 or summary["largest"] >= limit:
            wanted = "tokens go from 0 on" if tokenizer is None else f"the tokenizer's go from 0 to {limit - 1}"
            raise ConfigError(
                f"TokenData: {', '.join(paths)} holds numbers from {summary['smallest']} to {summary['largest']}, and "
                f"{wanted}. Use the right one (data.tokenizer, data.type)."
            )
        documents = len(np.load(entry / "offsets.npy", mmap_mode="r")) - 1
        return {
            "paths": [str(Path(path).absolute()) for path in paths],
            "index": entry.name,
            "start": 0,
            "stop": len(stream),
            "skip": 0,
            "documents": documents,
            "largest": summary["largest"],
        }

    def _cut(self, folder: Path, whole: dict[str, Any]) -> dict[str, Any]:
        """Hold out the end: the last documents, or where there are too few of them, the last tokens."""
        offsets = np.load(folder / whole["index"] / "offsets.npy", mmap_mode="r")
        place = round(whole["stop"] * (1 - self.validation))
        first = int(np.searchsorted(offsets[:-1], place))
        if 0 < first < whole["documents"]:
            place = int(offsets[first])
            # The boundary at the cut ends the one part and starts the other.
            return {
                "train": {**whole, "stop": place + 1, "documents": first},
                "validation": {**whole, "start": place, "skip": first, "documents": whole["documents"] - first},
            }
        if self.packing is not Packing.windows or not 0 < place < whole["stop"]:
            raise ConfigError(
                f"TokenData: validation={self.validation} of {whole['documents']} documents is none. "
                "Use a larger share, or 0 for no validation (data.validation)."
            )
        last = max(0, whole["documents"] - 1)
        return {
            "train": {**whole, "stop": place},
            "validation": {**whole, "start": place, "skip": last, "documents": whole["documents"] - last},
        }

    def _documents(self, folder: Path, part: dict[str, Any]) -> Documents:
        files = [ArrayFile(Path(path), None if path.endswith(".npy") else self.type.value) for path in part["paths"]]
        return Documents(
            tokens=TokenArray(files, part["start"], part["stop"]),
            offsets=ArrayFile(folder / part["index"] / "offsets.npy"),
            skip=part["skip"],
            num_documents=part["documents"],
        )

    def _part(self, folder: Path, part: dict[str, Any]) -> Samples:
        plan = folder / part["plan"] if part["plan"] else None
        return self._samples(self._documents(folder, part), plan)


_USES = {"train": "train on", "validation": "validate on"}
