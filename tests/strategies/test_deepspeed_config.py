"""Raw ds_config files: taken over as DeepSpeed's own parser has it, or refused in one line that names the key."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from strategies import _deepspeed_keys as keys
from strategies._deepspeed_config import Ours, check_optimizer, merged, read
from strategies._deepspeed_fields import on_nvme
from strategies._nvme import Place
from strategies.base import Plan
from strategies.errors import ConfigError
from strategies.precision import Numbers, Precision
from trainer.optim import AdafactorOptimizer, AdamWOptimizer, SGDOptimizer

FILES = Path(__file__).parent / "ds_configs"
SIZE = 4
FP16 = Precision(numbers=Numbers.fp16, loss_scale=2.0**12, growth_interval=400)
BF16 = Precision(numbers=Numbers.bf16)


@pytest.fixture(autouse=True)
def _as_with_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def ours(
    stage: int = 2,
    *,
    precision: Precision | None = None,
    clip_norm: float | None = 1.0,
    hidden_size: int | None = 32,
    own: Mapping[str, Any] | None = None,
    size: int = SIZE,
) -> Ours:
    plan = Plan(micro_batch=2, accumulation=3, clip_norm=clip_norm, precision=precision or Precision())
    return Ours(stage=stage, size=size, plan=plan, hidden_size=hidden_size, own=own or {})


def refusal(raw: Mapping[str, Any], mine: Ours | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        merged(raw, mine or ours())
    return one_line(caught.value)


def one_line(error: ConfigError) -> str:
    message = str(error)
    assert "\n" not in message
    assert message.startswith("ds_config: ")
    return message


# The ten files.


@dataclass(frozen=True)
class Case:
    """A run in which a file is taken over, what it makes of ZeRO, and runs in which it is refused."""

    fits: Ours | None
    zero: dict[str, Any] = field(default_factory=dict)
    refused: tuple[tuple[Ours, tuple[str, ...]], ...] = ()


CPU = {"device": "cpu", "pin_memory": True}
CASES = {
    "transformers_zero2": Case(
        ours(precision=BF16),
        {"reduce_bucket_size": 1024, "allgather_bucket_size": 30_000_000, "round_robin_gradients": True},
        (
            (ours(3), ("zero_optimization.stage=2", "strategy=zero2")),
            (
                ours(precision=FP16),
                (
                    "fp16.initial_scale_power=13, ours is 12 (log2 of precision.loss_scale)",
                    "fp16.loss_scale_window=700, ours is 400 (precision.growth_interval)",
                    "fp16.hysteresis=2, ours is 1",
                ),
            ),
        ),
    ),
    "transformers_zero3_offload": Case(
        ours(3),
        {
            "reduce_bucket_size": 1024,
            "stage3_prefetch_bucket_size": 921,
            "stage3_param_persistence_threshold": 320,
            "offload_param": CPU,
            "offload_optimizer": CPU,
        },
        ((ours(2), ("zero_optimization.stage=3", "strategy=zero3")),),
    ),
    "bf16": Case(
        ours(1, precision=BF16),
        {"reduce_bucket_size": 25_000_000},
        (
            (ours(1), ("bf16.enabled=true, ours is false (precision=fp32)",)),
            (
                ours(1, precision=BF16, clip_norm=None),
                ("gradient_clipping=1.0, ours is 0.0 (trainer.clip_norm=null)",),
            ),
        ),
    ),
    "fp16_loss_scale": Case(
        ours(precision=FP16),
        {"overlap_comm": False},
        (
            (ours(precision=BF16), ("fp16.enabled=true, ours is false (precision=bf16)",)),
            (ours(precision=FP16, size=2), ("train_batch_size=24, ours is 12 (trainer.global_batch)",)),
            (
                ours(precision=Precision(numbers=Numbers.fp16)),
                ("fp16.initial_scale_power=12, ours is 16 ", "fp16.loss_scale_window=400, ours is 2000"),
            ),
        ),
    ),
    "scheduler_inside": Case(
        None,
        refused=(
            (
                ours(),
                (
                    'scheduler.type="WarmupDecayLR"',
                    "use schedule=linear schedule.warmup=150 trainer.max_steps=3000 (schedule)",
                ),
            ),
        ),
    ),
    "accelerate_zero_stage": Case(
        ours(3, precision=BF16), {"offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"}}
    ),
    "tutorial_cpu_offload": Case(
        ours(clip_norm=0.5),
        {"offload_optimizer": {"device": "cpu"}, "overlap_comm": True},
        ((ours(), ("gradient_clipping=0.5, ours is 1.0 (trainer.clip_norm)",)),),
    ),
    "infinity_nvme": Case(
        ours(3),
        {"sub_group_size": 500_000_000, "stage3_prefetch_bucket_size": 20_000_000},
        ((ours(3, own={"offload_param": {"device": "cpu"}}), ("zero_optimization.offload_param.device", '"cpu"')),),
    ),
    "zeropp": Case(
        ours(3),
        {"zero_hpz_partition_size": 2, "zero_quantized_weights": True, "zero_quantized_gradients": True},
        ((ours(3, size=3), ("zero_hpz_partition_size=2 doesn't divide 3 ranks",)),),
    ),
    "old_keys": Case(
        ours(), {"offload_optimizer": CPU, "stage3_gather_16bit_weights_on_model_save": True, "stage": 2}
    ),
}  # fmt: skip


def file(name: str) -> dict[str, Any]:
    return read(None, str(FILES / f"{name}.json"))


def test_every_file_is_tried() -> None:
    assert {path.stem for path in FILES.iterdir()} == set(CASES)
    assert len(CASES) == 10


@pytest.mark.parametrize("name", CASES)
def test_file_is_taken_over_or_refused(name: str) -> None:
    raw, case = file(name), CASES[name]
    before = deepcopy(raw)
    if case.fits is not None:
        found = merged(raw, case.fits)
        assert found["zero_optimization"].items() >= {"stage": case.fits.stage, **case.zero}.items()
        assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (2, 3)
        assert (found["train_batch_size"], found["gradient_clipping"]) == (24, 0.0)
        assert not {"bf16", "fp16", "optimizer", "scheduler"} & set(found)
        assert '"auto"' not in json.dumps(found)
    for run, parts in case.refused:
        message = refusal(raw, run)
        assert all(part in message for part in parts), message
    assert raw == before


def test_file_without_its_scheduler_is_taken_over() -> None:
    raw = file("scheduler_inside")
    del raw["scheduler"]
    assert merged(raw, ours())["zero_optimization"]["reduce_bucket_size"] == 40_000_000


_PARSE = """
import json, sys
from deepspeed.runtime import config, zero
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
config.dist.get_rank, config.dist.get_world_size = lambda *_: 0, lambda *_: int(sys.argv[1])
failed, parsed = {}, {}
for name, given in json.load(sys.stdin).items():
    try:
        found = config.DeepSpeedConfig(given)
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {error}"
        continue
    parsed[name] = {
        "world": found.world_size, "batch": found.train_batch_size, "clip": found.gradient_clipping,
        "zero": found.zero_config.model_dump(mode="json", by_alias=True), "half": found.float16_config.enabled,
        "aio": found.aio_config, "communication": str(found.communication_data_type),
    }
