"""`backend=efa` on machines made of stand-ins: refused where it can't be, and ready up to NCCL's own start."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from strategies import backends, ec2, efa
from strategies.backends import Backend, GlooBackend, NeuronBackend, connect_ranks
from strategies.efa import EFABackend
from strategies.errors import ConfigError, TrainingError
from strategies.single import SingleStrategy
from strategies.testing import Workers
from strategies.world import Launch
from tests.starts import start
from tests.strategies.efa_standins import StandIn
from tests.trainer.jobs import ROWS

NOWHERE = StandIn(devices=(), libfabric="1.17.0")
WITHOUT_PLUGIN = StandIn(plugin=None)


class OverGloo(EFABackend):
    """As far as NCCL's start, which needs GPUs."""

    def torch_name(self) -> str:
        return "gloo"


def refused(machines: list[StandIn], gpus: int = 8) -> tuple[str, bool]:
    """What each rank is told on these machines, and whether it has a process group then."""
    machine = machines[Launch.from_env().rank]
    folder = tempfile.TemporaryDirectory()
    seen = mock.patch.object(torch.cuda, "device_count", return_value=gpus)
    with folder, seen, mock.patch.object(ec2, "INSTALLED", Path(folder.name) / "amazon"):
        os.environ.update(machine.build(Path(folder.name)))
        try:
            connect_ranks(EFABackend(timeout_s=30))
        except ConfigError as error:
            return str(error), dist.is_initialized()
    raise AssertionError("it connected")


