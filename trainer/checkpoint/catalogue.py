"""Which checkpoints a store holds, which of them are whole, and which may go."""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from strategies.errors import ConfigError
from strategies.world import World
from trainer.checkpoint.config import Best, Checkpoints, Sharing
from trainer.checkpoint.manifest import NAME, Manifest, folder_of, step_of
from trainer.checkpoint.store import AbstractStore, FolderStore, open_store
from trainer.place import at_home

_CHUNK = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Found:
    """A complete checkpoint."""

    store: AbstractStore
    manifest: Manifest

    @property
    def address(self) -> str:
        """For people: a path, or an address."""
        return f"{self.store.address}/{self.manifest.folder}"

    @property
    def folder(self) -> str:
        """Where its files lie in the store."""
        return f"{self.manifest.folder}/{self.manifest.attempt}"


class Catalogue:
    """The checkpoints below one address. Every method is collective unless it says otherwise.

    A folder may be one that all machines see, or each machine may have its own: then a checkpoint's files are
    spread over them, and the manifest lies where rank 0 was.
    """

    def __init__(
        self, address: str, world: World, config: Checkpoints, warn: Callable[[str], None], *, write: bool
    ) -> None:
        self.store = open_store(address)
        self._world = world
        self._config = config
        self._warn = warn
        self._site = self._find_site(write)
        self._sites: list[int] = world.gather(self._site)
        """For each rank the lowest one that sees the same files."""
        self._damaged: set[tuple[int, str]] = set()
        self._marked: set[int] = set()
        """Steps that have a manifest, whole or not."""
        self._torn: list[int] = []
        """Steps that have files and no manifest."""

    @property
    def leads(self) -> bool:
        """This rank acts for those that see the same files as it."""
        return self._site == self._world.rank

    def complete(self) -> list[Manifest]:
        """Those whose manifest is there and sound, the oldest first; their files may still be damaged."""
        return [manifest for manifest, _ in self._manifests() if manifest is not None]

    def newest(self) -> Found | None:
        """The newest that verifies; None: the store never held a complete one.

        Raises:
            ConfigError: there are checkpoints, and none is whole.
        """
        passed: list[str] = []
        for manifest, problem in reversed(self._manifests()):
            if manifest is not None:
                if (problem := self.problem(manifest)) is None:
                    torn = [f"{folder_of(step)} was never completed" for step in self._torn if step > manifest.step]
                    for line in (*passed, *torn):
                        self._warn(f"damaged checkpoint: {line}; going back to {manifest.folder}")
                    return Found(store=self.store, manifest=manifest)
                self._damaged.add((manifest.step, manifest.attempt))
            passed.append(str(problem))
        if passed:
            raise ConfigError(
                f"Checkpoint: none in {self.store.address} is whole: {'; '.join(passed)}. Bring back the files, or "
                "begin afresh with another run.dir (run.dir, checkpoint.folder)."
            )
        return None

    def at(self, step: int) -> Found:
        """The checkpoint of `step`, verified.

        Raises:
            ConfigError: there is none, or it is damaged.
        """
        problem = "it has no manifest"
        for manifest, torn in reversed(self._manifests(step)):
            if manifest is not None:
                if (damage := self.problem(manifest)) is None:
                    return Found(store=self.store, manifest=manifest)
                problem = damage
            else:
                problem = str(torn)
        raise ConfigError(
            f"Checkpoint: {self.store.address}/{folder_of(step)} is not a complete checkpoint: {problem}. "
            "Name another (resume)."
        )

    def problem(self, manifest: Manifest) -> str | None:
        """What is wrong with a checkpoint's files; None: nothing. Brings to each machine what it lacks.

        Every rank reads its share of the files; all hear the verdict.
        """
        listed = self._listing(manifest.folder)
        wanted = {f"{manifest.folder}/{name}": entry for name, entry in manifest.files.items()}
        holders = {
            name: [site for site in listed if listed[site].get(name) == size] for name, (size, _) in wanted.items()
        }
        for name, sites in holders.items():
            if not sites:
                return f"{name} {_what(name, listed, wanted[name][0])}"
        bad: dict[str, set[int]] = {}
        if self._config.verify:
            for name, site in self._verified(wanted, holders):
                bad.setdefault(name, set()).add(site)
        for name, sites in holders.items():
            whole = [site for site in sites if site not in bad.get(name, ())]
            if not whole:
                return f"{name} has another SHA-256 than its manifest says"
            if lacking := set(self._sites) - set(whole):
                self._copy(name, wanted[name][1], wanted[name][0], whole[0], lacking)
        return None

    def sweep(self, newest: Manifest) -> None:
        """After `newest` is complete: remove what it makes superfluous, and what never became complete.

        Kept are the newest ones, those at multiples of `keep_every`, and the best. A damaged one counts as
        none of these, but stays until it is older than the newest ones that count. Manifests go first: what a
        kill leaves of a removal has none, and is swept later.
        """
        manifests = {found.step: found for found in (*self.complete(), newest) if found.step <= newest.step}
        good = {step: found for step, found in manifests.items() if (step, found.attempt) not in self._damaged}
        recent = sorted(good)[-self._config.keep :]
        kept = {*recent, *self._kept_for_good(good)}
        if not self.leads:
            return
        doomed: list[str] = []
        for name in self.store.sizes():
            step = step_of(name)
            if step is None or (step > newest.step and step in self._marked):
                continue
            if step in kept:
                part = name.split("/")[1]
                stays = part == manifests[step].attempt or (
                    part == NAME and (step != newest.step or self._world.rank == 0)
                )
            else:
                stays = step in self._marked and step not in good and step > recent[0]
            if not stays:
                doomed.append(name)
        self.store.remove(sorted(doomed, key=lambda name: (not name.endswith(f"/{NAME}"), name)))

    def _kept_for_good(self, good: dict[int, Manifest]) -> set[int]:
        every, metric = self._config.keep_every, self._config.keep_best
        kept = {step for step in good if every is not None and step % every == 0}
        scores = {step: found.metrics[metric] for step, found in good.items() if metric in found.metrics}
        finite = {step: score for step, score in scores.items() if math.isfinite(score)}
        if finite:
            choose = min if self._config.keep_best_mode is Best.min else max
            kept.add(choose(finite, key=lambda step: finite[step]))
        return kept

    # How it is done.

    def _find_site(self, write: bool) -> int:
        """The lowest rank that sees the files that this one sees.

        Raises:
            ConfigError: nothing can be written there; on every rank.
        """
        world, sharing = self._world, self._config.sharing
        node = world.rank - world.local_rank
        seen = self._seen_by_all() if write else False
        if not isinstance(self.store, FolderStore) or world.local_size == world.size or sharing is Sharing.shared:
            return 0
        return 0 if seen and sharing is Sharing.auto else node  # of its own, if unsure: that is safe for both

    def _seen_by_all(self) -> bool:
        """Write a mark from rank 0 and look for it from everywhere."""
        mark = f".seen-{self._world.broadcast(secrets.token_hex(4))}"
        with self._world.together():
            if self._world.rank == 0:
                try:
                    self.store.publish(mark, b"")
                except OSError as error:
                    raise ConfigError(
                        f"Checkpoint: {self.store.address} can't be written: {_line(error)}. "
                        "Look at its address and permissions, or choose another (checkpoint.folder)."
                    ) from error
        seen = isinstance(self.store, FolderStore) and (self.store.folder / mark).is_file()
        answer = all(self._world.gather(seen))
        if self._world.rank == 0:
            with contextlib.suppress(OSError):
                self.store.remove([mark])
        return answer

    def _listing(self, below: str = "") -> dict[int, dict[str, int]]:
        """Site -> its files and their bytes.

        Raises:
            ConfigError: a store can't be listed; on every rank.
        """
        mine, problem = None, None
        if self.leads:
            try:
                mine = self.store.sizes(below)
            except OSError as error:
                problem = f"{self.store.address} can't be listed: {_line(error)}"
        heard = self._world.gather([mine, problem])
        for _, trouble in heard:
            if trouble is not None:
                raise ConfigError(
                    f"Checkpoint: {trouble}. Look at the address and its permissions (checkpoint.folder)."
                )
        return {site: files for site, (files, _) in enumerate(heard) if files is not None}

    def _manifests(self, step: int | None = None) -> list[tuple[Manifest | None, str | None]]:
        """Each manifest, or what is wrong with it, by step and time; of one step, or of all."""
        listed = self._listing("" if step is None else folder_of(step))
        places = [
            (found, site)
            for site, names in listed.items()
            for name in names
            if name.endswith(f"/{NAME}") and name.count("/") == 1 and (found := step_of(name)) is not None
        ]
        self._marked = {found for found, _ in places}
        self._torn = sorted({step_of(name) or 0 for names in listed.values() for name in names} - self._marked - {0})
        mine = {found: self._text(found) for found, site in places if site == self._world.rank}
        texts = {
            (int(found), text) for told in self._world.gather(mine) for found, text in told.items() if text is not None
        }
        parsed: list[tuple[int, float, Manifest | None, str | None]] = []
        for found, text in texts:
            try:
                manifest = Manifest.parse(text.encode(errors="surrogateescape"), found)
                parsed.append((found, manifest.saved_at, manifest, None))
            except ValueError as error:
                parsed.append((found, 0.0, None, f"{folder_of(found)}: {error}"))
        return [(manifest, problem) for _, _, manifest, problem in sorted(parsed, key=lambda entry: entry[:2])]

    def _text(self, step: int) -> str | None:
        try:
            return self.store.read(f"{folder_of(step)}/{NAME}").decode(errors="surrogateescape")
        except OSError:
            return ""  # there, but can't be read: torn

    def _verified(self, wanted: dict[str, tuple[int, str]], holders: dict[str, list[int]]) -> list[tuple[str, int]]:
        """The files that have another digest than they should, and at which site."""
        load = dict.fromkeys(range(self._world.size), 0)
        mine: list[tuple[str, int]] = []
        for name, (size, digest) in sorted(wanted.items(), key=lambda entry: (-entry[1][0], entry[0])):
            for site in holders[name]:
                rank = min((rank for rank in load if self._sites[rank] == site), key=lambda rank: (load[rank], rank))
                load[rank] += size + 1
                if rank == self._world.rank and not self._has_digest(name, digest):
                    mine.append((name, site))
        return [(name, site) for found in self._world.gather(mine) for name, site in found]

    def _has_digest(self, name: str, digest: str) -> bool:
        try:
            return self.store.digest(name) == digest
        except OSError:
            return False

    def _copy(self, name: str, digest: str, size: int, source: int, lacking: set[int]) -> None:
        """From rank `source` to the leaders of `lacking`."""
        chunks = self._broadcast(name, size, source)
        problem: str | None = None
        if self.leads and self._site in lacking:
            try:
                with self.store.create(name) as file:
                    for chunk in chunks:
                        file.write(chunk)
                    problem = None if file.hexdigest() == digest else "it arrived damaged"
            except OSError as error:
                problem = _line(error)
        for _ in chunks:  # the others need the rest, whatever happened here
            pass
        with self._world.together():
            if problem is not None:
                raise ConfigError(
                    f"Checkpoint: {self.store.address}/{name} can't be copied from another machine: {problem}. "
                    "Free space, or choose a folder that all machines see (checkpoint.folder)."
                )

    def _broadcast(self, name: str, size: int, source: int) -> Iterator[bytes]:
        with self.store.open(name) if self._world.rank == source else contextlib.nullcontext() as file:
            for begin in range(0, size, _CHUNK):
                data = torch.zeros(min(_CHUNK, size - begin), dtype=torch.uint8)
                if file is not None and (read := file.read(len(data))):
                    data[: len(read)] = torch.frombuffer(bytearray(read), dtype=torch.uint8)
                dist.broadcast(data, source, group=self._world.checkpoint)
                yield data.numpy().tobytes()


def place_of(address: str | Path) -> tuple[str, int | None]:
    """Where the checkpoints lie that somebody names by a run's folder, its checkpoints' folder, or one of them.

    Returns:
        The folder or address of the checkpoints, and the step where one was named.
    """
    whole = absolute(address)
    above, _, last = whole.rpartition("/")
    if (step := step_of(last)) is not None:
        return above, step
    inside = f"{whole}/checkpoints"
    return (inside if Path(inside).is_dir() else whole), None


def absolute(address: str | Path) -> str:
    """A folder's full path, or an address with `://` as it is; without a slash at the end."""
    text = str(address)
    return text.rstrip("/") if "://" in text else str(at_home(text).absolute())


def _what(name: str, listed: dict[int, dict[str, int]], size: int) -> str:
    """Why no site has a file as it should be."""
    found = next((files[name] for files in listed.values() if name in files), None)
    return "is missing" if found is None else f"has {found} bytes instead of {size}"


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
