"""Launch variables, the store, and the small messages between ranks."""

from __future__ import annotations

import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from strategies.backends import GlooBackend, connect_ranks
from strategies.errors import ConfigError
from strategies.testing import Workers
from strategies.world import Launch, World, agree, open_store, publish


def alone() -> World:
    return World(device=torch.device("cpu"), store=dist.HashStore())


def connected() -> World:
    return connect_ranks(GlooBackend(timeout_s=60.0))


# What the workers run.


def reduce_numbers() -> list[object]:
    world = connected()
    later = world.reduce_later([float(world.rank)], "max")
    now = world.reduce([1.0, 2.0**53 - 8 + world.rank * 0.0])
    return [later(), now, world.reduce([float(world.rank), -1.0], "min"), world.reduce([])]


def reduce_with_followers() -> list[float]:
    import dataclasses

    world = connected()
    world = dataclasses.replace(world, data_leader=world.rank % 2 == 0)
    return [*world.reduce([1.0 + world.rank], votes=[1.0]), *world.reduce([float(world.rank)], "max")]


def gather_and_broadcast() -> tuple[list[object], object, object]:
    world = connected()
    value = {"rank": world.rank, "text": "ü" * 1000 * world.rank}
    gathered = world.gather(value)
    return gathered, world.broadcast([world.rank, "x"]), world.broadcast({"from": world.rank}, source=world.size - 1)


def fail_together(lame: int, kind: str) -> tuple[str, str]:
    world = connected()
    errors = {"ConfigError": ConfigError, "OSError": OSError}
    try:
        with world.together():
            if world.rank == lame:
                raise errors[kind]("disk is full")
    except Exception as error:
        world.barrier()  # still in step
        return type(error).__name__, str(error)
    return "", ""


def first_on_each_machine(folder: str, fail: bool) -> tuple[int, str]:
    world = connected()
    mine = Path(folder, f"node-{world.rank - world.local_rank}")

    def work() -> None:
        if fail:
            raise ConfigError("no such file")
        mine.write_text(mine.read_text() + "x" if mine.exists() else "x")

    try:
        world.first("cache", work)
    except ConfigError as error:
        world.barrier()
        return -1, str(error)
    return len(mine.read_text()), ""


def agree_on(lame: list[int]) -> str:
    launch = Launch.from_env()
    error = ConfigError(f"rank {launch.rank} can't") if launch.rank in lame else None
    try:
        agree(open_store(launch), launch, "start", error)
    except ConfigError as heard:
        return str(heard)
    return "agreed"


def publish_value(kind: str) -> str:
    launch = Launch.from_env()

    def make() -> str:
        assert launch.rank == 0, "only rank 0 decides"
        if kind == "config":
            raise ConfigError("no folder")
        if kind == "other":
            raise OSError("disk is full")
        return "runs/one"

    try:
        return publish(open_store(launch), launch, "folder", make)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def refuse_as_store_holder(key: str) -> str:
    """Rank 0 holds the store and goes as soon as it may; the others must still have heard."""
    launch = Launch.from_env()
    store = open_store(launch)
    if launch.rank != 0:
        time.sleep(0.3)
    try:
        agree(store, launch, key, ConfigError("wrong") if launch.rank == 0 else None)
    except ConfigError as error:
        if launch.rank == 0:
            del store
            open_store.cache_clear()
        return str(error)
    return ""


def restarted_key() -> list[bool]:
    """A restarted worker doesn't read what its predecessor wrote."""
    import dataclasses

    launch = Launch.from_env()
    open_store(launch).set("answer", "old")
    again = open_store(dataclasses.replace(launch, restart=1))
    return [open_store(launch).check(["answer"]), again.check(["answer"])]


