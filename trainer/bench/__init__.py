"""The Trainer against a loop written by hand: the runs, and the tables of what they took."""

from trainer.bench.runs import MODELS, STRATEGIES, Bench, Case, Saves, Taken
from trainer.bench.tables import Results, to_json, to_markdown

__all__ = ["MODELS", "STRATEGIES", "Bench", "Case", "Results", "Saves", "Taken", "to_json", "to_markdown"]
