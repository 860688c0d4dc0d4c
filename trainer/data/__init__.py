"""Samples: where they come from, in which order they are drawn, and how they become batches."""

from __future__ import annotations

from trainer.data.base import AbstractData, Collate, Data, Sample, Samples, Say, Tokenizer
from trainer.data.dataset import DatasetData
from trainer.data.images import DigitsData, ImageFolderData
from trainer.data.loader import Loader, accumulation_of, evaluation_batches
from trainer.data.messages import MessagesData
from trainer.data.mixture import MixtureData
from trainer.data.order import Order, seed_for
from trainer.data.packing import Packing
from trainer.data.proteins import ProteinData
from trainer.data.text import PythonStdlibData, TextData
from trainer.data.tokenizers import make_tokenizer
from trainer.data.tokens import TokenData, TokenType

__all__ = [
    "SCHEMAS",
    "AbstractData",
    "Collate",
    "Data",
    "DatasetData",
    "DigitsData",
    "ImageFolderData",
    "Loader",
    "MessagesData",
    "MixtureData",
    "Order",
    "Packing",
    "ProteinData",
    "PythonStdlibData",
    "Sample",
    "Samples",
    "Say",
    "TextData",
    "TokenData",
    "TokenType",
    "Tokenizer",
    "accumulation_of",
    "evaluation_batches",
    "make_tokenizer",
    "seed_for",
]

SCHEMAS: tuple[type, ...] = (
    *(PythonStdlibData, TextData, DatasetData, TokenData, MessagesData, MixtureData),
    *(ProteinData, ImageFolderData, DigitsData),
)
