"""The endpoint of each rank: what it answers while a run of two processes goes on, and what is refused before."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from strategies.errors import ConfigError
from strategies.testing import Workers
from tests.trainer.jobs import ROWS, fit
from trainer import register
from trainer.hooks.base import Hook, Moment
from trainer.metrics.loggers import Loggers
from trainer.metrics.prometheus.catalogue import BY_NAME, COUNTER, exposed
from trainer.metrics.prometheus.logger import PrometheusLogger

RUN = (*ROWS, "logger=[prometheus]", "logger.prometheus.port=0")
START = {"step": 5, "samples": 10, "tokens": 100, "skipped": 2, "strategy": "ddp", "restarts": 1, "final_step": None}


@register("hooks", "until_seen")
@dataclass(kw_only=True)
class UntilSeen(Hook):
    """Ends the run once somebody has left word in its folder."""

    def on_log(self, moment: Moment) -> str | None:
        return "seen" if (moment.folder / "seen").exists() else None


def fit_until_seen(folder: str, keys: list[str]) -> dict[str, Any]:
    return fit(folder, [*keys, "hooks=[until_seen]"], "Rows")  # the hook is known to whoever imports this module


def answers(address: str) -> dict[str, Any]:
    """What an endpoint answers: name -> labels (a tuple of pairs) -> value, by Prometheus' own parser."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, Any] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
            if (known := BY_NAME.get(sample.name)) is not None:
                assert (family.type, family.documentation) == (known.kind, known.help)
    return found


def number(found: dict[str, Any], name: str) -> float:
    """The one value of a name."""
    [value] = found[f"shardwright_{name}"].values()
    return float(value)


def addresses(file: Path) -> list[str]:
    [group] = json.loads(file.read_text())
    return list(group["targets"])


# A real run.


def test_endpoint_of_each_rank_answers_while_a_run_goes_on(workers: Workers, tmp_path: Path) -> None:
    run = tmp_path / "first"
    keys = [*RUN, "strategy=ddp", "trainer.max_steps=1000000", "trainer.eval_every=5", "checkpoint.every=5"]
    ended: list[Any] = []
    thread = threading.Thread(target=lambda: ended.extend(workers.run(fit_until_seen, 2, str(run), keys)))
    thread.start()
    try:
        file = run / "prometheus" / "targets.json"
        deadline = time.monotonic() + 100
        while not file.exists() or number(answers(addresses(file)[1]), "steps_total") < 12:
            assert thread.is_alive(), ended
            assert time.monotonic() < deadline
            time.sleep(0.05)
        ranks = [answers(address) for address in addresses(file)]
        later = answers(addresses(file)[0])
    finally:
        run.mkdir(exist_ok=True)
        (run / "seen").touch()
        thread.join(60)
    assert [each["progress"]["step"] > 12 for each in ended] == [True, True]
    assert not file.exists()  # it has come to its end: nobody is to miss it
    for address in [each for rank in ranks for each in rank]:
        assert address.startswith("shardwright_")
    for rank, found in enumerate(ranks):
        for name, samples in found.items():
            [labels] = [dict(each) for each in samples]
            assert (labels["run"], labels["rank"]) == ("first", str(rank)), name
        assert found.keys() >= {name for name, family in BY_NAME.items() if family.always}
        for name in ("val_loss", "final_step", "last_checkpoint_step", "last_checkpoint_duration_seconds"):
            assert number(found, name) > 0
        assert ("shardwright_last_checkpoint_size_bytes" in found) == (rank == 0)
        [info] = [dict(each) for each in found["shardwright_run_info"]]
        assert (info["strategy"], info["world_size"], info["device"]) == ("ddp", "2", "cpu")
        assert number(found, "step") >= 12
        assert abs(number(found, "step") - number(found, "steps_total")) <= 1  # either may be the newer one
        assert 0 <= 12 * number(found, "step") - number(found, "consumed_samples") <= 12  # the newest not yet logged
        assert number(found, "last_checkpoint_step") % 5 == 0
        assert 0 <= time.time() - number(found, "last_progress_timestamp_seconds") < 60
        assert 2**20 < number(found, "process_memory_bytes") < number(found, "host_memory_size_bytes")
    assert number(later, "step") >= number(ranks[0], "step")
    assert ranks[0]["shardwright_start_timestamp_seconds"] != ranks[1]["shardwright_start_timestamp_seconds"]


# What is refused, on all ranks.


def taken(workers: Workers, folder: Path, *keys: str) -> list[dict[str, Any]]:
    return workers.run(fit, 2, str(folder / "run"), [*ROWS, "logger=[prometheus]", *keys], "Rows")


