"""Several sources at once, drawn in fixed proportions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

from strategies.errors import ConfigError
from strategies.world import World
from trainer.data.base import AbstractData, Data, Say
from trainer.data.packing import JoinedSamples


@final
@dataclass(kw_only=True)
class MixtureData(AbstractData):
    """Sources by name, each configured as it would be alone.

    Each is added as an option of its own, here `text` under the name `notes`:
    `+data@data.sources.notes=text data.sources.notes.paths=[notes/] +data.weights.notes=0.3`.
    """

    sources: dict[str, AbstractData] = field(default_factory=dict)
    """What to draw from."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of the samples that comes from each; they needn't add up to 1."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("MixtureData: there are no sources. Add some (data.sources).")
        for name in self.sources.keys() ^ self.weights.keys():
            where = "a weight but no source" if name in self.weights else "no weight"
            raise ConfigError(f"MixtureData: {name!r} has {where}. Give each source one (data.weights).")
        for name, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise ConfigError(
                    f"MixtureData: the weight of {name!r} is {weight}, not positive and finite. "
                    "Change it, or leave the source out (data.weights)."
                )

        for name, source in self.sources.items():
            if source.workers:
                raise ConfigError(
                    f"MixtureData: the workers of {name!r} are {source.workers}, and batches are made of all sources "
                    f"together. Set data.workers, and leave this out (data.sources.{name}.workers)."
                )

    def build(self, world: World, cache: Path, say: Say) -> Data:
        """See `AbstractData.build`."""
        found = {name: source.build(world, cache, say) for name, source in self.sources.items()}
        self._check(found)
        total = sum(self.weights.values())
        shares = ", ".join(
            f"{weight / total:.1%} {name} ({found[name].description})" for name, weight in self.weights.items()
        )
        first = next(iter(found.values()))
        held_out = [data.validation for data in found.values() if data.validation is not None]
        return replace(
            first,
            train=JoinedSamples([data.train for data in found.values()]),
            validation=JoinedSamples(held_out) if held_out else None,
            sources=[(len(data.train), self.weights[name]) for name, data in found.items()],
            description=f"Mixture: {shares}",
        )

    def _check(self, found: dict[str, Data]) -> None:
        """Refuse sources that don't go together."""
        for what, values in (
            ("tokenizer", {name: data.tokenizer and data.tokenizer.identity for name, data in found.items()}),
            ("classes", {name: ", ".join(data.classes) for name, data in found.items()}),
        ):
            (first, expected), *others = values.items()
            for name, value in others:
                if value != expected:
                    raise ConfigError(
                        f"MixtureData: {first!r} and {name!r} differ in their {what} ({expected or 'none'}, "
                        f"{value or 'none'}). Give them the same (data.sources.{name})."
                    )
