"""Proteins from FASTA files, by the alphabet of ESM-2."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from strategies.errors import ConfigError
from tests.trainer.data.helpers import build, tokens_of
from trainer.data import ProteinData, make_tokenizer

MASSES = {"INS_HUMAN": (110, 11981), "HBA_HUMAN": (142, 15258), "HBB_HUMAN": (147, 15998), "MYG_PHYMC": (154, 17331),
          "LYSC_CHICK": (147, 16239), "GFP_AEQVI": (238, 26886), "CYC_HUMAN": (105, 11749), "CALM1_HUMAN": (149, 16838),
          "H4_HUMAN": (103, 11367), "THIO_ECOLI": (109, 11807), "RASH_HUMAN": (189, 21298), "P53_HUMAN": (393, 43653),
          "ALBU_HUMAN": (609, 69367)}  # fmt: skip
"""Length and average mass in dalton of whole entries, as UniProt gives them."""
RESIDUES = {"A": 71.0788, "R": 156.1875, "N": 114.1038, "D": 115.0886, "C": 103.1388, "E": 129.1155, "Q": 128.1307,
            "G": 57.0519, "H": 137.1411, "I": 113.1594, "L": 113.1594, "K": 128.1741, "M": 131.1926, "F": 147.1766,
            "P": 97.1167, "S": 87.0782, "T": 101.1051, "W": 186.2132, "Y": 163.1760, "V": 99.1326}  # fmt: skip


def test_own_proteins_have_the_lengths_and_masses_of_their_entries(tmp_path: Path) -> None:
    from trainer.data.proteins import _OWN, _proteins

    found = {protein.name.split("|")[2].split(" ")[0]: protein.sequence for protein in _proteins(_OWN)}
    assert len(found) == 18
    for name, (length, mass) in MASSES.items():
        assert len(found[name]) == length
        assert round(math.fsum(RESIDUES[letter] for letter in found[name]) + 18.0153) == mass, name
    data = build(ProteinData(validation=0.1, length=1024), tmp_path)
    assert data.validation is not None
    assert len(data.train) + len(data.validation) == 18
    rows = [*tokens_of(data.train), *tokens_of(data.validation)]
    assert sum(len(row) - 2 for row in rows) == sum(map(len, found.values()))  # each between two boundaries


def test_fasta_is_one_sample_per_protein_in_the_numbers_of_esm(tmp_path: Path) -> None:
    (tmp_path / "a.fasta").write_text(">one\nLAG\nvse\n\n>empty\n>two\nMKJ*\n")
    data = build(ProteinData(files=[str(tmp_path / "a.fasta")], validation=0.0, length=16), tmp_path)
    assert tokens_of(data.train) == [[0, 4, 5, 6, 7, 8, 9, 0], [0, 20, 15, 3, 0]]
    assert data.tokenizer is not None
    assert data.tokenizer.decode([0, 4, 5, 32, 6, 1]) == "LAG"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"MKV\n", "line 1 of .* comes before any name"),
        (b">a\nMK7\n", "line 2 of .* has '7'"),
        (b"\x1f\x8b\x08\xff", "can't be read"),
        (b"", "no text"),
    ],
)
def test_file_that_is_no_fasta_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.fasta").write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        build(ProteinData(files=[str(tmp_path / "a.fasta")]), tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.files"):
        build(ProteinData(files=[str(tmp_path / "nothing.fasta")]), tmp_path)


def test_alphabet_is_written_as_transformers_reads_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = make_tokenizer("amino_acids")
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "MKWVTFISLLFLFSSAYSXBUZO"
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert (theirs.mask_token_id, theirs.pad_token_id, theirs.cls_token_id) == (ours.mask, ours.padding, ours.boundary)
    assert (len(theirs), ours.vocabulary_size) == (33, 33)
