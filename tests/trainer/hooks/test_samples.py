"""TextSamples: the same text for the same weights, wherever it is made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from strategies.backends import GlooBackend
from strategies.base import Batch
from strategies.ddp import DDPStrategy
from strategies.errors import ConfigError
from strategies.testing import Workers
from strategies.world import World
from trainer.data.base import Tokenizer
from trainer.hooks.base import Moment
from trainer.hooks.samples import TextSamples
from trainer.progress import Progress


class Letters(Tokenizer):
    """Bytes, with a boundary and a padding."""

    vocabulary_size, identity, boundary, padding, mask = 258, "letters", 256, 257, None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


class Alphabet(nn.Module):
    """Its likeliest next token is the one after; looks at nothing but the token itself."""

    def forward(self, input_ids: Tensor) -> Any:
        logits = 10 * nn.functional.one_hot((input_ids + 1) % 256, 258).float()
        return SimpleNamespace(logits=logits)


class Causal(nn.Module):
    """Sums embeddings of what came before, so that every token in the window counts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(258, 16)
        self.head = nn.Linear(16, 258)

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.head(self.table(input_ids).cumsum(1)))


class Run:
    """What a hook meets, and what it did."""

    def __init__(self, folder: Path, model: nn.Module | None = None, world: World | None = None) -> None:
        self.folder = folder
        self.model = Causal() if model is None else model
        self.world = world or World(device=torch.device("cpu"), store=dist.HashStore())
        self.seen: list[Batch] = []
        self.said: list[str] = []
        self.texts: list[tuple[str, str]] = []

    def predict(self, batch: Batch) -> Any:
        self.seen.append(batch)
        self.world.barrier()  # every rank must call equally often, or this hangs
        with torch.no_grad():
            return self.model(**batch.inputs)

    def moment(self, step: int, *, tokenizer: Tokenizer | None = None) -> Moment:
        return Moment(
            progress=Progress(step=step),
            metrics={},
            world=self.world,
            folder=self.folder,
            predict=self.predict,
            tokenizer=tokenizer,
            say=self.said.append,
            log_text=lambda name, text: self.texts.append((name, text)),
        )

    def file(self, step: int) -> str:
        return (self.folder / "samples" / f"step-{step:08d}.txt").read_text()


def test_samples_likeliest_tokens_follow_the_model(tmp_path: Path) -> None:
    run = Run(tmp_path, Alphabet())
    hook = TextSamples(prompts=["ab", "x"], length=4, temperature=0)
    hook.on_evaluate(run.moment(7, tokenizer=Letters()))
    assert run.file(7) == (
        "step 7, temperature 0, top_k 50, seed 0\n\n--- prompt: 'ab'\nabcdef\n\n--- prompt: 'x'\nxyz{|\n"
    )
    assert run.said == ["sample at step 7:\n  | abcdef"]
    assert run.texts[0][0] == "samples"
    assert "    abcdef" in run.texts[0][1]
    assert len(run.seen) == 4


def test_samples_drawn_twice_are_the_same_and_another_seed_or_step_differs(tmp_path: Path) -> None:
    texts = []
    for name, seed, step in (("a", 0, 1), ("b", 0, 1), ("c", 1, 1), ("d", 0, 2)):
        run = Run(tmp_path / name)
        torch.manual_seed(len(texts))  # the run's own random stream has no say
        before = torch.get_rng_state()
        TextSamples(prompts=["def "], length=40, seed=seed).on_evaluate(run.moment(step, tokenizer=Letters()))
        assert torch.equal(torch.get_rng_state(), before)
        texts.append(run.file(step).split("---")[1])
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def generate(folder: str) -> tuple[int, list[str]]:
    strategy = DDPStrategy()
    world = strategy.connect(GlooBackend())
    run = Run(Path(folder), world=world)
    TextSamples(prompts=["def ", ""], length=30).on_evaluate(run.moment(5, tokenizer=Letters()))
    strategy.close()
    return len(run.seen), run.said


def test_samples_on_two_worlds_are_the_same(workers: Workers, tmp_path: Path) -> None:
    [(calls, said)] = workers.run(generate, 1, str(tmp_path / "one"))
    pair = workers.run(generate, 2, str(tmp_path / "two"))
    assert calls == 30
    assert pair == [(calls, said)] * 2
    assert (tmp_path / "two/samples/step-00000005.txt").read_text() == Run(tmp_path / "one").file(5)


