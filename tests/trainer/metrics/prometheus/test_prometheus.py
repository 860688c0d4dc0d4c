"""The rules and the dashboard by Prometheus itself: each alert fires when it should and not else, by `promtool`; and a
real server scrapes a real run of two processes, which is then stopped."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.test_cli import launch, num_lines, started, wait_for
from tests.trainer.commands.jobs import ROOT
from tests.trainer.jobs import TINY
from trainer.cli import main
from trainer.metrics.prometheus.alerts import alert_rules
from trainer.metrics.prometheus.dashboard import dashboard

needed = [name for name in ("prometheus", "promtool") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.skipif(os.environ.get("SHARDWRIGHT_CLUSTER") != "all", reason="takes minutes: SHARDWRIGHT_CLUSTER=all"),
    pytest.mark.skipif(bool(needed), reason=f"no {' and no '.join(needed)} here: apt-get install prometheus"),
]

_EVERY_S = 15
_AT = 2 * 3600
"""When something goes wrong, in seconds."""
_LONG, _BEFORE, _AFTER = 6 * 3600 // _EVERY_S, _AT // _EVERY_S - 1, 4 * 3600 // _EVERY_S

# As long as all is well; of each of two ranks.
HEALTHY = {
    "up": f"1x{_LONG}",
    "shardwright_world_size": f"2x{_LONG}",
    "shardwright_start_timestamp_seconds": f"0x{_LONG}",
    "shardwright_last_progress_timestamp_seconds": f"0+{_EVERY_S}x{_LONG}",
    "shardwright_steps_total": f"0+10x{_LONG}",
    "shardwright_skipped_steps_total": f"0x{_LONG}",
    "shardwright_saving": f"0x{_LONG}",
    "shardwright_loss": f"5-0.001x{_LONG}",
    "shardwright_step_seconds": f"1x{_LONG}",
    "shardwright_step_compute_seconds": f"0.6x{_LONG}",
    "shardwright_step_data_seconds": f"0.1x{_LONG}",
    "shardwright_last_checkpoint_timestamp_seconds": f"0+{_EVERY_S}x{_LONG}",
    "shardwright_last_checkpoint_duration_seconds": f"10x{_LONG}",
    "shardwright_disk_free_bytes": f"50x{_LONG}",
    "shardwright_disk_size_bytes": f"100x{_LONG}",
    "shardwright_host_memory_available_bytes": f"50x{_LONG}",
    "shardwright_host_memory_size_bytes": f"100x{_LONG}",
    "shardwright_device_memory_peak_bytes": f"50x{_LONG}",
    "shardwright_device_memory_size_bytes": f"100x{_LONG}",
}
GONE = {name: values.replace(f"x{_LONG}", f"x{_BEFORE} stale") for name, values in HEALTHY.items()}
STOPPED = {**GONE, "up": f"1x{_BEFORE} 0x{_AFTER}"}
STILL = {"shardwright_last_progress_timestamp_seconds": f"0+{_EVERY_S}x{_BEFORE} {_AT}x{_AFTER}",
         "shardwright_steps_total": f"0+10x{_BEFORE} 4800x{_AFTER}"}  # fmt: skip


def _then(name: str, before: float, after: str) -> dict[str, str]:
    then = f"{after} " * 100 if after in ("NaN", "Inf") else f"{after}x{_AFTER}"  # promtool can't repeat these
    return {f"shardwright_{name}": f"{before}x{_BEFORE} {then}"}


def _always(name: str, values: str) -> dict[str, str]:
    return {f"shardwright_{name}": f"{values}x{_LONG}"}


BOTH, FIRST, SECOND = (0, 1), (0,), (1,)
RANK_0, RANK_1 = "RankGone rank 0", "RankGone rank 1"
Case = tuple[tuple[int, ...], dict[str, str], dict[int, set[str]]]
CASES: dict[str, Case] = {
    # Ranks that have other numbers, those numbers (`@port`: at another address), and what fires so many seconds later.
    "healthy": (BOTH, {}, {-3600: set(), 0: set(), 3600: set(), 3 * 3600: set()}),
    "all ranks stopped": (BOTH, STOPPED, {30: set(), 120: {RANK_0, RANK_1}, 400: {"RunStalled", RANK_0, RANK_1},
                                          7200: {"RunStalled", RANK_0, RANK_1}}),
    "one rank stopped": (SECOND, STOPPED, {120: {RANK_1}}),
    "one rank stopped, the other waits for it": (BOTH, STILL, {200: set(), 400: {"RunStalled"}}),
    "ended in order": (BOTH, GONE, {60: set(), 400: set(), 3600: set()}),
    "never a step": (BOTH, {**_always("last_progress_timestamp_seconds", "1"), **_always("steps_total", "0")},
                     {-_AT + 3000: set(), -_AT + 3700: {"RunNotStarted"}}),
    "a long checkpoint": (BOTH, {**STILL, **_then("saving", 0, "1")}, {1200: set(), 1900: {"CheckpointHangs"}}),
    "no second rank": (SECOND, dict.fromkeys(HEALTHY, ""), {0: {"RanksMissing"}}),
    "four restarts": (FIRST, {"shardwright_start_timestamp_seconds": f"0x{_BEFORE} 1x9 2x9 3x9 4x{_AFTER}"},
                      {300: set(), 600: {"RestartingOften"}, 3 * 3600: set()}),
    "four restarts, each at another port": (
        FIRST,
        {f"shardwright_start_timestamp_seconds@{9500 + n}": f"_x{_BEFORE} _x{10 * n} {n}x9" for n in range(4)},
        {300: set(), 600: {"RestartingOften"}},
    ),
    "loss is NaN": (BOTH, _then("loss", 5, "NaN"), {60: set(), 180: {"LossNotFinite"}}),
    "loss is infinite": (BOTH, _then("loss", 5, "Inf"), {60: set(), 180: {"LossNotFinite"}}),
    "half of the steps skipped": (BOTH, _then("skipped_steps_total", 0, "0+5"), {60: set(), 600: {"StepsSkipped"}}),
    "loss rises": (BOTH, _always("loss", "5+0.001"), {-3600: set(), 0: {"LossRising"}}),
    "steps take longer": (BOTH, _then("step_seconds", 1, "1.5"), {300: set(), 1500: {"Slower"}}),
    "one rank takes longer": (SECOND, _then("step_compute_seconds", 0.6, "1.6"),
                              {300: set(), 1200: {"Straggler rank 1"}}),
    "no checkpoint any more": (BOTH, _then("last_checkpoint_timestamp_seconds", 7000, "7000"),
                               {6000: set(), 7200: {"CheckpointTooOld"}}),
    "no checkpoint at all": (BOTH, {"shardwright_last_checkpoint_timestamp_seconds": ""},
                             {-60: set(), 60: {"CheckpointTooOld"}}),
    "a slow checkpoint": (BOTH, _then("last_checkpoint_duration_seconds", 10, "100"), {60: {"CheckpointSlow"}}),
    "a short one that took longer": (BOTH, _then("last_checkpoint_duration_seconds", 1, "10"), {60: set()}),
    "a full disk": (SECOND, _then("disk_free_bytes", 50, "4"), {60: {"DiskFull rank 1"}}),
    "memory runs out": (SECOND, _then("host_memory_available_bytes", 50, "4"),
                        {30: set(), 120: {"HostMemoryLow rank 1"}}),
    "device memory runs out": (FIRST, _then("device_memory_peak_bytes", 50, "96"),
                               {60: {"DeviceMemoryLow rank 0"}}),
}  # fmt: skip


def test_every_alert_has_a_case_in_which_it_fires() -> None:
    tested = {each.partition(" ")[0] for _, _, times in CASES.values() for alerts in times.values() for each in alerts}
    assert tested == set(re.findall(r"alert: Shardwright(\w+)", alert_rules()))


@pytest.mark.parametrize("name", CASES)
def test_alerts_fire_when_they_should_and_not_else(tmp_path: Path, name: str) -> None:
    ranks, others, times = CASES[name]
    series = []
    for rank in (0, 1):
        for where, text in {**HEALTHY, **(others if rank in ranks else {})}.items():
            metric, _, port = where.partition("@")
            labels = f'job="shardwright",instance="127.0.0.1:{port or 9400 + rank}"'
            labels += "" if metric == "up" else f',run="a",rank="{rank}"'
            if text:
                series.append({"series": f"{metric}{{{labels}}}", "values": text})
    questions = [
        {
            "expr": 'count by (alertname, rank) (ALERTS{alertstate="firing"})',
            "eval_time": f"{_AT + after}s",
            "exp_samples": [{"labels": _labels(each), "value": 1} for each in sorted(alerts)],
        }
        for after, alerts in times.items()
    ]
    (tmp_path / "alerts.yml").write_text(alert_rules())
    test = {
        "rule_files": ["alerts.yml"],
        "evaluation_interval": f"{_EVERY_S}s",
        "tests": [{"interval": f"{_EVERY_S}s", "input_series": series, "promql_expr_test": questions}],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    found = subprocess.run(["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True,
                           check=False)  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr


def _labels(alert: str) -> str:
    """`RankGone rank 1` -> the labels by which it is counted."""
    name, _, rank = alert.partition(" rank ")
    return f'{{alertname="Shardwright{name}"{f", rank={json.dumps(rank)}" if rank else ""}}}'


# A real server and a real run.

SCRIPT = """
import sys, time
sys.path[:0] = [{root!r}]
from dataclasses import dataclass
import trainer.observer
from trainer import register, run
from trainer.hooks.base import Hook

