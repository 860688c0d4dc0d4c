"""What a configuration asks of the planner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from strategies.activations import ActivationCheckpointing
from strategies.base import Strategy
from strategies.errors import ConfigError
from trainer.commands.parts import tokenizer_of
from trainer.config import each_of, made
from trainer.models.base import AbstractModel
from trainer.planner.auto import Auto
from trainer.planner.facts import facts_of
from trainer.planner.search import WAYS, Wanted

if TYPE_CHECKING:
    from trainer.planner.cluster import Machines


def wanted_of(
    keys: Sequence[str], config: Any, machines: Machines | None, cast: bool = False, chosen: str = "ddp"
) -> Wanted:
    """What the job is, and what it leaves to the planner.

    Args:
        keys: as they were given.
        config: composed from them.
        machines: to plan for; None: only memory is asked for.
        cast: weights are cast for a step.
        chosen: the strategy's word.

    Raises:
        ConfigError: the model can't be made, or not without storage.
    """
    model, trainer, precision = made(config.model), made(config.trainer), made(config.precision)
    if not isinstance(model, AbstractModel):
        raise ConfigError(
            "plan: model=own is made by a Trainer subclass, which isn't here. Start that with strategy=auto, which "
            "plans with the model itself, or choose another (model, strategy)."
        )
    model.prepare(tokenizer_of(config.data))
    optimizer = made(config.optimizer)
    facts = facts_of(
        model,
        optimizer.slots_per_parameter,
        precision,
        length=_length(config, model),
        device="cpu" if machines is not None and machines.on_processors else "cuda",
        cast=cast,
    )
    facts.spec = replace(facts.spec, elementwise=optimizer.elementwise)
    batch_given = any(key.startswith(("trainer.global_batch=", "experiment=")) for key in keys)
    return Wanted(
        facts=facts,
        strategies=_strategies(keys, config, chosen),
        checkpointing=_ways(keys, trainer),
        global_batch=trainer.global_batch if batch_given else None,
        micro_batch=trainer.micro_batch,
        clip_norm=trainer.clip_norm,
        compiled=bool(config.compile),
        cast=cast,
    )


def _length(config: Any, model: Any) -> int:
    """Tokens of a sample, as the data cuts them; else as many as the model knows."""
    data = config.data or {}
    lengths = [part.get("length") for part in (data.get("sources") or {"": data}).values()]
    return int(max((length for length in lengths if length), default=None) or model.positions or 512)


def _strategies(keys: Sequence[str], config: Any, chosen: str) -> Mapping[str, Strategy]:
    """The one that was named, or whatever there is."""
    found: dict[str, Strategy]
    if isinstance(auto := made(config.strategy), Auto):
        found = each_of("strategy")
        return {name: found[name] for name in auto.chosen_from(found)}
    if any(key.lstrip("+").startswith(("strategy=", "strategy.")) for key in keys):
        return {chosen: made(config.strategy)}
    found = each_of("strategy")
    return found


def _ways(keys: Sequence[str], trainer: Any) -> Mapping[str, ActivationCheckpointing | None]:
    """How activations may be kept: as was said, or each way."""
    if trainer.recomputing is not None or any(key.startswith("trainer.activation_checkpointing") for key in keys):
        return {trainer.activation_checkpointing.name: trainer.recomputing}
    return WAYS


def applied(keys: Sequence[str], further: Sequence[str]) -> list[str]:
    """All of them, the further ones in place of what they change."""
    changed = {word.partition("=")[0] for word in further}
    names = [key.partition("=")[0].lstrip("+~") for key in keys]
    gone = tuple(f"{name}." for name in changed if "." not in name)  # settings of what is chosen anew
    kept = [
        key for key, name in zip(keys, names, strict=True) if name not in changed and not name.startswith(gone or "=")
    ]
    return [*kept, *further]
