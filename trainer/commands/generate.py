"""Continue prompts with a run's newest checkpoint, or with any folder that `transformers` opens."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.commands import Parser

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainer.generation import Generator

_TRIES = 3
"""While a run that goes on removes the checkpoints that are being read."""
_DTYPES = ("float32", "bfloat16", "float16")


def parser() -> Parser:
    """`shardwright generate`'s own options."""
    found = Parser(
        "generate",
        "Continue prompts with what a run has learned so far. The weights are read one by one out of the newest "
        "checkpoint, whatever strategy wrote it, and laid out by Accelerate over the GPUs of this machine, its memory "
        "and, if that is still too little, its disk. The text goes to stdout as it comes, all else to stderr. "
        "Nothing is fetched from the network.",
    )
    found.add_argument(
        "source",
        help="a run's folder (its newest checkpoint; it may still be training), a checkpoint's folder, an address such "
        "as s3://bucket/run, or a transformers folder such as shardwright export writes",
    )
    found.add_argument("prompts", nargs="*", metavar="PROMPT", help="default: the lines of stdin")
    found.add_argument("--file", metavar="FILE", help="take the prompts from the lines of a file; - is stdin")
    found.add_argument("--whole", action="store_true", help="the whole of FILE or stdin is one prompt")
    found.add_argument("--average", action="store_true", help="the running average of the weights (trainer.ema_decay)")
    found.add_argument("--json", action="store_true", help="a line of JSON per prompt: prompt, text, tokens")
    chosen = found.add_argument_group("how tokens are chosen")
    chosen.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="default: 100")
    chosen.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: the likeliest; default: 0.8")
    chosen.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="from the likeliest that have P together; default: 1"
    )
    chosen.add_argument("--top-k", type=int, metavar="K", help="from the K likeliest; default: all")
    chosen.add_argument("--seed", type=int, default=0, metavar="N", help="of each prompt; default: 0")
    layout = found.add_argument_group("where the weights lie")
    layout.add_argument(
        "--max-memory",
        action="append",
        default=[],
        metavar="DEVICE=SIZE",
        help="most weights on a GPU (0=10GB) or in memory (cpu=4GiB); may be given several times; "
        "default: nine tenths of what is free",
    )
    layout.add_argument(
        "--offload-folder",
        type=Path,
        metavar="FOLDER",
        help="for weights that no memory holds; default: a temporary one",
    )
    layout.add_argument("--dtype", choices=_DTYPES, help="of the weights; default: as they are stored")
    layout.add_argument("--tokenizer", metavar="NAME", help="bytes or a folder; default: that of the run or folder")
    return found