def test_port_that_is_taken_on_one_rank_is_refused_on_all(workers: Workers, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ends = taken(workers, tmp_path, f"logger.prometheus.port={port - 1}")
    for end in ends:
        assert end["error"] == "ConfigError"
        assert f"127.0.0.1 port {port} of {socket.gethostname()}" in end["message"]
        assert "Address already in use" in end["message"]
        assert "port=0" in end["message"]
    with socket.create_server(("127.0.0.1", port - 1)):  # rank 0's is free again
        pass


def _without_the_package(*arguments: Any) -> dict[str, Any]:
    with mock.patch.dict(sys.modules, {"prometheus_client": None}):
        return fit(*arguments)


def test_package_that_is_missing_says_how_to_install_it(workers: Workers, tmp_path: Path) -> None:
    for end in workers.run(_without_the_package, 2, str(tmp_path / "run"), list(RUN), "Rows"):
        assert end["error"] == "ConfigError"
        assert "pip install 'shardwright[prometheus]'" in end["message"]


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"port": -1}, "port=-1"),
        ({"port": 65536}, "port=65536"),
        ({"host": "node7"}, "host='node7'"),
        ({"host": ""}, "host=''"),
        ({"targets": " "}, "targets is empty"),
    ],
)
def test_setting_that_cant_be_is_refused(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=rf"^PrometheusLogger: .*{part}.*\(logger\.prometheus\.\w+\)"):
        PrometheusLogger(**settings)


def test_ports_that_run_out_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"port=65535 leaves no ports for 2 ranks.*up to 65534"):
        PrometheusLogger(port=65535).join(world(), tmp_path)


# One rank by itself.


def world(rank: int = 0, hosts: tuple[str, ...] = ("a", "a")) -> Any:
    """Two ranks, as one of them sees them."""
    there = [{"host": host, "address": f"127.0.0.1:{9400 + index}"} for index, host in enumerate(hosts)]
    local = [sum(host == hosts[index] for host in hosts[:index]) for index in range(len(hosts))]
    return SimpleNamespace(
        rank=rank,
        local_rank=local[rank],
        size=len(hosts),
        local_size=hosts.count(hosts[rank]),
        device=torch.device("cpu"),
        together=contextlib.nullcontext,
        gather=lambda value: there,
    )


@contextlib.contextmanager
def joined(folder: Path, *, ends: bool = True, **settings: Any) -> Iterator[PrometheusLogger]:
    logger = PrometheusLogger(port=0, **settings)
    logger.join(world(), folder)
    try:
        yield logger
        if ends:
            logger.event("end", {"outcome": "finished"})
    finally:
        logger.close()


def test_endpoint_listens_on_this_machine_alone_unless_told(tmp_path: Path) -> None:
    for settings, host in (({}, "127.0.0.1"), ({"host": "localhost"}, "127.0.0.1"), ({"host": "0.0.0.0"}, "0.0.0.0")):
        with joined(tmp_path, **settings) as logger:
            assert logger._serving is not None
            assert logger._serving[0].socket.getsockname()[0] == host


def test_counters_begin_with_the_process_and_gauges_with_the_run(tmp_path: Path) -> None:
    with joined(tmp_path) as logger:
        logger.event("start", START)
        logger.advance(6)
        logger.log(6, {"tokens": 150, "samples": 12, "skipped": 3})
        logger.event("rollback", {"step": 5})
        logger.advance(6)
        logger.log(6, {"tokens": 180, "samples": 14, "skipped": 3})
        found = answers(logger._address())
    assert (number(found, "step"), number(found, "steps_total")) == (6, 2)
    assert (number(found, "consumed_tokens"), number(found, "tokens_total")) == (180, 80)
    assert (number(found, "samples_total"), number(found, "skipped_steps_total")) == (4, 1)
    assert (number(found, "rollbacks_total"), number(found, "restarts")) == (1, 1)
    assert "shardwright_final_step" not in found


def test_batch_of_an_evaluation_is_progress_but_no_step(tmp_path: Path) -> None:
    with joined(tmp_path) as logger:
        logger.event("start", START)
        before = answers(logger._address())
        logger.advance(5)
        after = answers(logger._address())
    assert number(after, "steps_total") == number(before, "steps_total") == 0
    assert number(after, "last_progress_timestamp_seconds") > number(before, "last_progress_timestamp_seconds")


def test_saving_is_seen_while_it_lasts(tmp_path: Path) -> None:
    with joined(tmp_path) as logger:
        logger.event("saving", {"now": True})
        assert number(answers(logger._address()), "saving") == 1
        logger.event("saving", {"now": False})
        assert number(answers(logger._address()), "saving") == 0


def test_loss_that_is_not_finite_is_told_as_it_is(tmp_path: Path) -> None:
    with joined(tmp_path) as logger:
        logger.log(1, {"loss": math.nan, "val_loss": math.inf})
        found = answers(logger._address())
    assert math.isnan(number(found, "loss"))
    assert number(found, "val_loss") == math.inf


