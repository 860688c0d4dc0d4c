"""The alphabet in which models of the ESM family read proteins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import final

from trainer.data.base import Tokenizer

_ALPHABET = ("<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>")
"""Source: the order of ESM-2 (Lin et al. 2023), as its checkpoints have it."""
_NUMBERS = {letter: number for number, letter in enumerate(_ALPHABET)}


@final
class AminoAcidTokenizer(Tokenizer):
    """One token per amino acid, numbered as in ESM-2; letters that it doesn't know become `<unk>`."""

    @property
    def vocabulary_size(self) -> int:
        return len(_ALPHABET)

    @property
    def identity(self) -> str:
        return "amino-acids-1"

    @property
    def boundary(self) -> int:
        return _NUMBERS["<cls>"]

    @property
    def padding(self) -> int:
        return _NUMBERS["<pad>"]

    @property
    def mask(self) -> int:
        return _NUMBERS["<mask>"]

    def encode(self, text: str) -> list[int]:
        return [_NUMBERS.get(letter, _NUMBERS["<unk>"]) for letter in text]

    def decode(self, tokens: Sequence[int]) -> str:
        letters = [_ALPHABET[token] for token in tokens if 0 <= token < len(_ALPHABET)]
        return "".join(letter for letter in letters if len(letter) == 1)

    def save(self, folder: Path) -> None:
        """Write the `vocab.txt` from which transformers makes the same tokenizer."""
        from transformers import EsmTokenizer

        vocabulary = folder / "vocab.txt"
        vocabulary.write_text("\n".join(_ALPHABET))
        EsmTokenizer(str(vocabulary)).save_pretrained(folder)
