"""Ways in which a checkpoint ends up damaged or half there, on any store; and a campaign over all of them.

    DAMAGES["shard-0 flipped"](store, step, random.Random(7))

changes the checkpoint of `step`, whose store may be a folder or a bucket.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import pickle
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoint.manifest import NAME, Manifest, folder_of, step_of
from trainer.checkpoint.store import AbstractStore, FolderStore

Damage = Callable[[AbstractStore, int, random.Random], None]


def write(store: AbstractStore, name: str, data: bytes) -> None:
    """Replace a file."""
    store.remove([name])
    with store.create(name) as file:
        file.write(data)


def find(store: AbstractStore, step: int, part: str) -> str:
    """The one file of a checkpoint whose name ends in `part`."""
    (name,) = (name for name in store.sizes(folder_of(step)) if name.endswith(part))
    return name


def manifest_of(store: AbstractStore, step: int) -> Manifest:
    """Of a sound checkpoint."""
    return Manifest.parse(store.read(f"{folder_of(step)}/{NAME}"), step)


def digests(store: AbstractStore) -> dict[str, str]:
    """SHA-256 of every file; to see that nothing good was touched."""
    return {name: store.digest(name) for name in store.sizes() if step_of(name) is not None}


# Single files.


def truncated(data: bytes, draw: random.Random) -> bytes:
    """The end is missing."""
    return data[: draw.randrange(1, len(data))]


def flipped(data: bytes, draw: random.Random) -> bytes:
    """One bit is another, anywhere."""
    changed = bytearray(data)
    changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def hole(data: bytes, draw: random.Random) -> bytes:
    """A part is zeros, as after a crash of the machine."""
    begin = draw.randrange(len(data) // 2)
    end = draw.randrange(begin + 1, len(data) + 1)
    return data[:begin] + bytes(end - begin) + data[end:]


def empty(data: bytes, draw: random.Random) -> bytes:
    """Nothing but a name."""
    return b""


def longer(data: bytes, draw: random.Random) -> bytes:
    """Something of another write follows."""
    return data + bytes(draw.randrange(256) for _ in range(draw.randint(1, 64)))


def _change(
    change: Callable[[bytes, random.Random], bytes], part: str, store: AbstractStore, step: int, draw: random.Random
) -> None:
    name = find(store, step, part)
    data = store.read(name)
    while (changed := change(data, draw)) == data:
        pass
    write(store, name, changed)


def _remove(part: str, store: AbstractStore, step: int, draw: random.Random) -> None:
    store.remove([find(store, step, part)])


# Whole checkpoints.


def _half(store: AbstractStore, step: int, draw: random.Random) -> None:
    """Of an upload in no special order, the manifest and some files arrived."""
    names = [name for name in store.sizes(folder_of(step)) if not name.endswith(NAME)]
    store.remove(draw.sample(sorted(names), draw.randint(1, len(names) - 1)))


def _half_without_manifest(store: AbstractStore, step: int, draw: random.Random) -> None:
    """An upload in order was broken off."""
    _half(store, step, draw)
    _remove(NAME, store, step, draw)


def _nothing_but_manifest(store: AbstractStore, step: int, draw: random.Random) -> None:
    store.remove([name for name in store.sizes(folder_of(step)) if not name.endswith(NAME)])


def _all_gone(store: AbstractStore, step: int, draw: random.Random) -> None:
    """In a folder the empty folders stay."""
    names = list(store.sizes(folder_of(step)))
    store.remove(names)
    if isinstance(store, FolderStore):
        for name in names:
            (store.folder / name).parent.mkdir(parents=True, exist_ok=True)


def _other_manifest(store: AbstractStore, step: int, draw: random.Random) -> None:
    """That of another step, which names files of that step."""
    write(store, f"{folder_of(step)}/{NAME}", store.read(f"{folder_of(_other(store, step))}/{NAME}"))


def _other_shard(store: AbstractStore, step: int, draw: random.Random) -> None:
    """One rank's file is of another step: as large, as readable, and wrong."""
    part = f"__{draw.choice(_ranks(store, step))}_0.distcp"
    write(store, find(store, step, part), store.read(find(store, _other(store, step), part)))


def _other_attempt(store: AbstractStore, step: int, draw: random.Random) -> None:
    """All files but the manifest are of another step."""
    mine, theirs = manifest_of(store, step), manifest_of(store, _other(store, step))
    for name in theirs.files:
        here = f"{mine.folder}/{mine.attempt}/{name.removeprefix(f'{theirs.attempt}/')}"
        write(store, here, store.read(f"{theirs.folder}/{name}"))


def _swapped_shards(store: AbstractStore, step: int, draw: random.Random) -> None:
    """Two files have each other's content."""
    ranks = _ranks(store, step)
    one, two = (
        (find(store, step, part) for part in (f"__{ranks[0]}_0.distcp", f"__{ranks[1]}_0.distcp"))
        if len(ranks) > 1
        else (find(store, step, "distcp"), find(store, step, "state.json"))
    )
    first, second = store.read(one), store.read(two)
    write(store, one, second)
    write(store, two, first)


