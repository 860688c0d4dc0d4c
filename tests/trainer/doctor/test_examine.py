"""`shardwright doctor`, and `doctor=quick` in a run, in real processes."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from strategies.testing import Workers
from tests.trainer.commands.jobs import command
from tests.trainer.doctor.jobs import complaints, dying, findings, on_hosts, told_to_train
from tests.trainer.jobs import ROWS

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "point_to_point")


def test_doctor_alone_looks_and_measures_nothing_between(workers: Workers, tmp_path: Path) -> None:
    [(code, out, err)] = workers.run(command, 1, ["doctor", "--quick", "--json", str(tmp_path)])
    assert (code, complaints(err)) == (0, []), out
    assert "1 rank on 1 host" in out
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert (found["world_size"], found["verdict"] in ("ok", "warning")) == (1, True)
    assert {"versions", "memory", "disk", "limits", "interface", "compute"} <= findings(tmp_path).keys()
    assert not any(found.get(name) for name in OPERATIONS)
    assert not (tmp_path / "doctor.png").exists()


def test_doctor_of_two_ranks_measures_and_draws(workers: Workers, tmp_path: Path) -> None:
    answers = workers.run(command, 2, ["doctor", "--quick", "--json", str(tmp_path)])
    assert [(code, complaints(err)) for code, _, err in answers] == [(0, [])] * 2, answers
    assert all(out == "" for _, out, _ in answers[1:])
    found: dict[str, Any] = json.loads((tmp_path / "doctor.json").read_text())
    for name in OPERATIONS:
        assert name.replace("_", "-") in answers[0][1]
        assert [row["bytes"] for row in found[name]][:2] == [2**10, 2**20]
        for row in found[name]:
            factor = {"all_reduce": 1.0, "point_to_point": 1.0}.get(name, 0.5)
            assert row["bus_gb_per_s"] == pytest.approx(factor * row["bytes"] / row["ms"] / 1e6)
    assert {(row["from"], row["to"]) for row in found["between_ranks"]} == {(0, 1), (1, 0)}
    assert all(row["gb_per_s"] > 0 and row["latency_us"] > 0 for row in found["between_ranks"])
    [host] = found["hosts"].values()
    assert host["ranks"] == [0, 1]
    picture = (tmp_path / "doctor.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", picture[16:24])) > 300


def test_doctor_of_two_hosts_names_the_slow_sender_and_ends_with_1(workers: Workers, tmp_path: Path) -> None:
    answers = workers.run(on_hosts, 2, ["--quick", "--json", str(tmp_path)], 1, local_size=1)
    assert [code for code, _, _ in answers] == [1, 1]
    found = findings(tmp_path)["between hosts"]
    assert (found["level"], found["where"]) == ("failure", ["algo-2"])
    assert "algo-2 is slow at sending" in answers[0][1].replace("\n", " ")
    assert findings(tmp_path)["clocks"]["level"] == "ok"
    written = json.loads((tmp_path / "doctor.json").read_text())
    assert [(row["from"], row["to"]) for row in written["between_hosts"]] == [
        ("algo-1", "algo-2"),
        ("algo-2", "algo-1"),
    ]
    assert set(written["hosts"]) == {"algo-1", "algo-2"}


def test_doctor_with_a_rank_missing_says_which(workers: Workers) -> None:
    begun = time.monotonic()
    alone = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    [(code, out, err)] = workers.run(command, 1, ["doctor", "--quick", "--wait", "1"], environment=alone)
    assert (code, out) == (1, "")
    assert err.startswith("TrainingError: doctor: ranks 1, 2 of 3 were not there within 1 s.")
    assert err.count("\n") == 1
    assert time.monotonic() - begun < 30


def test_doctor_with_a_rank_that_dies_says_which(workers: Workers) -> None:
    survivor, dead = workers.outcomes(dying, 2, ["--quick"])
    assert dead.error == "Died"
    assert survivor.error is None, survivor
    code, _, err = survivor.value
    assert code == 1
    [line] = complaints(err)
    assert line.startswith("TrainingError: doctor: while measuring how fast each rank computes: rank 1 (")
    assert "gave no sign of life" in line


def test_doctor_folder_that_cannot_be_written_is_one_line_before_anything_is_measured(
    workers: Workers, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    answers = workers.run(command, 2, ["doctor", "--json", str(tmp_path / "file")])
    assert [(code, out) for code, out, _ in answers] == [(2, "")] * 2
    [line] = "".join(err for _, _, err in answers).splitlines()
    assert "--json" in line


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--instance-type", "p5.48xlarg"], ["p5.48xlarg", "Nearest: p5", "--instance-type"]),
        (["--wait", "0"], ["--wait=0"]),
        (["--wait", "nan"], ["--wait=nan"]),
        (["backend=glo"], ["backend", "gloo"]),
        (["backend=gloo", "backend.interface=nope0"], ["nope0", "backend.interface"]),
    ],
)
def test_doctor_mistake_is_one_line(workers: Workers, words: list[str], parts: list[str]) -> None:
    [(code, out, err)] = workers.run(command, 1, ["doctor", *words])
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert all(part in err for part in parts), err


def test_doctor_takes_backend_and_folders_from_the_keys_of_train(workers: Workers, tmp_path: Path) -> None:
    words = ["backend=gloo", f"run.dir={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}"]
    [(code, out, err)] = workers.run(command, 1, ["doctor", "--quick", "--json", str(tmp_path), *words])
    assert (code, complaints(err)) == (0, []), out
    assert str(tmp_path / "run") in str(findings(tmp_path)["disk"]["what"])
    assert str(tmp_path / "cache") in str(findings(tmp_path)["disk"]["what"])


# In a run.


@pytest.mark.parametrize(("level", "code"), [("warning", 0), ("failure", 1)])
def test_run_with_doctor_goes_on_after_a_warning_and_ends_at_a_failure(
    workers: Workers, tmp_path: Path, level: str, code: int
) -> None:
    words = [*ROWS, "doctor=quick", "trainer.max_steps=2", f"run.dir={tmp_path}"]
    ended = workers.run(told_to_train, 2, words, level)
    assert [each.code for each in ended] == [code, code], ended[0].err
    line = "disk: /f: 1.0 of 9.0 GiB free."
    if level == "warning":
        assert f"doctor: {line}\n" in ended[0].out
        assert line not in ended[1].out
        assert "reached step 2" in ended[0].out
    else:
        said = "".join(each.err for each in ended)
        assert said.startswith(f"TrainingError: doctor: {line}")
        assert said.count("\n") == 1
        assert not (tmp_path / "metrics.jsonl").exists()
    assert f"doctor: {line}" in (tmp_path / "logs" / "rank-0.log").read_text()
    assert findings(tmp_path)["disk"]["level"] == level