@pytest.mark.parametrize(
    ("logged", "name", "value"),
    [
        ("step_s", "step_seconds", 2.0),
        ("memory_mib", "device_memory_peak_bytes", 2.0 * 2**20),
        ("slowest_rank", "slowest_rank", 2.0),
        ("wait_ms", "wait_seconds", 0.002),
        ("images_per_s", "images_per_second", 2.0),
        ("val_accuracy/top 5", "val_accuracy_top_5", 2.0),
        ("steps", "logged_steps", 2.0),
        ("mine_total", "mine", 2.0),
    ],
)
def test_logged_number_of_any_name_is_exposed_in_base_units(
    tmp_path: Path, logged: str, name: str, value: float
) -> None:
    with joined(tmp_path) as logger:
        logger.log(1, {logged: 2})
        assert number(answers(logger._address()), name) == value


def test_skipped_steps_are_only_counted() -> None:
    assert exposed("skipped") is None
    assert BY_NAME["shardwright_skipped_steps_total"].kind == COUNTER


def test_rollback_keeps_the_port_and_the_target_file(tmp_path: Path) -> None:
    with joined(tmp_path) as logger:
        loggers = Loggers({"prometheus": logger}, print)
        loggers.event("start", START)
        before, address = answers(logger._address()), logger._address()
        loggers.rewind(3)
        assert logger._address() == address
        assert answers(address).keys() == before.keys()
        assert (tmp_path / "prometheus" / "targets.json").exists()


def test_scrape_never_waits_for_the_training_thread(tmp_path: Path) -> None:
    with joined(tmp_path) as logger:
        stop = threading.Event()

        def write() -> None:
            for step in range(1_000_000):
                if stop.is_set():
                    return
                logger.advance(step)
                logger.log(step, {f"mine_{step % 500}": step})

        thread = threading.Thread(target=write)
        thread.start()
        try:
            for _ in range(20):
                assert number(answers(logger._address()), "step") >= 0
        finally:
            stop.set()
            thread.join()


# The target file.


def test_target_file_stays_after_a_run_that_failed(tmp_path: Path) -> None:
    with joined(tmp_path, ends=False) as logger:
        logger.event("start", START)
        logger.event("end", {"outcome": "failed"})
    assert (tmp_path / "prometheus" / "targets.json").exists()


def test_target_file_goes_with_a_run_that_never_began(tmp_path: Path) -> None:
    with joined(tmp_path, ends=False):
        assert addresses(tmp_path / "prometheus" / "targets.json") == ["127.0.0.1:9400", "127.0.0.1:9401"]
    assert not (tmp_path / "prometheus" / "targets.json").exists()


def test_target_file_in_a_folder_of_many_runs_has_the_run_s_name(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    with joined(tmp_path / "first", targets=str(tmp_path / "all")) as logger:
        assert [path.name for path in (tmp_path / "all").iterdir()] == ["first.json"]
        assert logger.address().endswith(f"and 1 more, listed in {tmp_path / 'all' / 'first.json'}")


def test_target_file_that_cant_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prometheus").touch()
    logger = PrometheusLogger(port=0)
    with pytest.raises(ConfigError, match=r"targets\.json can't be written: .*\(logger\.prometheus\.targets\)"):
        logger.join(world(), tmp_path)
    logger.close()


@pytest.mark.parametrize(
    ("host", "rank", "files"),
    [
        ("127.0.0.1", 0, {"targets-a.json": ["127.0.0.1:9400", "127.0.0.1:9401"]}),
        ("127.0.0.1", 1, {}),
        ("127.0.0.1", 2, {"targets-b.json": ["127.0.0.1:9402"]}),
        ("0.0.0.0", 0, {"targets.json": ["127.0.0.1:9400", "127.0.0.1:9401", "127.0.0.1:9402"]}),
        ("0.0.0.0", 2, {}),
    ],
)
def test_target_file_of_several_machines_lists_what_can_be_reached(
    tmp_path: Path, host: str, rank: int, files: dict[str, list[str]]
) -> None:
    logger = PrometheusLogger(port=0, host=host)
    logger.join(world(rank, ("a", "a", "b")), tmp_path)
    found = {path.name: addresses(path) for path in (tmp_path / "prometheus").rglob("*")}
    logger.close()
    assert found == files


def test_address_of_all_interfaces_is_the_machine_s_name(tmp_path: Path) -> None:
    with joined(tmp_path, host="0.0.0.0") as logger:
        assert logger._address().rpartition(":")[0] == socket.gethostname()
    with joined(tmp_path, host="::1") as logger:
        assert logger._address().startswith("[::1]:")
