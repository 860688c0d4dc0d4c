"""Text to numbers: bytes, amino acids, or any tokenizer of `transformers`."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np

from strategies.errors import ConfigError
from trainer.data.amino_acids import AminoAcidTokenizer
from trainer.data.base import Tokenizer, Tokens


def first_line(error: BaseException) -> str:
    """What an error says, in one line without the final stop."""
    said = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(". :")


@final
class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8 as they are, and three specials after them."""

    @property
    def vocabulary_size(self) -> int:
        return 259

    @property
    def identity(self) -> str:
        return "bytes-1"

    @property
    def boundary(self) -> int:
        return 256

    @property
    def padding(self) -> int:
        return 257

    @property
    def mask(self) -> int:
        return 258

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_many(self, texts: Sequence[str]) -> list[Tokens]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if 0 <= token < 256).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Write a `tokenizer.json` that gives the same numbers."""
        from tokenizers import Tokenizer as Model
        from tokenizers import decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        model = Model(models.BPE(vocab={letter: byte for byte, letter in enumerate(_byte_letters())}, merges=[]))
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        model.decoder = decoders.ByteLevel()
        specials = {"eos_token": "<|boundary|>", "pad_token": "<|padding|>", "mask_token": "<|mask|>"}
        model.add_special_tokens(list(specials.values()))
        PreTrainedTokenizerFast(
            tokenizer_object=model,
            **specials,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(folder)


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies.

    Printable Latin-1 stands for itself; the rest follows from U+0100 on.
    Source: the GPT-2 encoder (Radford et al. 2019).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


@final
class HubTokenizer(Tokenizer):
    """A tokenizer of `transformers`, from a folder or a name on the hub."""

    def __init__(self, name: str) -> None:
        """Load it; never runs code that comes with it.

        Raises:
            ConfigError: there is none of that name, it can't be loaded, or it has no special token
                that could end a document.
        """
        self._name = name
        self._inner = _load(name)
        ends = (
            self._inner.eos_token_id,
            self._inner.sep_token_id,
            self._inner.bos_token_id,
            self._inner.cls_token_id,
        )
        boundary = next((token for token in ends if token is not None), None)
        if boundary is None:
            raise ConfigError(
                f"Tokenizer: {name!r} has no end-of-text token, so documents can't be told apart. "
                "Set eos_token in its tokenizer_config.json (data.tokenizer)."
            )
        self._boundary = int(boundary)

    @property
    def vocabulary_size(self) -> int:
        return len(self._inner)

    @functools.cached_property
    def _content(self) -> str:
        if self._inner.is_fast:
            # Truncation and padding are call-time settings that the object remembers.
            model = json.loads(self._inner.backend_tokenizer.to_str())
            content: Any = {**model, "truncation": None, "padding": None}
        else:
            content = [type(self._inner).__name__, self._inner.get_vocab(), repr(self._inner.init_kwargs)]
        text = json.dumps([content, self._boundary], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def identity(self) -> str:
        return f"hub-1-{self._content}"

    @property
    def boundary(self) -> int:
        return self._boundary

    @property
    def padding(self) -> int:
        padding = self._inner.pad_token_id
        return self._boundary if padding is None else int(padding)

    @property
    def mask(self) -> int | None:
        mask = self._inner.mask_token_id
        return None if mask is None else int(mask)

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self.encode_many([text])[0]]

    def encode_many(self, texts: Sequence[str]) -> list[Tokens]:
        # verbose=False: it would warn of every document that is longer than the model's window.
        found = self._inner(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [np.asarray(tokens, dtype=np.int64) for tokens in found["input_ids"]]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._inner.decode(list(tokens), skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        self._inner.save_pretrained(folder)

    @property
    def chat_template(self) -> str | None:
        template = self._inner.chat_template
        return template if isinstance(template, str) else None

    def special_tokens(self) -> dict[str, str]:
        return {name: str(value) for name, value in self._inner.special_tokens_map.items() if isinstance(value, str)}


def _load(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the hub, the file system and parsers each raise their own kinds
        raise ConfigError(
            f"Tokenizer: {name!r} can't be loaded: {first_line(error)}. "
            "Give 'bytes', a folder with tokenizer.json, or a name on the hub (data.tokenizer)."
        ) from error


_OWN: dict[str, type[Tokenizer]] = {"bytes": ByteTokenizer, "amino_acids": AminoAcidTokenizer}


def make_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`: `bytes`, `amino_acids`, a folder, or a name on the hub.

    Raises:
        ConfigError: it can't be loaded.
    """
    own = _OWN.get(name)
    return HubTokenizer(name) if own is None else own()