fields = [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]
from deepspeed.runtime.zero import offload_config as offload
offloads = [sorted(each.model_fields) for each in (
    offload.DeepSpeedZeroOffloadOptimizerConfig, offload.DeepSpeedZeroOffloadParamConfig)]
print()
removed = [*config._REMOVED_TOP_LEVEL_CONFIG_KEYS]
removed += [f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS]
answer = {"failed": failed, "parsed": parsed, "fields": fields, "offloads": offloads, "removed": removed}
print(json.dumps(answer))
"""


def drawn(random: random.Random) -> dict[str, Any]:
    """A configuration from all keys that are handed on, with values that are mostly of their kind."""
    values = [True, False, 0, 1, 2, 7, 5e8, "3e4", 0.5, "auto", None, "cpu", "none", "fp32", "bfloat16", "x"]

    def of(table: keys.Table) -> dict[str, Any]:
        chosen = random.sample(sorted(table), random.randint(0, len(table)))
        return {key: random.choice(values) if callable(table[key]) else of(table[key]) for key in chosen}  # type: ignore[arg-type]

    while True:
        raw = of(keys.PASSED)
        raw.get("aio", {}).pop("use_gds", None)  # its parser looks for a device
        raw.setdefault("zero_optimization", {})["stage"] = random.choice([1, 2, 3])
        for _ in range(200):  # leave out what is refused, key by key
            try:
                return merged(raw, ours(raw["zero_optimization"]["stage"]))
            except ConfigError as error:
                path = str(error).removeprefix("ds_config: ").split("=")[0].split(";")[0]
                section, key = keys.at(raw, path)
                if key not in section:
                    break
                del section[key]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed isn't installed")
def test_deepspeed_parses_what_is_handed_on_and_has_no_key_that_we_miss() -> None:
    given = {name: merged(file(name), case.fits) for name, case in CASES.items() if case.fits is not None}
    generator = random.Random(0)
    given |= {f"drawn {index}": drawn(generator) for index in range(150)}
    done = subprocess.run(
        [sys.executable, "-c", _PARSE, str(SIZE)],
        input=json.dumps(given), capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["failed"] == {}
    parsed = answer["parsed"]
    assert len(parsed) == 159
    assert all(each["clip"] == 0.0 and each["batch"] == 24 and each["world"] == SIZE for each in parsed.values())
    assert not any(each["half"] for each in parsed.values())
    for name, case in CASES.items():
        if case.fits is not None:
            zero = parsed[name]["zero"]
            assert all(
                zero[key].items() >= value.items() if isinstance(value, dict) else zero[key] == value
                for key, value in case.zero.items()
            ), name
    assert parsed["infinity_nvme"]["aio"]["intra_op_parallelism"] == 2
    assert parsed["bf16"]["communication"] == "torch.float32"

    assert set(answer["removed"]) <= set(keys.REFUSED)
    elsewhere = {path.removeprefix("zero_optimization.") for path in (*keys.REFUSED, *keys.OLD_NAMES)}
    assert set(answer["fields"]) - elsewhere - set(keys.OLD_OFFLOADS) == set(keys.ZERO)
    for name, fields in zip(("offload_optimizer", "offload_param"), answer["offloads"], strict=True):
        known = {path.removeprefix(f"{name}.") for path in elsewhere} | set(keys.ZERO[name])  # type: ignore[arg-type]
        assert set(fields) <= known


# Reading.


def test_configuration_is_read_from_values_or_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"gradient_clipping": 1e-1, "aio": {"queue_depth": 3}}')
    values = {"gradient_clipping": 0.1, "aio": {"queue_depth": 3}}
    assert read(None, str(path)) == read(values, None) == values
    assert read(None, None) == read({}, None) == {}
    assert read({}, str(path)) == values
    assert read(values, None)["aio"] is not values["aio"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "isn't JSON"),
        ('{"aio": {', "line 1 column 10"),
        ("deepspeed_config:\n  zero_stage: 2\n", "isn't JSON"),
        ("[1, 2]", "no object in braces"),
        ('"auto"', "no object in braces"),
        ('{"aio": 1, "aio": 2}', "'aio' is there twice"),
        ('{"a":' * 100_000, "isn't JSON"),
        (b"\xff\xfe\x00", "isn't JSON"),
        (None, "can't be read: No such file"),
    ],
)
def test_unreadable_file_is_refused_by_name(tmp_path: Path, text: str | bytes | None, part: str) -> None:
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        read(None, str(path))
    message = one_line(caught.value)
    assert part in message
    assert str(path) in message
    assert message.endswith("(strategy.config_path).")


def test_file_and_values_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"given twice.*\(strategy.config, strategy.config_path\)"):
        read({"aio": {}}, "ds.json")


# Keys.


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        ({"zero_optimisation": {}}, ("'zero_optimisation'", "Nearest: zero_optimization")),
        ({"zero_optimization": {"overlap_com": True}}, ("'overlap_com' in zero_optimization", "Nearest: overlap_comm")),
        (
            {"zero_optimization": {"offload_param": {"pin_memry": True}}},
            ("'pin_memry' in zero_optimization.offload_param", "pin_memory"),
        ),
        ({"zero_optimization": {"prefetch_bucket_size": 5}}, ("Nearest: stage3_prefetch_bucket_size",)),
        ({"fp16": {"enabled": False, "los_scale": 0}}, ("'los_scale' in fp16", "loss_scale")),
        ({"aio": {"block_sze": 1}}, ("'block_sze' in aio", "block_size")),
        ({"zero_stage": 2}, ("zero_stage=2 isn't taken over", "accelerate config", "zero_optimization.stage")),
        ({"zero_optimization": {"mics_shard_size": 4}}, ("=4 isn", "strategy=mics with strategy.shard_size")),
        ({"zero_optimization": {"mics_hierarchical_params_gather": True}}, ("strategy=mics",)),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, ("zero_optimization.zenflow", "come late")),
        ({"zero_optimization": {"zero_quantized_nontrainable_weights": True}}, ("8 bits",)),
        ({"zero_optimization": {"offload_optimizer": {"super_offload": True}}}, ("super_offload=true",)),
        ({"compression_training": {"pruning": {"enabled": True}}}, ("has removed it",)),
        ({"amp": {"enabled": True}}, ("amp=", "precision=bf16")),
        ({"tensorboard": {"enabled": True}}, ("logger=tensorboard",)),
        ({"gradient_predivide_factor": 2.0}, ("gradient_predivide_factor=2.0, ours is 1",)),
        ({"sequence_parallel_size": 2}, ("sequence_parallel_size=2",)),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, ("trainer.activation_checkpointing",)),
        ({"zero_optimization": True}, ("zero_optimization=true is not a section",)),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, ('offload_optimizer="cpu" is not a section',)),
        ({"zero_optimization": {"offload_optimizer": {"device": "disk"}}}, ("none, cpu or nvme",)),
        ({"zero_optimization": {"overlap_comm": "yes"}}, ('overlap_comm="yes" is not true or false',)),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, ("reduce_bucket_size=0 is not a whole number above 0",)),
        ({"zero_optimization": {"sub_group_size": -1}}, ("sub_group_size=-1 is not a whole number",)),
        ({"zero_optimization": {"sub_group_size": 10**400}}, ("sub_group_size=1000", "...")),
        ({"zero_optimization": {"reduce_bucket_size": float("inf")}}, ("reduce_bucket_size=Infinity",)),
        ({"zero_optimization": {"compute_grad_norm": False}}, ("compute_grad_norm=false, ours is true",)),
        ({"communication_data_type": "fp8"}, ('communication_data_type="fp8" is not fp32, fp16 or bf16',)),
        ({"zero_optimization": {"stage": 0}}, ("strategy=ddp",)),
        ({"zero_optimization": {"stage": 7}}, ("stage=7",)),
    ],
)  # fmt: skip
def test_key_is_refused_by_name(raw: dict[str, Any], parts: tuple[str, ...]) -> None:
    message = refusal(raw)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "raw",
    [
        {"compression_training": {}},
        {"curriculum_learning": {"enabled": False, "params": {"curriculum_type": "seqlen"}}},
        {"zero_optimization": {"mics_shard_size": -1, "zenflow": None, "zeropp_loco_param": None}},
        {"zero_optimization": {"cpu_offload": False, "cpu_offload_param": False}},
        {"optimizer": "auto", "scheduler": None},
        {"fp16": {"enabled": False, "loss_scale_window": 77, "hysteresis": 9}},
    ],
)
def test_what_is_switched_off_asks_for_nothing(raw: dict[str, Any]) -> None:
    assert merged(raw, ours()) == merged({}, ours())


def test_old_offload_and_its_new_form_together_are_refused() -> None:
    message = refusal({"zero_optimization": {"cpu_offload": True, "offload_optimizer": {"device": "cpu"}}})
    assert "zero_optimization.cpu_offload=true is the old form of offload_optimizer" in message
    message = refusal({"zero_optimization": {"cpu_offload_use_pin_memory": True}})
    assert "pin_memory in offload_optimizer" in message


def test_numbers_may_be_strings() -> None:
    raw = {"train_batch_size": "24", "gradient_clipping": "1e0", "zero_optimization": {"reduce_bucket_size": "5e6"}}
    assert merged(raw, ours())["zero_optimization"]["reduce_bucket_size"] == 5_000_000


def junk(random: random.Random, depth: int = 0) -> Any:
    """Anything that a file may hold, mostly under keys that mean something."""
    if depth < 4 and random.random() < (1.0 if depth == 0 else 0.5):
        return {random.choice(_WORDS): junk(random, depth + 1) for _ in range(random.randint(0, 4))}
    if random.random() < 0.1:
        return [junk(random, 4) for _ in range(random.randint(0, 3))]
    return random.choice([None, True, False, 0, -1, 3, 2.5, 1e400, 10**400, float("nan"), "auto", "cpu", "2e3", "x\ny"])


_TABLES = (keys.PASSED, keys.OURS, keys.ZERO, keys.REFUSED, keys.OLD_NAMES, keys.OLD_OFFLOADS)
_WORDS = [key.rpartition(".")[2] for table in _TABLES for key in table] + [
    "enabled",
    "device",
    "type",
    "params",
    "x\ny",
]


def test_junk_is_taken_over_or_refused_in_one_line() -> None:
    optimizer = AdamWOptimizer().make([("weight", nn.Parameter(torch.zeros(2, 2)))])
    generator, refused = random.Random(0), 0
    for _ in range(1000):
        raw, stage = junk(generator), generator.choice([1, 2, 3])
        for use in (lambda: merged(raw, ours(stage)), lambda: check_optimizer(raw, optimizer)):  # noqa: B023
            try:
                use()
            except ConfigError as error:
                one_line(error)
                refused += 1
    assert 300 < refused < 2000


# Merging.


def test_nothing_given_is_our_own_configuration() -> None:
    assert merged({}, ours(own={"reduce_bucket_size": 7})) == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 7},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,
    }


def test_own_fields_and_the_file_are_merged_and_must_not_disagree() -> None:
    raw = {"zero_optimization": {"reduce_bucket_size": "auto", "offload_optimizer": {"device": "cpu"}}}
    own = {"reduce_bucket_size": 7, "offload_optimizer": {"device": "cpu", "pin_memory": False}}
    assert merged(raw, ours(own=own))["zero_optimization"] == {"stage": 2, **own}
    raw["zero_optimization"]["reduce_bucket_size"] = 8  # type: ignore[index]
    message = refusal(raw, ours(own=own))
    assert "zero_optimization.reduce_bucket_size=8, ours is 7 (the strategy's own field)" in message


@pytest.mark.parametrize(
    ("hidden_size", "stage", "sizes"),
    [
        (None, 3, {}),
        (64, 2, {"reduce_bucket_size": 4096}),
        (
            64, 3,
            {"reduce_bucket_size": 4096, "stage3_prefetch_bucket_size": 3686,
             "stage3_param_persistence_threshold": 640},
        ),
    ],
)  # fmt: skip
def test_automatic_sizes_follow_from_the_hidden_size(
    hidden_size: int | None, stage: int, sizes: dict[str, int]
) -> None:
    names = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
             "stage3_max_live_parameters")  # fmt: skip
    raw = {"zero_optimization": dict.fromkeys(names, "auto")}
    assert merged(raw, ours(stage, hidden_size=hidden_size))["zero_optimization"] == {"stage": stage, **sizes}


def test_all_disagreements_are_in_one_line() -> None:
    raw = {
        "train_batch_size": 8,
        "gradient_clipping": 0,
        "zero_force_ds_cpu_optimizer": True,
        "bf16": {"enabled": True},
    }
    message = refusal(raw)
    assert "train_batch_size=8, ours is 24 (trainer.global_batch); " in message
    assert "gradient_clipping=0, ours is 1.0 (trainer.clip_norm); " in message
    assert "bf16.enabled=true, ours is false (precision=fp32)" in message
    assert "zero_force_ds_cpu_optimizer=true, ours is false (optimizer)" in message
    assert message.endswith("Batch sizes in numbers need trainer.micro_batch too.")


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        ({"offload_param": {"device": "cpu"}}, 'offload_param.device="cpu" is for stage 3'),
        (
            {"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}},
            'offload_optimizer.device="nvme" is for stage 3',
        ),
        ({"zero_quantized_weights": True}, "zero_quantized_weights=true is for stage 3"),
        ({"zero_hpz_partition_size": 2}, "zero_hpz_partition_size=2 is for stage 3"),
        ({"offload_optimizer": {"device": "nvme"}}, "there is no offload_optimizer.nvme_path"),
    ],
)
def test_what_only_stage_3_does_is_refused_below(raw: dict[str, Any], part: str) -> None:
    assert part in refusal({"zero_optimization": raw})


def test_nvme_of_a_file_is_ours_and_host_memory_to_deepspeed() -> None:
    settings, place, unheeded = on_nvme(merged(file("infinity_nvme"), ours(3)))
    zero = settings["zero_optimization"]
    assert place == Place(optimizer="/mnt/fast", weights="/mnt/fast")
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu", "pin_memory": False}
    assert zero["sub_group_size"] == 500_000_000
    assert {"aio", "zero_optimization.offload_optimizer.buffer_count"} <= {*unheeded}
    settings, place, unheeded = on_nvme(merged({}, ours(3, own={"offload_optimizer": {"device": "nvme"}})))
    assert place == Place(optimizer=tempfile.gettempdir())
    assert (settings["zero_optimization"]["sub_group_size"], unheeded) == (100_000_000, [])


def test_what_only_cuda_devices_do_is_refused_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refusal(file("zeropp"), ours(3))
    assert "zero_optimization.zero_quantized_weights=true, ours is false (DeepSpeed has it for CUDA devices" in message
    assert "zero_optimization.zero_quantized_gradients=true" in message
    assert "aio.use_gds=true" in refusal({"aio": {"use_gds": True}})
    assert merged({"zero_optimization": {"zero_hpz_partition_size": 2}}, ours(3))


@pytest.mark.parametrize(
    ("precision", "autocast", "part"),
    [
        (BF16, {"enabled": True, "dtype": "bfloat16"}, None),
        (FP16, {"enabled": True, "dtype": "torch.float16"}, None),
        (Precision(), {"enabled": False, "dtype": "bfloat16"}, None),
        (FP16, {"enabled": True, "dtype": "bfloat16"}, 'torch_autocast.dtype="bf16", ours is "fp16" (precision=fp16)'),
        (Precision(), {"enabled": True}, "torch_autocast.enabled=true, ours is false (precision=fp32)"),
        (BF16, {}, "torch_autocast.enabled=false, ours is true (precision=bf16)"),
    ],
)
def test_autocast_is_compared(precision: Precision, autocast: dict[str, Any], part: str | None) -> None:
    raw = {"torch_autocast": autocast}
    if part is None:
        assert "torch_autocast" not in merged(raw, ours(precision=precision))
    else:
        assert part in refusal(raw, ours(precision=precision))


@pytest.mark.parametrize(
    ("section", "part"),
    [
        (
            {"type": "WarmupLR", "params": {"warmup_num_steps": 20, "warmup_max_lr": 3e-4, "warmup_type": "linear"}},
            "schedule=constant schedule.warmup=20 optimizer.lr=0.0003 (",
        ),
        ({"type": "WarmupLR"}, "schedule=constant schedule.warmup=1000, whose warmup is linear and not logarithmic"),
        (
            {"type": "WarmupDecayLR", "params": {"total_num_steps": 5e3, "warmup_num_steps": "auto"}},
            "schedule=linear trainer.max_steps=5000,",
        ),
        (
            {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 9, "cos_min_ratio": 0.2}},
            "schedule=cosine schedule.warmup=9 schedule.final_ratio=0.2",
        ),
        ({"type": "OneCycle", "params": {"cycle_min_lr": 1}}, "none of which has its shape"),
    ],
)
def test_scheduler_is_refused_with_ours_in_its_place(section: dict[str, Any], part: str) -> None:
    message = refusal({"scheduler": section})
    assert f'scheduler.type="{section["type"]}"' in message
    assert part in message


# The optimizer.


def adamw(**fields: Any) -> torch.optim.Optimizer:
    parameters = [("weight", nn.Parameter(torch.zeros(2, 2))), ("bias", nn.Parameter(torch.zeros(2)))]
    return AdamWOptimizer(**{"lr": 2e-4, "beta2": 0.97, "eps": 1e-7, "weight_decay": 0.05, **fields}).make(parameters)


def complaint(section: Any, optimizer: torch.optim.Optimizer) -> str:
    with pytest.raises(ConfigError) as caught:
        check_optimizer({"optimizer": section}, optimizer)
    return one_line(caught.value)


@pytest.mark.parametrize("name", CASES)
def test_optimizers_of_the_files_agree_with_ours(name: str) -> None:
    check_optimizer(file(name), adamw())


@pytest.mark.parametrize(
    "section",
    [
        {},
        None,
        "auto",
        {"type": "adamw"},
        {"type": "Adam", "params": {"lr": "2e-4", "bias_correction": True, "torch_adam": True, "adam_w_mode": True}},
        {"params": {"amsgrad": False, "weight_decay": None}},
    ],
)
def test_agreeing_optimizer_is_accepted(section: Any) -> None:
    check_optimizer({"optimizer": section}, adamw())


@pytest.mark.parametrize(
    ("section", "part"),
    [
        ({"type": "Lamb", "params": {"max_coeff": 10}}, 'optimizer.type="Lamb", ours is "AdamW" (optimizer)'),
        ({"params": {"lr": 3e-4}}, "optimizer.params.lr=0.0003, ours is 0.0002 (optimizer.lr)"),
        (
            {"type": "AdamW", "params": {"betas": [0.9, 0.999]}},
            "optimizer.params.betas=[0.9, 0.999], ours is [0.9, 0.97] (optimizer.beta1, optimizer.beta2)",
        ),
        ({"params": {"weight_decay": 0}}, "optimizer.params.weight_decay=0, ours is 0.05 (optimizer.weight_decay)"),
        ({"params": {"eps": 1e-8}}, "optimizer.params.eps=1e-08, ours is 1e-07 (optimizer.eps)"),
        ({"type": "Adam", "params": {"adam_w_mode": False}}, "adam_w_mode=false, ours is true"),
        ({"params": {"torch_adam": False}}, "torch_adam=false, ours is true (optimizer)"),
        ({"params": {"beta": [0.9, 0.9]}}, "AdamW has no key 'beta', in optimizer.params. Nearest: betas"),
        ({"params": [1]}, "optimizer.params=[1] is not a section"),
        ({"type": 3}, "optimizer.type=3 is not a string"),
        ("AdamW", 'optimizer="AdamW" is not a section'),
        ({"type": "AdamW", "legacy_fusion": True}, "optimizer.legacy_fusion=true"),
    ],
)
def test_other_optimizer_is_refused(section: Any, part: str) -> None:
    message = complaint(section, adamw())
    assert part in message, message


def test_other_optimizers_are_compared_too() -> None:
    weight = [("weight", nn.Parameter(torch.zeros(2, 2)))]
    sgd = SGDOptimizer(lr=0.3, momentum=0.9, nesterov=True).make(weight)
    check_optimizer({"optimizer": {"type": "SGD", "params": {"lr": 0.3, "momentum": 0.9, "nesterov": True}}}, sgd)
    assert "momentum=0, ours is 0.9 (optimizer.momentum)" in complaint({"params": {"momentum": 0}}, sgd)
    assert 'optimizer.type="AdamW", ours is "SGD"' in complaint({"type": "AdamW", "params": {"betas": [0, 0]}}, sgd)
    check_optimizer({"optimizer": {"type": "Adafactor", "params": {"lr": 0.01}}}, AdafactorOptimizer().make(weight))
    check_optimizer({}, torch.optim.Rprop([value for _, value in weight]))  # which has no decay


def test_decay_is_compared_with_the_group_that_decays() -> None:
    bias = [("bias", nn.Parameter(torch.zeros(2)))]
    section = {"type": "AdamW", "params": {"weight_decay": 0.05}}
    check_optimizer({"optimizer": section}, AdamWOptimizer(weight_decay=0.05).make(bias))  # nothing decays
    assert "ours is 0.1" in complaint(section, adamw(weight_decay=0.1))


class DeepSpeedCPUAdam(torch.optim.Optimizer):
    """As DeepSpeed's own is to be recognised: by its name, its groups and `adam_w_mode`."""

    def __init__(self, adam_w_mode: bool) -> None:
        groups = [{"params": [nn.Parameter(torch.zeros(1))], "decays": True}]
        super().__init__(groups, {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1})
        self.adam_w_mode = adam_w_mode


def test_deepspeeds_own_adam_is_adam() -> None:
    section = {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "torch_adam": False, "adam_w_mode": True}}
    check_optimizer({"optimizer": section}, DeepSpeedCPUAdam(True))
    assert "adam_w_mode=true, ours is false" in complaint(section, DeepSpeedCPUAdam(False))
    assert "torch_adam=true, ours is false" in complaint({"params": {"torch_adam": True}}, DeepSpeedCPUAdam(True))
