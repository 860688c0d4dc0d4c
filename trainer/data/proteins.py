"""Proteins: FASTA files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, final

from strategies.errors import ConfigError
from trainer.data.base import Tokenizer
from trainer.data.cache import file_digest
from trainer.data.language import AbstractLanguageData, Document, Reading, in_validation
from trainer.data.packing import Packing
from trainer.place import at_home

_OWN = Path(__file__).with_name("proteins.fasta")


class _Protein(NamedTuple):
    name: str
    sequence: str


@final
@dataclass(kw_only=True)
class ProteinData(AbstractLanguageData):
    """Amino-acid sequences, each a document."""

    files: list[str] = field(default_factory=list)
    """FASTA files; empty: the few well-known proteins that are part of this package."""
    tokenizer: str = "amino_acids"
    """`amino_acids`, or as for text."""
    packing: Packing = Packing.none
    """How proteins become samples: `none` (one each, cut off at `length`), `windows` or `whole`."""

    def _read(self, tokenizer: Tokenizer, folder: Path) -> Reading:
        files = [at_home(name) for name in self.files] or [_OWN]
        try:
            digests = [file_digest(file) for file in files]
        except OSError as error:
            raise ConfigError(
                f"ProteinData: {error.filename} can't be read: {error.strerror}. Name FASTA files (data.files)."
            ) from error
        return Reading(
            key=digests,
            documents=lambda: (
                Document(pieces=[(protein.sequence, True)], validation=in_validation(protein.name, self.validation))
                for file in files
                for protein in _proteins(file)
            ),
            what=", ".join(self.files) or "well-known proteins",
        )


def _proteins(file: Path) -> Iterator[_Protein]:
    name, parts = None, list[str]()
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(map(str.strip, lines), 1):
                if line.startswith(">"):
                    if name is not None and parts:
                        yield _Protein(name, "".join(parts))
                    name, parts = line[1:], []
                elif name is None and line:
                    raise ConfigError(
                        f"ProteinData: line {number} of {file} comes before any name, so this is no FASTA file: each "
                        "sequence follows a line that begins with >. Correct it (data.files)."
                    )
                elif line:
                    parts.append(_checked(line.upper().removesuffix("*"), number, file))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"it is no text at byte {error.start}"
        raise ConfigError(f"ProteinData: {file} can't be read: {why}. Mend or unpack it (data.files).") from error
    if name is not None and parts:
        yield _Protein(name, "".join(parts))


def _checked(sequence: str, number: int, file: Path) -> str:
    strange = sorted({letter for letter in sequence if not ("A" <= letter <= "Z" or letter in ".-")})
    if strange:
        raise ConfigError(
            f"ProteinData: line {number} of {file} has {strange[0]!r}, which stands for no amino acid. "
            "Correct it, or name another file (data.files)."
        )
    return sequence
