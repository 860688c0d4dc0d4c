"""Files of `accelerate config` under our loop: what is honoured, what is refused, and what is put back."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import yaml

from strategies._accelerate_config import AccelerateConfig
from strategies._testing_jobs import Rig
from strategies.accelerate import AccelerateStrategy
from strategies.backends import GlooBackend
from strategies.base import Plan
from strategies.errors import ConfigError
from strategies.precision import Numbers, Precision
from strategies.testing import Job, Workers
from strategies.world import Launch
from tests.starts import Start, start
from tests.strategies import test_accelerate_contract as contracts
from tests.trainer.jobs import ROWS, losses

# As `accelerate config` asks and writes; only what differs between answers is changed below.
WRITTEN: dict[str, Any] = {
    "compute_environment": "LOCAL_MACHINE",
    "debug": False,
    "distributed_type": "MULTI_CPU",
    "downcast_bf16": "no",
    "enable_cpu_affinity": False,
    "machine_rank": 0,
    "main_process_ip": "10.0.0.1",
    "main_process_port": 29500,
    "main_training_function": "main",
    "mixed_precision": "no",
    "mpirun_config": {"mpirun_ccl": "1", "mpirun_hostfile": "/home/me/hostfile"},
    "num_machines": 1,
    "num_processes": 2,
    "rdzv_backend": "static",
    "same_network": True,
    "tpu_env": [],
    "tpu_use_cluster": False,
    "tpu_use_sudo": False,
    "use_cpu": True,
}
FSDP: dict[str, Any] = yaml.safe_load((contracts.FILES / "fsdp.yaml").read_text())


def written(folder: Path, base: dict[str, Any] = WRITTEN, **changes: Any) -> str:
    """The path of a file; None takes a key away."""
    values = {key: value for key, value in {**base, **changes}.items() if value is not None}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def fsdp(folder: Path, **changes: Any) -> str:
    return written(folder, FSDP, fsdp_config={**FSDP["fsdp_config"], **changes})


def refusal(read: Any, *arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(*arguments)
    said = str(caught.value)
    assert "\n" not in said
    assert said.endswith("(strategy.config_path).")
    return said


# Keys, one at a time.


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"distributed_type": "DEEPSPEED"}, "distributed_type: DEEPSPEED can't be honoured. Use strategy=zero1, zero2"),
        ({"distributed_type": "MEGATRON_LM"}, "type: MEGATRON_LM can't be honoured. Use strategy=fsdp_full"),
        ({"distributed_type": "XLA"}, "distributed_type: XLA can't be honoured. Accepted are NO, MULTI_CPU, MULTI_GPU"),
        ({"distributed_type": ["FSDP"]}, "distributed_type: ['FSDP'] can't be honoured"),
        ({"compute_environment": "AMAZON_SAGEMAKER"}, "compute_environment: AMAZON_SAGEMAKER"),
        ({"debug": True}, "debug: True"),
        ({"deepspeed_config": {"zero_stage": 2}}, "{'zero_stage': 2} can't be honoured. Use strategy=zero"),
        ({"downcast_bf16": "yes"}, "downcast_bf16: yes"),
        ({"dynamo_config": {"dynamo_backend": "EAGER"}}, "dynamo_config.dynamo_backend: EAGER"),
        ({"dynamo_config": {"dynamo_backend": "INDUCTOR", "dynamo_mode": "max-autotune"}}, "dynamo_mode: max-autotune"),
        ({"dynamo_config": {"dynamo": "INDUCTOR"}}, "dynamo_config.dynamo: INDUCTOR can't be honoured. There is no"),
        ({"dynamo_config": "INDUCTOR"}, "dynamo_config: INDUCTOR"),
        ({"enable_cpu_affinity": True}, "enable_cpu_affinity: True"),
        ({"fp8_config": {"backend": "TE"}}, "fp8_config"),
        ({"fsdp_config": {"fsdp_version": 2}}, "{'fsdp_version': 2} can't be honoured. It means nothing with"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps: 4 can't be honoured. There is no such key"),
        ({"megatron_lm_config": {"megatron_lm_tp_degree": 2}}, "megatron_lm_config"),
        ({"mixed_precision": "fp8"}, "mixed_precision: fp8 can't be honoured. Accepted are no, bf16, fp16"),
        ({"mixed_precison": "bf16"}, "mixed_precison: bf16 can't be honoured. There is no such key. Nearest: mixed"),
        ({"num_processes": "two"}, "num_processes: two"),
        ({"parallelism_config": {"parallelism_config_tp_size": 2}}, "parallelism_config"),
        ({"tpu_name": "mine"}, "tpu_name: mine"),
        ({"use_cpu": "maybe"}, "use_cpu: maybe"),
    ],
)  # fmt: skip
def test_key_that_isnt_supported_is_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    assert says in refusal(AccelerateConfig.read, written(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"fsdp_version": 1}, "fsdp_config.fsdp_version: 1 can't be honoured. It must be 2; `accelerate to-fsdp2`"),
        ({"fsdp_activation_checkpointing": True}, "Use trainer.activation_checkpointing=full"),
        ({"fsdp_auto_wrap_policy": "MINE"}, "fsdp_config.fsdp_auto_wrap_policy: MINE"),
        ({"fsdp_backward_prefetch": "BACKWARD_PRE"}, "fsdp_config.fsdp_backward_prefetch: BACKWARD_PRE"),
        ({"fsdp_min_num_params": 1000}, "fsdp_config.fsdp_min_num_params: 1000 can't be honoured. It means nothing"),
        ({"fsdp_offload_params": True}, "strategy.cpu_offload=true"),
        ({"fsdp_reshard_after_forward": "FULL_SHARD"}, "fsdp_reshard_after_forward: FULL_SHARD"),
        ({"fsdp_sharding_strategy": "FULL_SHARD"}, "`accelerate to-fsdp2` translates it"),
        ({"fsdp_sharding": 1}, "fsdp_config.fsdp_sharding: 1 can't be honoured. There is no such key"),
    ],
)
def test_key_of_fsdp_that_isnt_supported_is_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    assert says in refusal(AccelerateConfig.read, fsdp(tmp_path, **changes))


@pytest.mark.parametrize("text", [None, "distributed_type: [", "- a list", "num_processes: 2", "\x00"])
def test_what_is_no_such_file_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    assert str(path) in refusal(AccelerateConfig.read, str(path))


def test_files_are_read_as_they_are_written(tmp_path: Path) -> None:
    config = AccelerateConfig.read(written(tmp_path))
    assert config.distributed_type == "MULTI_CPU"
    assert config.without_say == ["machine_rank", "main_process_ip", "main_process_port", "main_training_function",
                                  "mpirun_config", "rdzv_backend", "same_network"]  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text('{"distributed_type": "NO", "mixed_precision": "bf16"}')
    assert AccelerateConfig.read(str(path)).values == {"distributed_type": "NO", "mixed_precision": "bf16"}
    path.write_text("distributed_type: no\nmixed_precision: no")  # YAML's booleans
    assert AccelerateConfig.read(str(path)).values == {"distributed_type": "NO", "mixed_precision": "no"}
    assert AccelerateConfig.read(None).distributed_type is None


def test_fsdp_is_told_as_the_file_says(tmp_path: Path) -> None:
    found = AccelerateConfig.read(fsdp(tmp_path, fsdp_reshard_after_forward=False)).fsdp_arguments()
    assert found == {
        "fsdp_version": 2,
        "reshard_after_forward": False,
        "auto_wrap_policy": "transformer_based_wrap",
        "transformer_cls_names_to_wrap": ["LayerNorm"],
        "cpu_ram_efficient_loading": False,
    }


# What it has to agree with.


@pytest.mark.parametrize(
    ("changes", "plan", "says"),
    [
        ({"mixed_precision": "fp16"}, {"numbers": Numbers.bf16}, "mixed_precision: fp16 can't be honoured. This run"),
        ({"mixed_precision": "no"}, {"numbers": Numbers.bf16}, "precision=bf16; use precision=fp32"),
        ({"mixed_precision": "bf16"}, {"numbers": Numbers.fp32}, "precision=fp32; use precision=bf16"),
        ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, {}, "dynamo_backend: INDUCTOR can't be honoured. This"),
        ({"dynamo_config": {"dynamo_backend": "NO"}}, {"compile": True}, "dynamo_config.dynamo_backend: NO"),
        ({"mixed_precision": "no"}, {"numbers": Numbers.tf32}, None),
        ({"mixed_precision": "no"}, {"numbers": Numbers.fp64}, None),
        ({"mixed_precision": "bf16"}, {"numbers": Numbers.bf16}, None),
        ({"mixed_precision": None}, {"numbers": Numbers.bf16}, None),
        ({"dynamo_config": {"dynamo_backend": "INDUCTOR", "dynamo_mode": "default"}}, {"compile": True}, None),
    ],
)  # fmt: skip
def test_step_has_to_be_the_same(
    tmp_path: Path, changes: dict[str, Any], plan: dict[str, Any], says: str | None
) -> None:
    config = AccelerateConfig.read(written(tmp_path, **changes))
    precision = Precision(numbers=plan.get("numbers", Numbers.fp32))
    asked = Plan(micro_batch=1, precision=precision, compile=plan.get("compile", False))
    if says is None:
        config.refuse_plan(asked)
    else:
        assert says in refusal(config.refuse_plan, asked)


def test_fsdp_isnt_compiled(tmp_path: Path) -> None:
    assert "strategy=fsdp_full" in refusal(
        AccelerateConfig.read(fsdp(tmp_path)).refuse_plan, Plan(micro_batch=1, compile=True)
    )


def test_launch_has_to_be_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    launch = Launch(size=4, local_size=2)
    for changes, says in (
        ({"num_processes": 2}, "num_processes: 2 can't be honoured. This run has 4"),
        ({"num_processes": 4}, "num_machines: 1 can't be honoured. This run has 2"),
        ({"num_processes": 4, "num_machines": 2, "gpu_ids": "0,2"}, "gpu_ids: 0,2 can't be honoured"),
        ({"num_processes": -1, "num_machines": None, "distributed_type": "NO"}, "which would train apart"),
    ):
        assert says in refusal(AccelerateConfig.read(written(tmp_path, **changes)).refuse_launch, launch)
    AccelerateConfig.read(
        written(tmp_path, num_processes=4, num_machines=2, gpu_ids="0, 1", main_process_port=1)
    ).refuse_launch(launch)
    refuse = AccelerateConfig.read(written(tmp_path)).refuse_device
    assert "use_cpu: True" in refusal(refuse, torch.device("cuda"))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ACCELERATE_USE_FSDP", "true", "distributed_type: MULTI_CPU, and `accelerate launch` was told FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "distributed_type: MULTI_CPU, and `accelerate launch` was told DEEPSPEED"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed_precision: no, and `accelerate launch` was told bf16"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "parallelism_config"),
        ("ACCELERATE_DEBUG_MODE", "1", "debug: False, and"),
    ],
)
def test_accelerate_launch_has_to_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    path = written(tmp_path)
    for always, nothing in (("ACCELERATE_MIXED_PRECISION", "no"), ("ACCELERATE_DYNAMO_BACKEND", "NO")):
        monkeypatch.setenv(always, nothing)
    AccelerateConfig.read(path)
    monkeypatch.setenv(name, value)
    assert says in refusal(AccelerateConfig.read, path)


def test_fsdp_of_accelerate_launch_alone_needs_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "Name it" in refusal(AccelerateConfig.read, None)


# On several ranks.


def connected(paths: list[str | None]) -> tuple[str, bool]:
    """What a rank hears that reads its own file, and whether communication is left."""
    strategy = AccelerateStrategy(config_path=paths[Launch.from_env().rank])
    try:
        strategy.connect(GlooBackend(timeout_s=30.0))
    except ConfigError as error:
        return str(error), dist.is_initialized()
    made = strategy._accelerator.distributed_type.value
    strategy.close()
    return made, dist.is_initialized()


def left_behind() -> tuple[dict[str, str], bool, int]:
    from accelerate.state import AcceleratorState, PartialState

    os.environ.pop("OMP_NUM_THREADS", None)
    torch.set_num_threads(2)
    before = dict(os.environ)
    strategy = AccelerateStrategy()
    strategy.connect(GlooBackend())
    after = {name: value for name, value in os.environ.items() if before.get(name) != value and "SOCKET" not in name}
    strategy.close()
    return after, not AcceleratorState._shared_state and not PartialState._shared_state, torch.get_num_threads()


def hidden_on_the_last(words: list[str]) -> Start:
    """A start on machines of which the last lacks the library."""
    launch = Launch.from_env()
    with mock.patch.dict(sys.modules, {"accelerate": None} if launch.rank == launch.size - 1 else {}):
        return start(words, (), "Rows")


def sharded(job: Job) -> tuple[list[str], int]:
    rig = Rig(contracts.TestAccelerateFSDP, job)
    state = rig.strategy.state(rig.model, rig.optimizer)
    assert isinstance(rig.strategy, AccelerateStrategy)
    assert rig.strategy._shards is not None
    kinds = sorted({type(value).__name__ for name, value in state.weights.items() if name != "shift"})
    parts = len(rig.strategy._shards.parts)
    rig.strategy.close()
    return kinds, parts


def test_type_that_accelerate_would_silently_change_is_refused_everywhere(workers: Workers, tmp_path: Path) -> None:
    for asked, write in (("FSDP", fsdp), ("MULTI_GPU", partial(written, distributed_type="MULTI_GPU"))):
        path = write(tmp_path)
        heard = workers.run(connected, 2, [path, path])
        said = f"distributed_type: {asked} on 2 processes with cpu becomes MULTI_CPU on 2"
        assert all(said in message and not left for message, left in heard), heard
        assert len({message for message, _ in heard}) == 1


def test_file_that_some_machine_lacks_or_has_otherwise_is_refused_everywhere(workers: Workers, tmp_path: Path) -> None:
    path = written(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    assert workers.run(connected, 2, [path, path]) == [("MULTI_CPU", False)] * 2
    for second, says in (
        (str(tmp_path / "missing.yaml"), "missing.yaml can't be read"),
        (written(other, mixed_precision="bf16"), "the same everywhere: mixed_precision: no for rank 0 and bf16"),
    ):
        heard = workers.run(connected, 2, [path, second])
        assert len(set(heard)) == 1
        assert says in heard[0][0], heard
        assert not heard[0][1]
    heard = workers.run(connected, 2, [written(other, main_process_port=1), path])
    assert heard == [("MULTI_CPU", False)] * 2


def test_one_process_is_taken_as_the_file_calls_it(workers: Workers, tmp_path: Path) -> None:
    for kind in ("NO", "MULTI_CPU"):
        path = written(tmp_path, distributed_type=kind, num_processes=1)
        assert workers.run(connected, 1, [path]) == [(kind, False)]
    assert workers.run(connected, 1, [None]) == [("NO", False)]


def test_nothing_of_accelerate_is_left_in_the_process(workers: Workers) -> None:
    assert workers.run(left_behind, 2) == [({}, True, 2)] * 2


def test_fsdp_cuts_the_model_as_the_file_says(workers: Workers) -> None:
    assert workers.run(sharded, 2, Job()) == [(["DTensor"], 2)] * 2


def test_a_run_with_a_file_equals_ddp(workers: Workers, tmp_path: Path) -> None:
    words = [*ROWS, "backend=gloo"]
    chosen = {
        "ddp": ["strategy=ddp"],
        "accelerate": ["strategy=accelerate", f"strategy.config_path={written(tmp_path)}"],
    }
    for name, more in chosen.items():
        for found in workers.run(start, 2, [*words, *more, f"run.dir={tmp_path / name}"], (), "Rows"):
            assert found.code == 0, found.err
    assert losses(tmp_path / "accelerate") == losses(tmp_path / "ddp")
    assert "main_process_port" in (tmp_path / "accelerate" / "logs" / "rank-0.log").read_text()


def test_without_the_library_one_line_says_how_to_install_it(workers: Workers, tmp_path: Path) -> None:
    words = [*ROWS, "backend=gloo", "strategy=accelerate", f"run.dir={tmp_path / 'run'}"]
    first, second = workers.run(hidden_on_the_last, 2, words)
    assert (first.code, second.code) == (2, 2)
    assert second.err == ""
    assert len(first.err.splitlines()) == 1
    assert "pip install accelerate" in first.err


def test_file_is_refused_by_a_start_in_one_line(workers: Workers, tmp_path: Path) -> None:
    path = written(tmp_path, mixed_precision="bf16")
    words = [
        *ROWS,
        "backend=gloo",
        "strategy=accelerate",
        f"strategy.config_path={path}",
        f"run.dir={tmp_path / 'run'}",
    ]
    first, second = workers.run(start, 2, words, (), "Rows")
    assert (first.code, second.code, second.err) == (2, 2, "")
    assert len(first.err.splitlines()) == 1
    assert "mixed_precision: bf16 can't be honoured" in first.err


def test_footprint_follows_the_file(tmp_path: Path) -> None:
    from strategies.base import ModelSpec, WorldSpec

    model, world, plan = (
        ModelSpec(num_parameters=1000, num_trainable=1000),
        WorldSpec(size=2, local_size=2),
        Plan(micro_batch=1),
    )
    whole = AccelerateStrategy().footprint(model, world, plan)
    cut = AccelerateStrategy(config_path=fsdp(tmp_path)).footprint(model, world, plan)
    assert (whole.weights_bytes, cut.weights_bytes) == (4000, 2000)
    assert {each.kind for each in cut.collectives if each.phase != "step"} == {"all_gather", "reduce_scatter"}