def _evil_index(store: AbstractStore, step: int, draw: random.Random) -> None:
    """An index that would run code."""
    write(store, find(store, step, ".metadata"), evil_pickle())


def _edited_manifest(store: AbstractStore, step: int, draw: random.Random) -> None:
    """Somebody made its digests fit the files that they changed, but not its own."""
    name = find(store, step, "distcp" if len(_ranks(store, step)) == 1 else "__0_0.distcp")
    write(store, name, flipped(store.read(name), draw))
    path = f"{folder_of(step)}/{NAME}"
    raw = json.loads(store.read(path))
    raw["content"]["files"][name.removeprefix(f"{folder_of(step)}/")][1] = store.digest(name)
    write(store, path, json.dumps(raw, indent=1).encode())


def _manifest_of_nothing(store: AbstractStore, step: int, draw: random.Random) -> None:
    """JSON, and not what it should be."""
    content = draw.choice([b"{}", b"[]", b"null", b'{"content": 3, "sha256": 4}', b'{"content": {}, "sha256": ""}'])
    write(store, f"{folder_of(step)}/{NAME}", content)


def _other(store: AbstractStore, step: int) -> int:
    steps = {found for name in store.sizes() if (found := step_of(name)) is not None}
    return max(found for found in steps if found < step)


def _ranks(store: AbstractStore, step: int) -> list[int]:
    names = [name for name in store.sizes(folder_of(step)) if name.endswith(".distcp")]
    return sorted(int(name.rpartition("/")[2].split("_")[2]) for name in names)


MARK = "SHARDWRIGHT_FAULTS_RAN"
"""Environment variable: the folder that a loaded evil pickle would make."""


class _Evil:
    def __reduce__(self) -> Any:
        return (os.mkdir, (os.environ[MARK],))


def evil_pickle() -> bytes:
    """Makes the folder `$SHARDWRIGHT_FAULTS_RAN` when it is unpickled."""
    stream = io.BytesIO()
    pickle.Pickler(stream).dump(_Evil())
    return stream.getvalue()


_PARTS = {"manifest": NAME, "state": "state.json", "index": ".metadata", "shard": "__0_0.distcp"}
DAMAGES: dict[str, Damage] = {
    **{
        f"{title} {change.__name__}": functools.partial(_change, change, part)
        for title, part in _PARTS.items()
        for change in (truncated, flipped, hole, empty, longer)
    },
    **{f"{title} missing": functools.partial(_remove, part) for title, part in _PARTS.items()},
    "half uploaded": _half,
    "half uploaded, without manifest": _half_without_manifest,
    "nothing but the manifest": _nothing_but_manifest,
    "all files gone": _all_gone,
    "manifest of another step": _other_manifest,
    "shard of another step": _other_shard,
    "all files of another step": _other_attempt,
    "shards swapped": _swapped_shards,
    "index that runs code": _evil_index,
    "manifest edited": _edited_manifest,
    "manifest of nothing": _manifest_of_nothing,
}
"""By name."""
UNSEEN = ("all files gone",)
"""Leave nothing by which one could know."""
NO_MARKER = (*UNSEEN, "half uploaded, without manifest", "manifest missing")
"""Leave what never was a checkpoint, as far as one can know."""


def seal_evil(store: AbstractStore, step: int) -> None:
    """An index that runs code, under a manifest that is right in every digest: what a liar can make.

    It isn't in `DAMAGES`, since no digest tells it: it must be refused, without being run.
    """
    index, found = find(store, step, ".metadata"), manifest_of(store, step)
    write(store, index, evil_pickle())
    name = index.removeprefix(f"{found.folder}/")
    found.files[name] = (store.sizes(found.folder)[index], store.digest(index))
    write(store, f"{found.folder}/{NAME}", found.to_bytes())


def case_of(seed: int, number: int) -> tuple[str, random.Random]:
    """The `number`-th damage of a campaign: each by name in turn, drawn anew each time."""
    names = list(DAMAGES)
    return names[number % len(names)], random.Random(f"{seed}/{number}")


def fingerprint(digested: dict[str, str], steps: Sequence[int]) -> str:
    """Of all files of some steps."""
    mine = sorted(entry for entry in digested.items() if step_of(entry[0]) in steps)
    return hashlib.sha256(repr(mine).encode()).hexdigest()


def campaign(folder: Path, seed: int, count: int) -> int:
    """`count` damaged checkpoints, each of a run of two ranks; the exit code."""
    from strategies.testing import Workers
    from tests.faults.damaged_runs import DamagedRuns

    workers = Workers()
    try:
        runs = DamagedRuns(workers, folder)
        failed = 0
        for number in range(count):
            name, _ = case_of(seed, number)
            try:
                runs.check(seed, number)
                print(f"[{number + 1}/{count}] {name}: well", flush=True)
            except AssertionError as error:
                failed += 1
                print(f"PROBLEM [{number + 1}/{count}] {name} (seed {seed}, number {number}): {error}", flush=True)
    finally:
        workers.close()
    print(json.dumps({"seed": seed, "damaged": count, "problems": failed}))
    return 1 if failed else 0