def main(options: Namespace) -> int:
    """Prints each continuation."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: names are looked up on disk only
    import torch

    from strategies.errors import ConfigError
    from strategies.world import Launch
    from trainer.commands.trained import GoneError
    from trainer.generation import Sampling
    from trainer.host_memory import give_back_freed_memory
    from trainer.models.dispatch import dispatch, limits, places

    give_back_freed_memory()

    if Launch.from_env().size > 1:
        raise ConfigError("generate: one process does it, with all GPUs. Start it without torchrun.")
    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
    )
    prompts = _prompts(options)
    with _in_one_line(options.source), _offload(options.offload_folder) as folder:
        dtype = getattr(torch, options.dtype) if options.dtype else None
        most = limits(options.max_memory)
        open_ = _stored if Path(options.source, "config.json").is_file() else _trained
        for tries_left in reversed(range(_TRIES)):
            with contextlib.suppress(*[GoneError] * bool(tries_left)):
                generator, values = open_(options, dtype)
                read = [(prompt, generator.read(prompt, sampling)) for prompt in prompts]
                where = places(generator.model, most, dtype)
                dispatch(generator.model, values, where, folder, dtype)
                break
        print(f"{options.source}: {_layout(generator.model, where)}", file=sys.stderr)
        for prompt, tokens in read:
            _continue(generator, prompt, tokens, sampling, options.json, heading=len(read) > 1)
    return 0


def _continue(
    generator: Generator, prompt: str, tokens: Sequence[int], sampling: Any, as_json: bool, *, heading: bool
) -> None:
    def show(text: str) -> None:
        if not as_json:
            print(text, end="", flush=True)

    begun = time.monotonic()
    show((f"--- prompt: {prompt!r}\n" if heading else "") + (prompt if generator.continues else ""))
    try:
        text, number = generator.answer(tokens, sampling, show)
    finally:
        show("\n")
    if as_json:
        print(json.dumps({"prompt": prompt, "text": text, "tokens": number}), flush=True)
    seconds = time.monotonic() - begun
    print(f"{number} tokens in {seconds:.1f} s", file=sys.stderr)


def _prompts(options: Namespace) -> list[str]:
    """At least one.

    Raises:
        ConfigError: there is none, there are two sources of them, or the file can't be read.
    """
    from strategies.errors import ConfigError

    if options.prompts and (options.file is not None or options.whole):
        flag = "--file" if options.file is not None else "--whole"
        raise ConfigError(f"generate: both prompts and {flag} were given. Give one of them ({flag}).")
    if options.prompts:
        try:
            "".join(options.prompts).encode()
        except UnicodeEncodeError as error:
            raise ConfigError("generate: a prompt isn't UTF-8. Write it in UTF-8, or take --file.") from error
        return list(options.prompts)
    from_stdin = options.file in (None, "-")
    if options.file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise ConfigError('generate: there is no prompt. Write one behind the folder, such as "The meaning of".')
    try:
        text = sys.stdin.read() if from_stdin else Path(options.file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it isn't UTF-8"
        raise ConfigError(
            f"generate: {options.file or 'stdin'} can't be read: {why}. Name another (--file)."
        ) from error
    found = [text] if options.whole and text else [line for line in text.splitlines() if line.strip()]
    if not found:
        raise ConfigError(f"generate: {'stdin' if from_stdin else options.file} holds no prompt. Write one per line.")
    return found


@contextlib.contextmanager
def _offload(folder: Path | None) -> Iterator[Path]:
    """For weights on disk; what is written there is removed at the end."""
    from strategies.errors import ConfigError

    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix="shardwright-", dir=folder)
    except OSError as error:
        raise ConfigError(
            f"generate: {folder} can't be written: {error.strerror}. Choose another (--offload-folder)."
        ) from error
    with made as name:
        yield Path(name)


@contextlib.contextmanager
def _in_one_line(source: str) -> Iterator[None]:
    import torch
    from safetensors import SafetensorError

    from strategies.errors import ConfigError

    try:
        yield
    except BrokenPipeError:  # who read it has gone, which Python would complain about once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"generate: a GPU's memory ran out: {str(error).splitlines()[0]} Leave more of it free, as in "
            "--max-memory 0=10GB (--max-memory)."
        ) from error
    except (OSError, SafetensorError) as error:
        why = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        where = getattr(error, "filename", None) or source
        raise ConfigError(
            f"generate: {where} can't be read or written: {why}. Look at that, and at its disk."
        ) from error


def _trained(options: Namespace, dtype: torch.dtype | None) -> tuple[Generator, Iterable[tuple[str, Tensor]]]:
    """From a checkpoint of ours: the model without weights, and those."""
    from strategies.errors import ConfigError
    from trainer.commands.trained import Trained
    from trainer.generation import Generator

    trained = Trained.open(options.source, average=options.average)
    tokenizer = trained.tokenizer(options.tokenizer)
    model = trained.model(tokenizer)
    module: Any = trained.model(tokenizer, lora={}, loss_chunk=0).empty()
    if not module.can_generate():
        raise ConfigError(
            f"generate: {type(module).__name__} doesn't continue a text. Take a run that trains a model for it "
            "(model.objective=causal or seq2seq)."
        )
    if tokenizer is None:
        raise ConfigError(
            f"generate: the run of {options.source} has no tokenizer, so there is no text to continue. "
            "Name the one that its tokens are of (--tokenizer)."
        )
    print(f"{trained.found.address}: step {trained.step:,}", file=sys.stderr)
    generator = Generator(
        model=_ready(module, dtype), tokenizer=tokenizer, begin=tokenizer.boundary, ends=[tokenizer.boundary]
    )
    return generator, trained.tensors(model).of(module)


def _stored(options: Namespace, dtype: torch.dtype | None) -> tuple[Generator, Iterable[tuple[str, Tensor]]]:
    """From a folder of `save_pretrained`: the model without weights, and those."""
    from strategies.errors import ConfigError
    from trainer.data import make_tokenizer
    from trainer.generation import Generator
    from trainer.models import pretrained

    folder = Path(options.source)
    if options.average:
        raise ConfigError(f"generate: {folder} is a transformers folder, which holds no average. Drop --average.")
    module = _ready(pretrained.empty_model(folder, dtype), dtype)
    tokenizer = make_tokenizer(options.tokenizer or str(folder))
    begin, ends = module.generation_config.bos_token_id, module.generation_config.eos_token_id
    generator = Generator(
        model=module,
        tokenizer=tokenizer,
        begin=tokenizer.boundary if begin is None else begin,
        ends=[tokenizer.boundary] if ends is None else ends if isinstance(ends, list) else [ends],
    )
    return generator, pretrained.tensors(module, folder)


def _ready(module: Any, dtype: torch.dtype | None) -> Any:
    if dtype is not None:
        module.config.dtype = dtype
    if getattr(module.config, "output_router_logits", False):
        module.config.output_router_logits = False  # a loss made of them is for training
    return module.eval().requires_grad_(False)


def _layout(module: Any, where: Any) -> str:
    """How many parameters, and which share of them lies where."""
    from collections import Counter

    from trainer.models.dispatch import place_of

    found: Counter[str] = Counter()
    for name, value in module.named_parameters():
        place = place_of(name, where)
        found[f"GPU {place}" if isinstance(place, int) else str(place)] += value.numel()
    total = sum(found.values())
    shares = [
        f"{number / total:.0%} on {place}" if len(found) > 1 else f"on {place}" for place, number in found.items()
    ]
    return f"{type(module).__name__} of {total:,} parameters, {', '.join(shares)}"