def test_samples_longer_than_the_window_slide(tmp_path: Path) -> None:
    run = Run(tmp_path, Alphabet())
    TextSamples(prompts=["a"], length=100, temperature=0, window=80).on_evaluate(run.moment(1, tokenizer=Letters()))
    widths = [batch.inputs["input_ids"].shape[1] for batch in run.seen]
    assert sorted(set(widths)) == [64, 80]
    last = run.seen[-1].inputs["input_ids"][0]
    assert last.tolist() == [(97 + 20 + index) % 256 for index in range(80)]


def test_samples_batch_has_no_weight(tmp_path: Path) -> None:
    run = Run(tmp_path)
    TextSamples(prompts=["abc", ""], length=1).on_evaluate(run.moment(1, tokenizer=Letters()))
    [batch] = run.seen
    assert (batch.num_targets, batch.num_tokens) == (0, 0)
    assert batch.labels.eq(-100).all()
    assert batch.inputs["input_ids"][:, :5].tolist() == [[256, 97, 98, 99, 257], [256, 257, 257, 257, 257]]


def test_samples_top_k_keeps_to_the_likeliest() -> None:
    hook = TextSamples(top_k=3, temperature=5.0)
    logits = torch.arange(10, dtype=torch.float64).repeat(500, 1)
    drawn = hook._draw(logits, torch.Generator().manual_seed(0))
    assert set(drawn) == {7, 8, 9}


def test_samples_draw_follows_the_probabilities() -> None:
    logits = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log().repeat(20000, 1)
    drawn = torch.tensor(TextSamples(temperature=1.0, top_k=None)._draw(logits, torch.Generator().manual_seed(0)))
    assert (drawn.bincount() / 20000).tolist() == pytest.approx([0.7, 0.2, 0.1], abs=0.02)


def test_samples_of_a_diverged_model_do_not_end_the_run() -> None:
    for temperature in (0.0, 1.0):
        for value in (float("nan"), float("inf"), float("-inf")):
            logits = torch.full((2, 5), value, dtype=torch.float64)
            tokens = TextSamples(temperature=temperature)._draw(logits, torch.Generator().manual_seed(0))
            assert all(0 <= token < 5 for token in tokens)


def test_samples_stop_at_the_end_of_the_document_and_show_no_control_characters(tmp_path: Path) -> None:
    class Script(nn.Module):
        def forward(self, input_ids: Tensor) -> Any:
            following = {256: 27, 27: 65, 65: 256}
            after = torch.tensor([following.get(int(token), 66) for token in input_ids.flatten()])
            return nn.functional.one_hot(after, 258).float().reshape(*input_ids.shape, 258)

    run = Run(tmp_path, Script())
    TextSamples(length=6, temperature=0).on_evaluate(run.moment(1, tokenizer=Letters()))
    assert run.said == ["sample at step 1:\n  | \ufffdA"]


def test_samples_every_and_at_the_end_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    hook = TextSamples(length=1, every=2)
    hook.on_start(run.moment(0, tokenizer=Letters()))
    for step in (1, 2, 3):
        hook.on_evaluate(run.moment(step, tokenizer=Letters()))
    again = TextSamples(length=1, every=2)
    again.load_state(hook.state())
    again.on_evaluate(run.moment(4, tokenizer=Letters()))
    again.on_end(run.moment(4, tokenizer=Letters()))
    assert sorted(path.stem for path in (tmp_path / "samples").iterdir()) == ["step-00000002", "step-00000004"]
    again.on_end(run.moment(5, tokenizer=Letters()))
    assert (tmp_path / "samples/step-00000005.txt").is_file()


def test_samples_without_tokenizer_say_so_and_stay_out(tmp_path: Path) -> None:
    run = Run(tmp_path)
    hook = TextSamples()
    hook.on_start(run.moment(0))
    hook.on_evaluate(run.moment(1))
    hook.on_end(run.moment(1))
    assert len(run.said) == 1
    assert run.seen == []


def test_samples_of_a_classifier_are_given_up_after_one_try(tmp_path: Path) -> None:
    run = Run(tmp_path, nn.Sequential())
    run.model.forward = lambda input_ids: SimpleNamespace(logits=torch.zeros(1, 10))  # type: ignore[method-assign]
    hook = TextSamples()
    for step in (1, 2):
        hook.on_evaluate(run.moment(step, tokenizer=Letters()))
    assert len(run.seen) == 1
    assert "doesn't give logits" in run.said[0]


@pytest.mark.parametrize(
    "options",
    [{"length": 0}, {"every": 0}, {"window": 0}, {"temperature": -1.0}, {"top_k": 0}, {"prompts": []}],
)
def test_samples_bad_setting_is_refused(options: dict[str, Any]) -> None:
    [key] = options
    with pytest.raises(ConfigError, match=rf"hooks\.samples\.{key}"):
        TextSamples(**options)
