"""Damaged and half uploaded checkpoints, in a folder and in a bucket: never loaded, never the end of good ones."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from strategies.errors import ConfigError, TrainingError
from strategies.testing import Workers
from strategies.world import World
from tests.faults.damage import DAMAGES, MARK, NO_MARKER, UNSEEN, case_of, digests, fingerprint, seal_evil
from tests.faults.damaged_runs import (
    STEPS,
    WORDS,
    DamagedRuns,
    check_alike,
    check_refused,
    fit_on_hosts,
    fit_with_faults,
    learned,
)
from tests.faults.plan import Fault, to_json
from tests.faults.running import ROOT
from tests.faults.stores import faulty_stores
from tests.trainer.checkpoint.conftest import place, s3, s3_server  # noqa: F401
from trainer.checkpoint import Checkpointer, Checkpoints, Record
from trainer.checkpoint.store import FolderStore, open_store

SEED = 7
NUM_RUNS = 60
EVERYWHERE = os.environ.get("SHARDWRIGHT_DAMAGES") == "all"
"""In a bucket each damage, not every third; they take seconds each."""
WORLD = World(device=torch.device("cpu"), store=dist.HashStore())


@pytest.fixture(scope="module")
def runs(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> DamagedRuns:
    return DamagedRuns(workers, tmp_path_factory.mktemp("damaged"))


@pytest.mark.parametrize("number", range(NUM_RUNS), ids=lambda number: f"{number}-{case_of(SEED, number)[0]}")
def test_damaged_checkpoint_is_passed_over_and_the_run_ends_as_it_should(runs: DamagedRuns, number: int) -> None:
    runs.check(SEED, number)


@pytest.mark.parametrize(
    "number",
    [number for number, name in enumerate(DAMAGES) if number % 4 == 0 and name not in NO_MARKER],
    ids=lambda number: case_of(SEED, number)[0],
)
def test_damaged_checkpoints_all_of_them_are_refused_in_one_line(runs: DamagedRuns, number: int) -> None:
    runs.check_none_whole(SEED, number)


def make(place: str, heard: list[str], **config: object) -> Checkpointer:  # noqa: F811
    return Checkpointer(place, WORLD, Checkpoints(**config), warn=heard.append)  # type: ignore[arg-type]


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"weights/a": torch.full((30, 40), value), "optim/a/step": torch.tensor(value)}


@pytest.mark.parametrize(
    ("place", "name"),
    [*(("folder", name) for name in DAMAGES), *(("s3", name) for name in [*DAMAGES][:: 1 if EVERYWHERE else 3])],
    indirect=["place"],
)
def test_damaged_checkpoint_in_any_store_is_passed_over(
    place: str,  # noqa: F811
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(MARK, str(tmp_path / "ran"))
    heard: list[str] = []
    keeper = make(place, heard)
    for step in (1, 2, 3):
        keeper.save(tensors(float(step)), {}, Record(progress={"step": step}, world_size=1))
    store = open_store(place)
    before = fingerprint(digests(store), (1, 2))
    DAMAGES[name](store, 3, random.Random(SEED))
    found = make(place, heard).newest()
    assert found is not None
    assert found.manifest.step == 2
    into = tensors(-1.0)
    keeper.load(found, into)
    assert all(bool((value == 2.0).all()) for value in into.values())
    assert name in UNSEEN or "going back to step-00000002" in heard[-1]
    assert fingerprint(digests(store), (1, 2)) == before
    assert not (tmp_path / "ran").exists()


def test_damaged_index_that_runs_code_under_a_manifest_that_fits_is_refused(
    place: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(MARK, str(tmp_path / "ran"))
    keeper = make(place, [])
    keeper.save(tensors(1.0), {}, Record(progress={"step": 1}, world_size=1))
    seal_evil(open_store(place), 1)
    found = keeper.newest()
    assert found is not None
    with pytest.raises(ConfigError, match=r"mkdir has no place in a checkpoint's index"):
        keeper.load(found, tensors(0.0))
    assert not (tmp_path / "ran").exists()


# Disks that fill, stores that fail.


@pytest.mark.parametrize(
    ("kind", "async_save"), [("full", "false"), ("full", "true"), ("limit", "false")]
)  # a limit in the background would hit the log files of the loop
@pytest.mark.parametrize(("phase", "witness"), [("writing", 0), ("writing", 1), ("publishing", 0)])
def test_disk_full_while_saving_loses_no_checkpoint(
    runs: DamagedRuns, workers: Workers, tmp_path: Path, phase: str, witness: int, kind: str, async_save: str
) -> None:
    fault = Fault(kind=kind, phase=phase, witness=witness, occurrence=2, num_bytes=100)
    words = [*WORDS, "trainer.max_steps=8", f"checkpoint.async_save={async_save}"]
    run = tmp_path / "run"
    answers = workers.run(fit_with_faults, 2, str(run), words, to_json([fault]), timeout=60)
    for answer in answers:
        assert answer["error"] == "TrainingError", answer
        assert re.search(r"step-00000004 can't be written: .*(No space left|File too large)", answer["message"]), answer
        assert "\n" not in answer["message"]
    store = FolderStore(run / "checkpoints")
    left = digests(store)
    assert {name.split("/")[0] for name in left} == {"step-00000002"}, "the failed save was left behind"
    again = runs.start(run, 8)
    assert "error" not in again, again
    assert fingerprint(digests(store), (2,)) == fingerprint(left, (2,))
    assert learned(run) == learned(runs.whole)


def test_disk_that_is_really_full_loses_no_checkpoint(tmp_path: Path) -> None:
    script = (
        f"mount -t tmpfs -o size=192k none {tmp_path} && exec {sys.executable} -m tests.faults.small_disk {tmp_path}"
    )
    made = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True)
    if "unshare" in made.stderr or "mount" in made.stderr:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout.splitlines()[-1])
    assert "No space left" in told["error"]
    assert told["saved"] >= 1
    assert told["newest"] == told["saved"]


@pytest.mark.parametrize("every", [1, 2, 3, 5, 8])
def test_store_that_fails_now_and_then_never_loses_the_newest(tmp_path: Path, every: int) -> None:
    place, complete = str(tmp_path / "checkpoints"), 0  # noqa: F811
    for step in range(1, 9):
        with faulty_stores(every=every, methods=("create", "publish", "remove", "sizes")) as stores:
            problem = ""
            try:
                keeper = make(place, [], keep=1)
                keeper.save(tensors(float(step)), {}, Record(progress={"step": step}, world_size=1))
                complete = step
            except (ConfigError, TrainingError) as error:
                problem = str(error)
            assert "\n" not in problem
        assert any(store.struck for store in stores) or every > 5
        found = make(place, []).newest()
        assert (found.manifest.step if found else 0) >= complete
    assert complete == 0 if every == 1 else True


def test_store_that_is_slow_is_waited_for(tmp_path: Path) -> None:
    with faulty_stores(every=1, error=None, delay_s=0.02) as stores:
        keeper = make(str(tmp_path / "checkpoints"), [], async_save=True)
        keeper.save(tensors(1.0), {}, Record(progress={"step": 1}, world_size=1))
        keeper.wait()
        saved = keeper.finished()
    assert stores[0].struck > 3
    assert saved is not None
    assert saved.stall_s < 0.02 < saved.seconds


# Two hosts, each with a disk of its own, whose folders somebody else brings together.


def on_hosts(workers: Workers, run: Path, steps: int) -> list[dict[str, object]]:
    words = [*WORDS, f"trainer.max_steps={steps}", "checkpoint.sharing=local"]
    answers = workers.run(fit_on_hosts, 2, str(run), words, local_size=1, timeout=60)
    check_alike(answers)
    return answers


def merged(run: Path, *, until: int) -> None:
    """As an upload does that took all of the first host, and of the second one only steps up to `until`."""
    whole = run / "checkpoints"
    shutil.copytree(run / "checkpoints-of-0", whole, dirs_exist_ok=True)
    for folder in (run / "checkpoints-of-1").glob("step-*"):
        if int(folder.name[5:]) <= until:
            shutil.copytree(folder, whole / folder.name, dirs_exist_ok=True)


@pytest.mark.parametrize(("until", "newest"), [(6, 6), (4, 4), (2, 2)])
def test_hosts_of_which_one_stopped_uploading_go_on_from_what_both_have(
    runs: DamagedRuns, workers: Workers, tmp_path: Path, until: int, newest: int
) -> None:
    run = tmp_path / "run"
    assert "error" not in on_hosts(workers, run, 6)[0]
    assert not list((run / "checkpoints-of-1").rglob("manifest.json"))
    merged(run, until=until)
    before = fingerprint(digests(FolderStore(run / "checkpoints")), [step for step in STEPS if step <= newest])
    answer = runs.start(run, 8)
    assert "error" not in answer, answer
    assert f"/step-{newest:08} (step {newest})" in (run / "logs" / "rank-0.log").read_text()
    assert learned(run) == learned(runs.whole)
    after = fingerprint(digests(FolderStore(run / "checkpoints")), [step for step in STEPS if step <= newest])
    assert after == before


def test_hosts_of_which_one_never_uploaded_are_refused_in_one_line(
    runs: DamagedRuns, workers: Workers, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    on_hosts(workers, run, 6)
    merged(run, until=0)
    before = digests(FolderStore(run / "checkpoints"))
    check_refused(runs.start(run, 8), "is missing")
    assert digests(FolderStore(run / "checkpoints")) == before


@pytest.mark.parametrize("lost", [0, 1])
def test_hosts_that_go_on_find_their_own_files(runs: DamagedRuns, workers: Workers, tmp_path: Path, lost: int) -> None:
    run = tmp_path / "run"
    on_hosts(workers, run, 6)
    shutil.copytree(run, tmp_path / "broken")
    assert "error" not in on_hosts(workers, run, 8)[0]
    assert learned(run) == learned(runs.whole)
    broken = tmp_path / "broken"
    for folder in (broken / f"checkpoints-of-{lost}").glob("step-0000000[46]"):
        shutil.rmtree(folder)
    answer = on_hosts(workers, broken, 8)[0]
    assert "error" not in answer, answer
    assert learned(broken) == learned(runs.whole)
    assert "/step-00000002 (step 2)" in (broken / "logs" / "rank-0.log").read_text()
