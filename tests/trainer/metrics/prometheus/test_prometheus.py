"""The rules and the dashboard by Prometheus itself: each alert fires when it should and not else, by `promtool`; and a
real server scrapes a real run of two processes, which is then stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from trainer.metrics.prometheus.alerts import alert_rules

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
    # Ranks that have other numbers, those numbers, and what fires so many seconds after it began.
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
        where = f'job="shardwright",instance="127.0.0.1:{9400 + rank}"'
        values = {**HEALTHY, **others} if rank in ranks else HEALTHY
        for metric, text in values.items():
            labels = where if metric == "up" else f'{where},run="a",rank="{rank}"'
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