def connected(machines: list[StandIn], backend: Backend, given: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """The environment that each rank's process group is started in, and what rank 0 says."""
    rank = Launch.from_env().rank
    seen: dict[str, str] = {}

    def start_group(*arguments: object, **more: object) -> None:
        seen.update(os.environ)
        begin(*arguments, **more)  # type: ignore[arg-type]

    begin = dist.init_process_group
    host = mock.patch.object(backends.platform, "node", return_value=f"host-{rank}")
    gpu = mock.patch.object(efa, "gpu_of", return_value=torch.device("cpu"))
    folder = tempfile.TemporaryDirectory()
    with folder, host, gpu, mock.patch.object(ec2, "INSTALLED", Path(folder.name) / "amazon"):
        os.environ.update({**machines[rank].build(Path(folder.name)), **given})
        with mock.patch.object(dist, "init_process_group", start_group):
            world = connect_ranks(backend)
    backends.disconnect_ranks()
    return seen, list(world.notes)


def test_efa_on_a_machine_without_it_is_refused_before_any_process_group(workers: Workers) -> None:
    for message, initialized in workers.run(refused, 2, [NOWHERE, NOWHERE]):
        assert message.startswith("EFABackend: fi_info -p efa finds no EFA device (exit code 61, libfabric 1.17.0). ")
        assert message.endswith("or allow TCP (backend.allow_tcp=true).")
        assert "\n" not in message
        assert not initialized


@pytest.mark.parametrize(
    ("machines", "expected"),
    [
        ([StandIn(), NOWHERE], "finds no EFA device"),
        ([WITHOUT_PLUGIN, StandIn()], "NCCL's plugin for libfabric can't be loaded: libnccl-net.so: cannot open"),
        ([StandIn(), StandIn(libfabric=None)], "fi_info is neither in"),
    ],
)
def test_efa_on_one_machine_without_it_is_refused_on_all(
    workers: Workers, machines: list[StandIn], expected: str
) -> None:
    answers = workers.run(refused, 2, machines)
    assert answers[0] == answers[1]
    assert expected in answers[0][0]
    assert not answers[0][1]


def test_efa_without_gpus_is_refused(workers: Workers) -> None:
    for message, initialized in workers.run(refused, 2, [StandIn(), StandIn()], 0):
        assert "2 processes on this machine, but 0 CUDA devices" in message
        assert not initialized


def test_run_over_efa_without_it_exits_2_on_every_rank(workers: Workers, tmp_path: Path) -> None:
    if Path("/dev/infiniband").exists():
        pytest.skip("this machine has such devices")
    (tmp_path / "bin").mkdir()
    environment = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", **NOWHERE.build(tmp_path / "no")}
    words = [*ROWS, "backend=efa", f"run.dir={tmp_path / 'run'}"]
    answers = workers.run(start, 2, words, (), "Rows", environment=environment)
    assert [found.code for found in answers] == [2, 2]
    said = "".join(found.err for found in answers)
    assert said.startswith("ConfigError: EFABackend: fi_info -p efa finds no EFA device (exit code 61")
    assert said.count("\n") == 1
    assert not list((tmp_path / "run").rglob("metrics.jsonl"))


def test_group_over_efa_starts_in_the_environment_that_the_table_gives(workers: Workers) -> None:
    given = {"RDMAV_FORK_SAFE": "1", "NCCL_PROTO": "simple"}
    backend = OverGloo(env={"NCCL_DEBUG": "INFO"})
    for seen, _ in workers.run(connected, 2, [StandIn(), StandIn()], backend, given):
        assert seen["NCCL_NET"] == "AWS Libfabric"
        assert (seen["FI_EFA_USE_HUGE_PAGE"], seen["NCCL_DEBUG"]) == ("0", "INFO")
        assert not {"RDMAV_FORK_SAFE", "NCCL_PROTO", "FI_PROVIDER", "FI_EFA_USE_DEVICE_RDMA"} & set(seen)


def test_group_over_efa_in_nvidias_container_names_the_plugin(workers: Workers) -> None:
    ((seen, said),) = workers.run(connected, 1, [StandIn(file="libnccl-net-ofi.so")], OverGloo(), {})
    assert seen["NCCL_NET_PLUGIN"] == "ofi"
    assert any("NCCL_NET_PLUGIN=ofi is set" in line for line in said)


def test_rank_0_says_what_was_done_and_where_machines_differ(workers: Workers) -> None:
    other = StandIn(plugin="1.6.0", libfabric="1.17.1")
    first, second = (said for _, said in workers.run(connected, 2, [StandIn(), other], OverGloo(), {}))
    assert second == []
    assert first[0].startswith("EFA: 2 devices on p5.48xlarge, libfabric 2.6.0amzn1.0, aws-ofi-nccl 1.21.1 (")
    assert any(line.startswith("EFA: NCCL_NET=AWS Libfabric is set: NCCL refuses to start") for line in first)
    assert any(line.startswith("host-1: EFA: FI_EFA_USE_DEVICE_RDMA=1 is set") for line in first)
    assert sum("FI_EFA_USE_HUGE_PAGE" in line for line in first) == 1


def test_tcp_where_allowed_is_for_all_ranks_and_said(workers: Workers) -> None:
    answers = workers.run(connected, 2, [StandIn(), NOWHERE], OverGloo(allow_tcp=True), {})
    assert [seen["NCCL_NET"] for seen, _ in answers] == ["Socket", "Socket"]
    assert any("EFA: rank 1 has none; all ranks go over TCP" in line for line in answers[0][1])
    assert any(line.startswith("host-1: EFA: rank 1 has none: fi_info -p efa finds") for line in answers[0][1])


def test_tcp_where_allowed_isnt_taken_where_all_have_efa(workers: Workers) -> None:
    for seen, _ in workers.run(connected, 2, [StandIn(), StandIn()], OverGloo(allow_tcp=True), {}):
        assert "NCCL_NET" not in seen
        assert seen["FI_EFA_USE_HUGE_PAGE"] == "0"


def test_interface_gives_way_to_the_configuration_and_is_said(workers: Workers) -> None:
    given = {"NCCL_SOCKET_IFNAME": "^docker,lo"}
    seen, said = workers.run(connected, 1, [StandIn()], GlooBackend(interface="lo"), given)[0]
    assert (seen["NCCL_SOCKET_IFNAME"], seen["GLOO_SOCKET_IFNAME"]) == ("=lo", "lo")
    assert said == ["NCCL_SOCKET_IFNAME=^docker,lo gives way to =lo (backend.interface)"]


def test_efa_is_nccl_with_a_gpu_for_each_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    StandIn().install(tmp_path, monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    backend = EFABackend()
    assert backend.torch_name() == "nccl"
    assert backend.device(Launch(rank=3, local_rank=3, size=8, local_size=8)) == torch.device("cuda", 3)
    assert "NCCL_NET" not in os.environ  # nothing is changed before every rank has agreed
    assert backend.settle(lambda text: [text])[0].startswith("EFA: 2 devices on p5.48xlarge")
    assert os.environ["NCCL_NET"] == "AWS Libfabric"
    monkeypatch.delenv("NCCL_NET")


def unable_to_start() -> str:
    said = (
        "NCCL error in: ProcessGroupNCCL.cpp:94, invalid usage\nncclInvalidUsage: This usually reflects invalid usage."
    )
    error = dist.DistBackendError(f"{said}\nLast error:\nFailed to initialize any NET plugin")
    with mock.patch.object(dist, "init_process_group", side_effect=error):
        try:
            connect_ranks(GlooBackend())
        except TrainingError as caught:
            return str(caught)
    raise AssertionError("it started")


def test_group_that_nccl_refuses_to_start_ends_in_one_line(workers: Workers) -> None:
    expected = "GlooBackend: gloo does not start: Failed to initialize any NET plugin. Start again with NCCL_DEBUG=INFO"
    assert workers.run(unable_to_start, 1)[0].startswith(expected)


def test_efa_alone_is_refused_where_it_isnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    NOWHERE.install(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match="finds no EFA device"):
        SingleStrategy().connect(EFABackend())


@pytest.mark.parametrize("env", [{"NO-NAME": "1"}, {"A": "\0"}, {"": "x"}])
def test_efa_with_odd_variables_is_refused(env: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"is no name of a variable.*\(backend.env\)\.$"):
        EFABackend(env=env)


def test_efa_with_a_variable_of_the_loader_is_refused() -> None:
    with pytest.raises(ConfigError, match="LD_LIBRARY_PATH in env comes too late"):
        EFABackend(env={"LD_LIBRARY_PATH": "/opt/x"})


def test_neuron_is_refused_with_what_to_use() -> None:
    assert NeuronBackend().torch_name() == "neuron"
    with pytest.raises(ConfigError, match=r"^NeuronBackend: .*backend=efa or backend=nccl.*\(backend\)\.$"):
        NeuronBackend().device(Launch())


# NCCL itself, where there is a GPU: that it refuses is what all of the above rests on.

ONE_RANK = """
import torch, torch.distributed as dist
dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
dist.all_reduce(torch.ones(1, device="cuda"))
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "starts"), [(None, True), ("Socket", True), ("AWS Libfabric", False)])
def test_nccl_told_of_a_network_that_isnt_there_refuses_to_start(name: str | None, starts: bool) -> None:
    if ec2.look().plugin_path is not None:
        pytest.skip("this machine has the plugin")
    environment = {key: value for key, value in os.environ.items() if key != "NCCL_NET"}
    environment |= {"NCCL_DEBUG": "WARN"} | ({} if name is None else {"NCCL_NET": name})
    done = subprocess.run(
        [sys.executable, "-c", ONE_RANK], env=environment, capture_output=True, text=True, check=False, timeout=150
    )
    assert (done.returncode == 0) is starts, done.stderr
    if not starts:
        assert "any NET plugin" in done.stdout + done.stderr or "not found" in done.stdout + done.stderr
