"""The doctor on hosts that have a network of their own, whose links are slow, cut, or lead elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.namespaces import Host, hosts, on_request
from tests.trainer.doctor.jobs import complaints, findings

pytestmark = [on_request, pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parents[3]
Answers = list[tuple[int, str, str]]


def begin(
    at: Sequence[Host], *words: str, size: int | None = None, each: int = 1, script: str = "doctor.py"
) -> list[subprocess.Popen[str]]:
    """A script with so many ranks on each host, started by hand."""
    kept = {name: value for name, value in os.environ.items() if "SOCKET_IFNAME" not in name}
    meeting = {"WORLD_SIZE": str(size or each * len(at)), "MASTER_ADDR": at[0].address, "MASTER_PORT": "29511"}
    return [
        subprocess.Popen(
            host.words(sys.executable, str(ROOT / "scripts" / script), *words),
            env={
                **kept,
                **meeting,
                "OMP_NUM_THREADS": "1",
                "RANK": str(each * number + local),
                "LOCAL_RANK": str(local),
                "LOCAL_WORLD_SIZE": str(each),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for number, host in enumerate(at)
        for local in range(each)
    ]


def end(started: Sequence[subprocess.Popen[str]], timeout: float = 120) -> Answers:
    found = []
    try:
        for process in started:
            out, err = process.communicate(timeout=timeout)
            found.append((process.returncode, out, err))
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return found


def wait_for_traffic(host: Host, started: Sequence[subprocess.Popen[str]]) -> None:
    """Until they are in the middle of their measurements."""
    end = time.monotonic() + 90
    while host.received_bytes < 50_000_000:
        assert time.monotonic() < end
        assert [process.poll() for process in started] == [None] * len(started)
        time.sleep(0.2)


def examine(at: Sequence[Host], folder: Path, *words: str) -> Answers:
    answers = end(begin(at, "--json", str(folder), *words))
    assert (folder / "doctor.json").exists(), answers
    return answers


@pytest.mark.parametrize("slow", [None, 0, 1], ids=["none", "first", "second"])
def test_two_hosts_with_one_link_at_a_tenth_name_its_side(tmp_path: Path, slow: int | None) -> None:
    with hosts(2, rate="1gbit") as found:
        if slow is not None:
            found[slow].shape("100mbit")
        answers = examine(found, tmp_path, "--quick")
    named = findings(tmp_path)["between hosts"]
    if slow is None:
        assert named["level"] == "ok", named
        assert [code for code, _, _ in answers] == [0, 0], answers
    else:
        assert (named["level"], named["where"]) == ("failure", [f"algo-{slow + 1}"])
        assert "slow at sending" in str(named["what"])
        assert [code for code, _, _ in answers] == [1, 1]


def test_ranks_that_share_a_slow_link_do_not_hide_it(tmp_path: Path) -> None:
    with hosts(2, rate="1gbit") as found:
        found[0].shape("100mbit")
        answers = end(begin(found, "--quick", "--json", str(tmp_path), each=2))
    assert [code for code, _, _ in answers] == [1] * 4, answers
    named = findings(tmp_path)["between hosts"]
    assert (named["level"], named["where"]) == ("failure", ["algo-1"])
    rates = {
        row["from"]: row["gb_per_s"] for row in json.loads((tmp_path / "doctor.json").read_text())["between_hosts"]
    }
    assert rates["algo-1"] == pytest.approx(0.0125, rel=0.5)


@pytest.mark.parametrize("side", ["sending", "receiving"])
def test_three_hosts_tell_a_slow_sender_from_a_slow_receiver(tmp_path: Path, side: str) -> None:
    with hosts(3, rate="1gbit") as found:
        found[1].shape("100mbit") if side == "sending" else found[1].shape_receiving("100mbit")
        answers = examine(found, tmp_path, "--quick")
    named = findings(tmp_path)["between hosts"]
    assert (named["level"], named["where"]) == ("failure", ["algo-2"])
    assert f"slow at {side}" in str(named["what"])
    assert [code for code, _, _ in answers] == [1, 1, 1]


def test_whole_examination_of_two_hosts_fits_its_time(tmp_path: Path) -> None:
    with hosts(2, rate="1gbit") as found:
        begun = time.monotonic()
        answers = examine(found, tmp_path)
    assert [code for code, _, _ in answers] == [0, 0], answers
    assert time.monotonic() - begun < 120
    written = json.loads((tmp_path / "doctor.json").read_text())
    for row in written["between_hosts"]:
        assert row["gb_per_s"] == pytest.approx(0.12, rel=0.4)
    assert written["all_reduce"][-1]["bus_gb_per_s"] == pytest.approx(0.118, rel=0.4)


def test_host_whose_own_name_is_loopback_is_told_before_ranks_wait(tmp_path: Path) -> None:
    with hosts(2) as found:
        for host in found:
            path = Path("/etc/netns") / host.namespace / "hosts"
            path.write_text(path.read_text().replace(f"{host.address} {host.name}", f"127.0.1.1 {host.name}"))
        answers = examine(found, tmp_path, "--quick", "--wait", "8")
        chosen = examine(found, tmp_path / "chosen", "--quick", "backend=gloo", "backend.interface=eth0")
    assert [code for code, _, _ in answers] == [1, 1], answers
    seen = findings(tmp_path)
    assert seen["interface"]["level"] == "failure"
    assert "127.0.1.1" in str(seen["interface"]["what"])
    assert "backend.interface=eth0" in str(seen["interface"]["advice"])
    assert seen["connection"]["level"] == "failure"
    assert [code for code, _, _ in chosen] == [0, 0], chosen


def test_link_cut_while_it_is_measured_ends_both_sides_with_one_line(tmp_path: Path) -> None:
    with hosts(2, rate="1gbit") as found:
        started = begin(found, "--json", str(tmp_path), "--wait", "30")
        wait_for_traffic(found[1], started)
        cut = time.monotonic()
        found[1].link("down")
        answers = end(started, 60)
        took = time.monotonic() - cut
    assert [code for code, _, _ in answers] == [1, 1], answers
    assert took < 60
    for _, _, err in answers:
        [line] = complaints(err)
        assert line.startswith("TrainingError: doctor: while "), line
    assert "rank 1 (algo-2) gave no sign of life" in answers[0][2]
    assert "the ranks' store does not answer" in answers[1][2]


def test_stopped_rank_is_named(tmp_path: Path) -> None:
    with hosts(2, rate="1gbit") as found:
        started = begin(found, "--wait", "30")
        wait_for_traffic(found[1], started)
        started[1].send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        try:
            _, err = started[0].communicate(timeout=60)
        finally:
            started[1].kill()
            started[1].communicate()
    assert started[0].returncode == 1
    assert time.monotonic() - begun < 45
    [line] = complaints(err)
    assert "rank 1 (algo-2) gave no sign of life" in line


def test_rank_that_was_never_started_ends_the_others(tmp_path: Path) -> None:
    with hosts(2) as found:
        answers = end(begin(found[:1], "--wait", "2", size=2))
    [(code, _, err)] = answers
    assert code == 1
    [line] = complaints(err)
    assert line.startswith("TrainingError: doctor: waiting for all ranks took more than 12 s: not all 2 ranks came to")


def test_run_that_begins_with_the_doctor_ends_before_its_model_where_a_link_is_slow(tmp_path: Path) -> None:
    words = [
        "doctor=quick", "trainer.max_steps=1", f"run.dir={tmp_path / 'run'}", "logger=[]", "hooks=[]",
        "trainer.eval_every=null", "data.length=16", "trainer.global_batch=2",
    ]  # fmt: skip
    with hosts(2, rate="1gbit") as found:
        found[0].shape("100mbit")
        answers = end(begin(found, *words, script="train.py"))
    assert [code for code, _, _ in answers] == [1, 1], answers
    [line] = [line for _, _, err in answers for line in complaints(err)]
    assert line.startswith("TrainingError: doctor: between hosts on algo-1: algo-1 is slow at sending:")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