trainer.observer.peak_flops = lambda *_: 1e12  # a CPU's is published nowhere, and the panel of the MFU needs one

@register("hooks", "unhurried")
@dataclass(kw_only=True)
class Unhurried(Hook):
    def on_log(self, moment):
        time.sleep(0.1)

run()
"""
STALLED_S = 8


class Server:
    """A Prometheus of the test's own, with everything that is done every second."""

    def __init__(self, folder: Path) -> None:
        config = yaml.safe_load((folder / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["file_sd_configs"][0]["refresh_interval"] = "1s"
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        with (folder / "prometheus.log").open("w") as log:
            self.process = subprocess.Popen(
                ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
                 f"--web.listen-address=127.0.0.1:{self.port}"],
                stdout=log, stderr=log,
            )  # fmt: skip

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(30)

    def ask(self, expression: str) -> list[dict[str, Any]]:
        """The samples that an expression gives now: labels and value."""
        address = f"http://127.0.0.1:{self.port}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        with urllib.request.urlopen(address, timeout=10) as answer:
            found = json.load(answer)
        assert found["status"] == "success", found
        return [{**each["metric"], "value": float(each["value"][1])} for each in found["data"]["result"]]

    def firing(self) -> set[str]:
        """Alerts, with the rank where they name one."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/alerts", timeout=10) as answer:
            alerts = json.load(answer)["data"]["alerts"]
        labels = [each["labels"] for each in alerts if each["state"] == "firing"]
        return {
            each["alertname"].removeprefix("Shardwright") + (f" rank {each['rank']}" if "rank" in each else "")
            for each in labels
        }

    def until(self, condition: Callable[[], bool], seconds: float = 60) -> float:
        """Wait for it; the seconds that it took."""
        begin = time.monotonic()
        while True:
            with contextlib.suppress(OSError):  # it still starts
                if condition():
                    return time.monotonic() - begin
            assert time.monotonic() - begin < seconds, self.firing()
            time.sleep(0.2)


def expressions() -> dict[str, str]:
    """Every expression of the dashboard and of the rules, the alerts' without what makes an alert of them."""
    found = {}
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            text = target["expr"].replace("$__rate_interval", "10s").replace("$run", ".+").replace("$rank", ".+")
            found[f"{panel['title']} {target['refId']}"] = text
    for rule in yaml.safe_load(alert_rules())["groups"][0]["rules"]:
        found[rule.get("alert", rule.get("record"))] = re.split(r"\n(?=[<>=!]+ )", rule["expr"])[0]
    return found


@pytest.mark.timeout(400)
def test_prometheus_watches_a_run_that_is_stopped_and_goes_on(tmp_path: Path) -> None:
    folder, run = tmp_path / "watch", tmp_path / "run"
    with pytest.raises(SystemExit) as end:
        main(["monitoring", str(folder), "--threshold", f"RunStalled={STALLED_S}"])
    assert end.value.code == 0
    (tmp_path / "mine.py").write_text(SCRIPT.format(root=str(ROOT)))
    words = launch(*TINY, "trainer.max_steps=1000000", "trainer.eval_every=10", "checkpoint.every=10",
                   "hooks=[unhurried]", "logger=[prometheus]", "logger.prometheus.port=0",
                   f"logger.prometheus.targets={folder}/targets", "run.dir=run")  # fmt: skip
    words[2:2] = ["--script", "mine.py"]
    with Server(folder) as server:
        with started(*words, folder=tmp_path) as process:
            print(f"scraped after {server.until(lambda: len(server.ask('up == 1')) == 2, 90):.1f} s")
            connections = psutil.Process(server.process.pid).net_connections()
            assert {each.laddr.ip for each in connections if not each.raddr} == {"127.0.0.1"}
            wait_for(lambda: num_lines(run) > 12, process)
            server.until(lambda: len(server.ask("shardwright_checkpoints_total > 0")) == 2)
            missing: dict[str, str] = {}

            def all_have_data() -> bool:
                missing.clear()
                missing.update({name: text for name, text in expressions().items() if not server.ask(text)})
                return not missing

            try:
                print(f"{len(expressions())} expressions have data after {server.until(all_have_data, 45):.1f} s")
            except AssertionError as error:
                raise AssertionError(f"no data: {missing}") from error
            assert server.firing() == set()
            [slowest] = server.ask("max(max_over_time(scrape_duration_seconds[1m]))")
            print(f"slowest scrape: {1e3 * slowest['value']:.1f} ms")
            assert slowest["value"] < 1

            children = psutil.Process(process.pid).children(recursive=True)
            ranks = {int(each.environ()["RANK"]): each for each in children if "mine.py" in " ".join(each.cmdline())}
            assert sorted(ranks) == [0, 1]
            try:
                ranks[1].suspend()
                took = server.until(lambda: "RunStalled" in server.firing())
                print(f"one rank stopped: RunStalled after {took:.1f} s")
                assert took > STALLED_S - 2
                assert len(server.ask('shardwright_step{rank="0"}')) == 1  # that one answers
                assert server.ask('shardwright_step{rank="1"}') == []
                ranks[1].resume()
                print(f"going on: resolved after {server.until(lambda: not server.firing()):.1f} s")

                for each in ranks.values():
                    each.suspend()
                took = server.until(lambda: "RunStalled" in server.firing())
                print(f"all ranks stopped: RunStalled after {took:.1f} s")
                assert server.ask("up == 1") == []
                everything = {"RunStalled", "RankGone rank 0", "RankGone rank 1"}
                took += server.until(lambda: server.firing() == everything, 90)
                print(f"all ranks stopped: both RankGone after {took:.1f} s")
            finally:
                for each in ranks.values():
                    each.resume()
            print(f"going on: resolved after {server.until(lambda: not server.firing()):.1f} s")
            before = num_lines(run)
            wait_for(lambda: num_lines(run) > before + 5, process)
            before = num_lines(run)

            ranks[1].kill()
            assert process.wait(60) != 0
            took = server.until(lambda: server.firing() >= {"RankGone rank 0", "RankGone rank 1"}, 90)
            print(f"one rank killed, the run ended: RankGone after {took:.1f} s")
            assert (folder / "targets" / "run.json").exists()
        with started(*words, folder=tmp_path) as process:
            print(f"started again: resolved after {server.until(lambda: not server.firing(), 90):.1f} s")
            wait_for(lambda: num_lines(run) > before + 10, process)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 75
            print(f"stopped: not expected any more after {server.until(lambda: not server.ask('up')):.1f} s")
            time.sleep(STALLED_S + 3)
            assert server.firing() == set()