_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def started_by(launcher: dict[str, str]) -> list[object]:
    """Meet as ranks of another launcher; `launcher`: its variables, with `{RANK}` where torchrun's value goes."""
    mine = {name: value.format_map(os.environ) for name, value in launcher.items()}
    for name in (*_TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE"):
        os.environ.pop(name, None)
    os.environ.update(mine)
    launch = Launch.from_env()
    if launch.rank == 0:
        time.sleep(0.3)  # the others are there first
    heard = publish(open_store(launch), launch, "word", lambda: "hello")
    if launch.rank != 0:
        open_store(launch).set(f"bye/{launch.rank}", "")
    else:  # which holds the store
        open_store(launch).wait([f"bye/{rank}" for rank in range(1, launch.size)])
    return [heard, launch.rank, launch.size, launch.local_size, launch.by_mpi]


# Alone.


def test_world_alone_reduces_to_itself() -> None:
    world = alone()
    assert world.reduce([1.0, 2.5]) == [1.0, 2.5]
    assert world.reduce([3.0], "max") == [3.0]
    assert world.reduce_later([4.0])() == [4.0]


def test_world_alone_gathers_json() -> None:
    world = alone()
    assert world.gather({"a": (1, 2)}) == [{"a": [1, 2]}]
    assert world.broadcast("x") == "x"
    world.barrier()


def test_together_alone_keeps_the_error() -> None:
    with pytest.raises(OSError, match="full"), alone().together():
        raise OSError("disk is full")
    with pytest.raises(ConfigError, match="wrong"), alone().together():
        raise ConfigError("wrong")


def test_first_alone_raises_its_error() -> None:
    with pytest.raises(OSError, match="full"):
        alone().first("key", lambda: (_ for _ in ()).throw(OSError("disk is full")))


# Together.


def test_reduce_over_ranks_is_exact_and_equal(workers: Workers) -> None:
    for later, now, least, nothing in workers.run(reduce_numbers, 3):
        assert later == [2.0]
        assert now == [3.0, 3 * (2.0**53 - 8)]
        assert least == [0.0, -1.0]
        assert nothing == []


def test_reduce_counts_each_replica_once(workers: Workers) -> None:
    assert workers.run(reduce_with_followers, 4) == [[1.0 + 3.0, 4.0, 3.0]] * 4


def test_gather_of_unequal_lengths_keeps_rank_order(workers: Workers) -> None:
    for gathered, first, last in workers.run(gather_and_broadcast, 3):
        assert gathered == [{"rank": rank, "text": "ü" * 1000 * rank} for rank in range(3)]
        assert first == [0, "x"]
        assert last == {"from": 2}


def test_error_on_one_rank_reaches_all_together(workers: Workers) -> None:
    assert workers.run(fail_together, 3, 1, "ConfigError") == [("ConfigError", "disk is full")] * 3
    others = ("RuntimeError", "rank 1: OSError: disk is full")
    assert workers.run(fail_together, 3, 1, "OSError") == [others, ("OSError", "disk is full"), others]
    assert workers.run(fail_together, 2, -1, "OSError") == [("", "")] * 2


def test_first_runs_once_on_each_machine(workers: Workers, tmp_path: Path) -> None:
    assert workers.run(first_on_each_machine, 4, str(tmp_path), False, local_size=2) == [(1, "")] * 4
    assert sorted(each.name for each in tmp_path.iterdir()) == ["node-0", "node-2"]


def test_first_that_fails_fails_on_all_ranks(workers: Workers, tmp_path: Path) -> None:
    answers = workers.run(first_on_each_machine, 4, str(tmp_path), True, local_size=2)
    assert answers == [(-1, "no such file")] * 4


def test_agree_raises_the_lowest_ranks_error_everywhere(workers: Workers) -> None:
    assert workers.run(agree_on, 3, []) == ["agreed"] * 3
    assert workers.run(agree_on, 3, [2, 1]) == ["rank 1 can't"] * 3


def test_publish_gives_rank_zeros_value_or_error_to_all(workers: Workers) -> None:
    assert workers.run(publish_value, 3, "fine") == ["runs/one"] * 3
    assert workers.run(publish_value, 3, "config") == ["ConfigError: no folder"] * 3
    answers = workers.run(publish_value, 3, "other")
    assert answers == ["OSError: disk is full", *["RuntimeError: disk is full"] * 2]


def test_refusal_is_heard_before_the_store_goes(workers: Workers) -> None:
    with dist_port() as port:
        environment = {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
    assert workers.run(refuse_as_store_holder, 3, "start", environment=environment) == ["wrong"] * 3


def test_store_of_a_restart_is_empty(workers: Workers) -> None:
    assert workers.run(restarted_key, 2) == [[True, False]] * 2


class dist_port:  # noqa: N801 - reads as a function
    """A port that was free a moment ago."""

    def __enter__(self) -> int:
        import socket

        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        return int(self.socket.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self.socket.close()


# Other launchers.

OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": f"{{{ours}}}" for name, ours in
            zip(("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"), _TORCHRUN, strict=False)}  # fmt: skip
HOROVODRUN = {name.replace("OMPI_COMM_WORLD", "HOROVOD"): value for name, value in OPEN_MPI.items()}


class Notes(BaseHTTPRequestHandler):
    """Keeps what is put, as the server of horovodrun does."""

    kept: dict[str, bytes] = {}  # noqa: RUF012

    def do_PUT(self) -> None:
        """Keep it."""
        self.kept[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, b"")

    def do_GET(self) -> None:
        """Give it back."""
        self._answer(200 if self.path in self.kept else 404, self.kept.get(self.path, b""))

    def _answer(self, code: int, content: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *words: object) -> None:  # noqa: A002
        """Nothing."""


def test_ranks_of_mpirun_meet_in_its_folder(workers: Workers, tmp_path: Path) -> None:
    answers = workers.run(started_by, 3, {**OPEN_MPI, "PMIX_SERVER_TMPDIR": str(tmp_path)})
    assert answers == [["hello", rank, 3, 3, True] for rank in range(3)]


def test_ranks_of_horovodrun_meet_at_its_server(workers: Workers) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Notes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = {"ADDR": "127.0.0.1", "PORT": str(server.server_address[1])}
        variables = {f"HOROVOD_GLOO_RENDEZVOUS_{name}": value for name, value in place.items()}
        answers = workers.run(started_by, 3, {**HOROVODRUN, **variables})
        server.shutdown()
    assert answers == [["hello", rank, 3, 3, False] for rank in range(3)]


@pytest.mark.parametrize("local_size", [1, 2])
def test_ranks_that_nobody_brings_together_are_refused(workers: Workers, local_size: int) -> None:
    outcomes = workers.outcomes(started_by, 2, OPEN_MPI, local_size=local_size)
    assert {outcome.error for outcome in outcomes} == {"ConfigError"}
    assert all("-x MASTER_ADDR=" in outcome.message and "\n" not in outcome.message for outcome in outcomes)


# Launch variables.


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*_TORCHRUN, "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_launch_without_variables_is_alone(bare_environment: pytest.MonkeyPatch) -> None:
    assert Launch.from_env() == Launch()


def test_launch_reads_every_variable(bare_environment: pytest.MonkeyPatch) -> None:
    values = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    for name, value in {**values, "TORCHELASTIC_RESTART_COUNT": "2"}.items():
        bare_environment.setenv(name, value)
    assert Launch.from_env() == Launch(rank=5, size=8, local_rank=1, local_size=4, restart=2)


def test_launch_without_local_variables_is_one_machine(bare_environment: pytest.MonkeyPatch) -> None:
    bare_environment.setenv("RANK", "1")
    bare_environment.setenv("WORLD_SIZE", "2")
    assert Launch.from_env() == Launch(rank=1, size=2, local_rank=1, local_size=2)


def test_launch_reads_horovodrun_and_mpirun_and_torchrun_before_them(bare_environment: pytest.MonkeyPatch) -> None:
    numbers = {"RANK": "3", "SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
    for prefix, by_mpi in (("OMPI_COMM_WORLD_", True), ("HOROVOD_", False)):
        for name, value in numbers.items():
            bare_environment.setenv(f"{prefix}{name}", value)
        launch = Launch.from_env()
        assert (launch, launch.by_mpi) == (Launch(rank=3, size=4, local_rank=1, local_size=2), by_mpi)
        assert not launch.on_one_machine
    bare_environment.setenv("RANK", "0")
    bare_environment.setenv("WORLD_SIZE", "1")
    bare_environment.setenv("TORCHELASTIC_RUN_ID", "none")
    assert Launch.from_env() == Launch()


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"RANK": "0"}, "WORLD_SIZE=None"),
        ({"WORLD_SIZE": "2"}, "RANK=None"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one' is not a number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' is not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": ""}, "LOCAL_RANK='' is not a number"),
    ],
    ids=json.dumps,
)
def test_launch_with_bad_variables_is_refused(
    bare_environment: pytest.MonkeyPatch, values: dict[str, str], complaint: str
) -> None:
    for name, value in values.items():
        bare_environment.setenv(name, value)
    with pytest.raises(ConfigError, match=complaint) as caught:
        Launch.from_env()
    assert "\n" not in str(caught.value)
