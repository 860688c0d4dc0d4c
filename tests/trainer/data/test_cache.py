from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from strategies.errors import ConfigError
from strategies.world import World
from tests.trainer.data.helpers import build, tokens_of, world
from trainer.data import TextData
from trainer.data.cache import Cache, Report, fingerprint, on_first_rank


class Maker:
    """Counts how often it is asked."""

    def __init__(self, content: str = "content", wait_s: float = 0.0) -> None:
        self.content, self.wait_s, self.calls = content, wait_s, 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text(self.content)
        time.sleep(self.wait_s)


def test_cache_entry_is_made_once_per_key(tmp_path: Path) -> None:
    make = Maker()
    paths = {Cache(tmp_path).entry("kind", key, make) for key in (["a"], ["a"], ["b"])}
    assert make.calls == 2
    assert {(path / "inner" / "file").read_text() for path in paths} == {"content"}


@pytest.mark.parametrize("damage", ["changed", "shorter", "missing", "unsealed", "nonsense"])
def test_cache_entry_that_is_damaged_is_made_again(damage: str, tmp_path: Path) -> None:
    make = Maker("x" * 300_000)
    entry = Cache(tmp_path).entry("kind", 1, make)
    file = entry / "inner" / "file"
    if damage == "changed":
        file.write_text("x" * 200_000 + "y" + "x" * 99_999)
    elif damage == "shorter":
        file.write_text("x" * 299_999)
    elif damage == "missing":
        file.unlink()
    elif damage == "unsealed":
        (entry / "meta.json").unlink()
    else:
        (entry / "meta.json").write_text('{"files": [')
    assert Cache(tmp_path).entry("kind", 1, make) == entry
    assert file.read_text() == "x" * 300_000
    assert make.calls == 2


def test_cache_entry_whose_maker_failed_or_was_killed_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise ConfigError("TextData: broken.")

    with pytest.raises(ConfigError, match="broken"):
        Cache(tmp_path).entry("kind", 1, fail)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    entry = Cache(tmp_path).entry("kind", 1, Maker())
    killed = tmp_path / f".{entry.name}-killed"  # what a process that was killed leaves behind
    killed.mkdir()
    (entry / "inner" / "file").unlink()
    Cache(tmp_path).entry("kind", 1, Maker())
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [entry]


def race(tmp_path: Path, makers: list[Maker]) -> list[Path]:
    found: list[Path] = []

    def one(make: Maker) -> None:
        found.append(Cache(tmp_path).entry("kind", 1, make))

    threads = [threading.Thread(target=one, args=(make,)) for make in makers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_cache_entry_asked_for_at_once_is_made_by_one(tmp_path: Path) -> None:
    makers = [Maker(wait_s=0.2), Maker(wait_s=0.2)]
    assert len(set(race(tmp_path, makers))) == 1
    assert sum(maker.calls for maker in makers) == 1


def test_cache_entry_where_locks_do_not_work_is_made_by_both_and_kept_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import filelock

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    makers = [Maker(wait_s=0.2), Maker(wait_s=0.2)]
    (entry, other) = race(tmp_path, makers)
    assert entry == other
    assert sum(maker.calls for maker in makers) == 2
    assert (entry / "inner" / "file").read_text() == "content"
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [entry]


def test_cache_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"can't be written.*\(cache\)") as error:
        Cache(tmp_path / "file" / "cache")
    assert "\n" not in str(error.value)


def test_fingerprint_follows_the_content_from_end_to_end(tmp_path: Path) -> None:
    prints = set()
    for change in (None, 0, 70_000, 199_999):
        content = bytearray(200_000)
        if change is not None:
            content[change] = 1
        (tmp_path / "f").write_bytes(content)
        prints.add(fingerprint(tmp_path / "f"))
    assert len(prints) == 4


