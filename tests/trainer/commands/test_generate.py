"""`shardwright generate`: the text is that of the plain model of transformers, wherever its weights lie."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from strategies.testing import Workers
from tests.trainer.commands.jobs import command
from tests.trainer.commands.test_export import GPT2, MODEL, T5, expected, trained
from trainer.commands.export import export
from trainer.commands.trained import Tensors
from trainer.data import make_tokenizer

PROMPT = "def größe(x):"
NEW = 12


def generated(*words: str | Path) -> tuple[str, int]:
    """Text and number of tokens for `PROMPT`."""
    code, out, err = command(["generate", *map(str, words), PROMPT, "--max-new-tokens", str(NEW), "--json"])
    assert code == 0, err
    told = json.loads(out)
    assert told["prompt"] == PROMPT
    return told["text"], told["tokens"]


def plain(module: Any, begun: Sequence[int], **how: Any) -> tuple[str, int]:
    """The same by transformers alone."""
    torch.manual_seed(5)
    inputs = torch.tensor([list(begun)])
    how = {"do_sample": False, **how, "eos_token_id": 256, "pad_token_id": 257, "max_new_tokens": NEW}
    found = module.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=True, **how)[0]
    new = found[1:] if module.config.is_encoder_decoder else found[len(begun) :]
    return make_tokenizer("bytes").decode(new.tolist()), len(new)


DRAWN = ("--temperature", "1.5", "--top-p", "0.9", "--top-k", "40", "--seed", "5")
AS_DRAWN = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 40}


WAYS = {
    "run": (),
    "half": ("--max-memory", "cpu=30KB"),
    "disk": ("--max-memory", "cpu=0GB"),
}


@pytest.mark.parametrize(
    ("size", "overrides", "ways", "exported"),
    [
        (3, ("strategy=fsdp_full", "trainer.ema_decay=0.9", "optimizer.lr=1e-1"), ("run", "half"), ("run",)),
        (1, GPT2, ("disk",), ("disk",)),
        (1, T5, ("run",), ()),
        (1, ("model.lora.rank=2", "optimizer.lr=1e-1", "model.loss_chunk=8"), ("run",), ()),
        (
            1,
            ("model=hf", "model.architecture=mixtral", "model.config.num_local_experts=2", *MODEL),
            ("run",),
            ("half",),
        ),
    ],
    ids=["sharded", "tied", "t5", "lora", "experts"],
)
def test_generate_gives_what_transformers_gives(
    workers: Workers,
    tmp_path: Path,
    size: int,
    overrides: tuple[str, ...],
    ways: tuple[str, ...],
    exported: tuple[str, ...],
) -> None:
    run = tmp_path / "run"
    trained(workers, run, *overrides, size=size)
    module, tokens = expected(run), list(PROMPT.encode())
    begun = [*tokens, 256] if overrides == T5 else [256, *tokens]
    drawn = plain(module, begun, **AS_DRAWN)
    for way in ways:
        assert generated(run, *DRAWN, *WAYS[way], "--offload-folder", tmp_path / "disk") == drawn, way
    assert list((tmp_path / "disk").iterdir()) == []
    if exported:
        export(run, tmp_path / "out", max_shard_size="20KB")
    for way in exported:
        assert generated(tmp_path / "out", *DRAWN, *WAYS[way]) == drawn, way
    if size > 1:
        assert generated(run, "--temperature", "0") == plain(module, begun) != drawn
        assert generated(run, "--average", *DRAWN) == plain(expected(run, "average"), begun, **AS_DRAWN) != drawn


@pytest.fixture(scope="module")
def run(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "run"
    trained(workers, folder, "model.config.max_position_embeddings=64", "checkpoint.every=2")
    return folder


def test_generate_says_where_the_weights_lie(run: Path) -> None:
    words = ["generate", str(run), "a", "--max-new-tokens", "2", "--dtype", "bfloat16", "--max-memory", "cpu=20KiB"]
    code, out, err = command(words)
    assert (code, out[0], out[-1]) == (0, "a", "\n")
    assert "step 4\n" in err
    assert re.search(r"LlamaForCausalLM of [\d,]+ parameters, \d+% on cpu, \d+% on disk\n", err)
    assert err.count("\n") == 3, err


def test_generate_prompts_from_anywhere_give_the_same(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["generate", str(run), "--max-new-tokens", "4", "--json"]
    told = [json.loads(line) for line in command([*words, "one", "two"])[1].splitlines()]
    assert [line["prompt"] for line in told] == ["one", "two"]
    assert command([*words, "two"])[1] == json.dumps(told[1]) + "\n", "not a word of the prompt before"
    (tmp_path / "prompts").write_text("one\n\ntwo\n")
    from_file = command([*words, "--file", str(tmp_path / "prompts")])[1]
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    assert command(words)[1] == from_file == "".join(json.dumps(line) + "\n" for line in told)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    assert json.loads(command([*words, "--whole"])[1])["prompt"] == "one\n\ntwo\n"
    shown = command([*words[:-1], "one", "two"])[1]
    assert shown.startswith("--- prompt: 'one'\none")
    assert "\n--- prompt: 'two'\ntwo" in shown


def test_generate_checkpoint_that_its_run_removes_gives_way_to_another(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run, tmp_path / "run")
    checkpoints, read = tmp_path / "run" / "checkpoints", Tensors._read

    def swept(self: Tensors, name: str) -> torch.Tensor:
        shutil.rmtree(checkpoints / "step-00000004", ignore_errors=True)
        return read(self, name)

    monkeypatch.setattr(Tensors, "_read", swept)
    code, out, err = command(["generate", str(tmp_path / "run"), "a", "--max-new-tokens", "2"])
    assert (code, out[0]) == (0, "a"), err
    assert [line for line in err.splitlines() if "step" in line] == [
        f"{checkpoints}/step-00000004: step 4",
        f"{checkpoints}/step-00000002: step 2",
    ]
    monkeypatch.setattr("trainer.commands.generate._TRIES", 1)
    shutil.copytree(run / "checkpoints" / "step-00000004", checkpoints / "step-00000004")
    refused([str(tmp_path / "run"), "a"], "removed while it was read")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens=0"),
        (["--temperature", "-1"], "--temperature=-1.0"),
        (["--temperature", "nan"], "--temperature=nan"),
        (["--top-p", "0"], "--top-p=0.0"),
        (["--top-k", "0"], "--top-k=0"),
        (["--seed", "-1"], "--seed=-1"),
        (["--max-new-tokens", "64"], "64 positions"),
        (["--max-memory", "7=1GB"], "no device '7'"),
        (["--max-memory", "cpu"], "'' is not a size"),
        (["--max-memory", "cpu=much"], "'much' is not a size"),
        (["--dtype", "int8"], "--dtype"),
        (["--file", "nowhere"], "both prompts and --file"),
        (["--offload-folder", "/dev/null/x"], "--offload-folder"),
        (["--average"], "trainer.ema_decay"),
        (["--tokenizer", "nowhere"], "nowhere"),
        (["\udcff"], "UTF-8"),
    ],
    ids=lambda value: "_".join(value).encode("ascii", "replace").decode() if isinstance(value, list) else "",
)
def test_generate_wrong_is_one_line(run: Path, words: list[str], said: str) -> None:
    refused([str(run), "a", *words], said)


def refused(words: list[str], said: str) -> None:
    code, out, err = command(
        ["generate", *words, "--max-new-tokens", "4"] if "--max-new-tokens" not in words else ["generate", *words]
    )
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("ConfigError: ")
    assert err.count("ConfigError") == 1
    assert said in err, err


def test_generate_model_that_cannot_is_refused(
    workers: Workers, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masked = ("model=hf", "model.architecture=bert", "model.objective=masked", *MODEL[:4])
    trained(workers, tmp_path / "masked", *masked)
    trained(workers, tmp_path / "own", trainer="Rows")
    export(tmp_path / "masked", tmp_path / "bert")
    export(run, tmp_path / "out")
    for name, said in [
        ("masked", "BertForMaskedLM doesn't continue a text"),
        ("own", "Trainer subclass"),
        ("bert", "BertForMaskedLM of"),
        ("nowhere", "no complete checkpoint"),
    ]:
        refused([str(tmp_path / name), "a"], said)
    refused([str(tmp_path / "out"), "a", "--average"], "--average")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    refused([str(run)], "holds no prompt")
    weights = tmp_path / "out" / "model.safetensors"
    stored, name = load_file(weights), "model.norm.weight"
    save_file({key: value for key, value in stored.items() if key != name}, weights)
    refused([str(tmp_path / "out"), "a"], f"lacks 1 of its weights, the first is {name}")
    save_file({**stored, name: torch.ones(3)}, weights)
    refused([str(tmp_path / "out"), "a"], f"{name} of {tmp_path / 'out'} has shape [3]")
    save_file(stored, weights)
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
        refused([str(tmp_path / "out"), "a", "--max-memory", "cpu=0GB"], "--offload-folder")
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    refused([str(tmp_path / "out"), "a"], "adapters")
    (tmp_path / "out" / "adapter_config.json").unlink()
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused([str(tmp_path / "out"), "a"], "can't be read")
    weights.rename(weights.with_suffix(".bin"))
    refused([str(tmp_path / "out"), "a"], "no safetensors")