def test_tokens_are_made_once_and_found_again_from_another_path(tmp_path: Path) -> None:
    said: list[str] = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for name in ("a.txt", "b.txt", "c.txt"):
            (tmp_path / folder / name).write_text(f"text of {name}\n" * 20)
        build(TextData(paths=[str(tmp_path / folder)], validation=0.3), tmp_path / "cache", said)
    assert sum(line.startswith("Tokenising") for line in said) == 1
    (tmp_path / "two" / "b.txt").write_text("changed")
    data = build(TextData(paths=[str(tmp_path / "two")], validation=0.3), tmp_path / "cache", said)
    assert sum(line.startswith("Tokenising") for line in said) == 2
    assert data.validation is not None
    both = [token for sample in [*tokens_of(data.train), *tokens_of(data.validation)] for token in sample]
    assert "changed" in bytes(token for token in both if token < 256).decode()


def job_on_first_rank(world: World, results: list[Any], folder: str) -> Any:
    def work() -> Any:
        with (Path(folder) / f"calls-{world.rank}").open("a") as file:
            file.write("x")
        time.sleep(0.2)
        result = results[world.rank]
        if isinstance(result, str):
            raise ConfigError(result)
        return result

    try:
        return on_first_rank(world, work)
    except ConfigError as error:
        return f"refused: {error}"


def run_on_ranks(count: int, per_machine: int, results: list[Any], folder: Path) -> list[Any]:
    """`on_first_rank` on threads that share a store, with a stand-in for the collective."""
    store = torch.distributed.HashStore()
    barrier = threading.Barrier(count)
    slots: list[Any] = [None] * count
    found: list[Any] = [None] * count

    class Shared(World):
        def gather(self, value: Any) -> list[Any]:
            slots[self.rank] = json.loads(json.dumps(value))
            barrier.wait()
            return list(slots)

    def one(rank: int) -> None:
        here = Shared(
            rank=rank,
            local_rank=rank % per_machine,
            size=count,
            local_size=per_machine,
            device=torch.device("cpu"),
            store=store,
        )
        found[rank] = job_on_first_rank(here, results, str(folder))

    # All ranks count occasions alike; threads of one process would share the counter.
    import trainer.data.cache as module

    class Same:
        def __next__(self) -> str:
            return folder.name

    before, module._occasions = module._occasions, Same()  # type: ignore[assignment]
    try:
        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    finally:
        module._occasions = before
    return found


def test_on_first_rank_works_once_per_machine_and_tells_every_rank(tmp_path: Path) -> None:
    assert run_on_ranks(4, 2, [{"a": 1}] * 4, tmp_path) == [{"a": 1}] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calls-0", "calls-2"]


def test_on_first_rank_error_on_one_machine_is_everybodys(tmp_path: Path) -> None:
    assert run_on_ranks(4, 2, [1, 1, "Data: gone.", 1], tmp_path) == ["refused: Data: gone."] * 4


def test_on_first_rank_machines_that_differ_are_refused(tmp_path: Path) -> None:
    found = run_on_ranks(2, 1, [1, 2], tmp_path)
    assert all("ranks 0 and 1 read different data" in answer for answer in found)


def test_report_without_a_terminal_is_sparse_and_silent_on_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    clock = iter([0.0, 10.0, 31.0, 31.0, 40.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with Report("Tokenising", 3000, said.append, shown=True) as report:
        for _ in range(3):
            report.advance(1000)
    assert said == ["Tokenising: 2,000 of 3,000"]
    monkeypatch.setattr(time, "monotonic", lambda: 1e9)
    with Report("Tokenising", None, said.append, shown=False) as report:
        report.advance(1)
    assert len(said) == 1


def test_report_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    said: list[str] = []
    with Report("Tokenising", 2, said.append, shown=True) as report:
        report.advance(2)
    assert "Tokenising" in capsys.readouterr().err
    assert not said


def test_build_on_every_rank_gives_the_same_samples(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    source = TextData(paths=[str(tmp_path / "a.txt")], length=32)
    first, second = (source.build(world(rank, 2), tmp_path / "cache", lambda _: None) for rank in (0, 1))
    assert tokens_of(first.train) == tokens_of(second.train)
