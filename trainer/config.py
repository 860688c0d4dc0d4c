"""The configuration: which class belongs to which group, and one line for whatever is wrong with it.

Every configurable class is its own schema. It is registered in the group `schema` under its class
name, and a YAML of `conf/` starts from it (`/schema@_here_: ClassName`), so that Hydra knows each
key and type before anything is built.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import strategies
from strategies.backends import AutoBackend, GlooBackend, NCCLBackend
from strategies.base import Precision
from strategies.errors import ConfigError, nearest
from trainer import checkpoint, data, hooks, metrics, models, optim, schedule
from trainer.trainer import Trainer

CONF = Path(__file__).resolve().parent.parent / "conf"
C = TypeVar("C", bound=type)
T = TypeVar("T")


@dataclass(kw_only=True)
class Run:
    """Where a run's files lie."""

    dir: str | None = None
    """The run's folder; null: `runs/<name>`."""
    name: str | None = None
    """null: made from the model, the data and a digest of the settings that decide what is learned."""


@dataclass(kw_only=True)
class Config:
    """The root of the configuration."""

    strategy: Any = MISSING
    backend: Any = MISSING
    model: Any = MISSING
    data: Any = MISSING
    optimizer: Any = MISSING
    schedule: Any = MISSING
    precision: Any = MISSING
    checkpoint: Any = MISSING
    logger: dict[str, Any] = field(default_factory=dict)
    hooks: dict[str, Any] = field(default_factory=dict)
    trainer: Any = MISSING
    run: Run = field(default_factory=Run)
    seed: int = 0
    """Decides fresh weights, data order, dropout and masking."""
    resume: str = "auto"
    """`auto`: the newest good checkpoint of run.dir, if there is one; `never`; or a checkpoint's folder."""
    compile: bool = False
    """Run the model through torch.compile."""
    deterministic: bool = False
    """Only operations that give the same bits every time; slower, and refused where torch has none."""
    cache: str = "~/.cache/shardwright"
    """Folder for tokenised data, shared between runs."""


@dataclass(kw_only=True)
class Own:
    """The Trainer subclass makes it itself."""


_SCHEMAS: tuple[type, ...] = (
    Config,
    AutoBackend,
    GlooBackend,
    NCCLBackend,
    Precision,
    *checkpoint.SCHEMAS,
    *data.SCHEMAS,
    *hooks.SCHEMAS,
    *metrics.SCHEMAS,
    *models.SCHEMAS,
    *optim.SCHEMAS,
    *schedule.SCHEMAS,
)


def register(group: str, name: str) -> Callable[[C], C]:
    """Make a class of your own a choice: `@register("hooks", "mine")`, then `hooks=[mine]`.

    Args:
        group: `data`, `model`, `optimizer`, `schedule`, `hooks`, `logger` or `strategy`.
        name: the word after `group=`.
    """

    def store(cls: C) -> C:
        package = f"{group}.{name}" if group in ("hooks", "logger") else group
        ConfigStore.instance().store(group=group, name=name, node=cls, package=package)
        return cls

    return store


def register_schemas(trainer_class: type[Trainer] = Trainer) -> None:
    """Tell Hydra about every configurable class.

    Raises:
        ConfigError: an installed plugin is broken.
    """
    store = ConfigStore.instance()
    for cls in (*_SCHEMAS, *strategies.built_in()):
        store.store(group="schema", name=cls.__name__, node=cls)
    store.store(group="schema", name="Trainer", node=trainer_class)
    for name, cls in strategies.from_other_packages().items():
        store.store(group="strategy", name=name, node=cls)
    for group in ("model", "data"):
        store.store(group=group, name="own", node=Own)


def strategy_names() -> list[str]:
    """Every word that `strategy=` takes, those of other packages among them."""
    return sorted({*(path.stem for path in (CONF / "strategy").glob("*.yaml")), *strategies.from_other_packages()})


def with_config(task: Callable[[DictConfig, dict[str, str]], None]) -> None:
    """Compose the configuration from the command line and hand it to `task`, with the chosen options by group.

    Raises:
        ConfigError: an unknown key, a wrong type, an unknown choice: one line that names the nearest.
    """

    composed: list[tuple[DictConfig, dict[str, str]]] = []  # run outside of Hydra, which would add to our errors

    def main(config: DictConfig) -> None:
        refuse_unknown(config)
        composed.append((config, chosen()))

    # Hydra prints several lines and exits with 1; with this, it raises, and we say it in one.
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    call = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(main)
    program = sys.argv[0]
    try:
        _opening_dicts(sys.argv[1:], lambda words: _called(call, [program, *words]))
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before
    for config, choices in composed:
        task(config, choices)


def compose(overrides: Sequence[str], trainer_class: type[Trainer] = Trainer) -> DictConfig:
    """The configuration for `overrides`, without a command line; for notebooks and tests.

    Raises:
        ConfigError: as the command line would.
    """
    register_schemas(trainer_class)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = _opening_dicts(overrides, lambda words: hydra.compose("config", overrides=list(words)))
    refuse_unknown(config)
    return config


def _called(call: Callable[[], None], words: list[str]) -> None:
    before, sys.argv = sys.argv, words
    try:
        call()
    finally:
        sys.argv = before


def _opening_dicts(overrides: Sequence[str], compose_with: Callable[[list[str]], T]) -> T:
    """Let `model.config.new_key=value` add to a plain dictionary, as people expect; Hydra wants a `+` there.

    Raises:
        ConfigError: whatever else is wrong.
    """
    # Elsewhere an experiment is added, here it is a group like the others: either way of writing it will do.
    words = [word.removeprefix("+") if word.startswith("+experiment=") else word for word in overrides]
    for _ in range(len(words) + 1):
        try:
            return compose_with(words)
        except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:  # Hydra's own slips too
            key = _missing_in_dict(error)
            at = [index for index, word in enumerate(words) if key is not None and word.startswith(f"{key}=")]
            if not at:
                raise explained(error) from error
            words[at[0]] = f"++{words[at[0]]}"
    raise AssertionError("each turn opens one key")


def _missing_in_dict(error: BaseException | None) -> str | None:
    """The key that is missing in a dictionary without schema, if that is what `error` says."""
    while error is not None and not isinstance(error, OmegaConfBaseException):
        error = error.__cause__
    if error is None or not isinstance(error.parent_node, DictConfig) or not str(error).startswith("Key "):
        return None
    free = not dataclasses.is_dataclass(OmegaConf.get_type(error.parent_node))
    return str(error.full_key) if free else None


def made(node: DictConfig) -> Any:
    """The object whose schema `node` has; its own checks run here. No other way leads from configuration to objects."""
    return OmegaConf.to_object(node)


def restored(cls: type[T], stored: dict[str, Any]) -> T:
    """An object of `cls` from a configuration that was stored with a run; unknown keys are refused.

    Raises:
        ConfigError: it isn't a configuration of `cls`.
    """
    try:
        return cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), stored)))
    except OmegaConfBaseException as error:
        raise explained(error) from error


def chosen() -> dict[str, str]:
    """Group -> option, as composed for the running command."""
    from hydra.core.hydra_config import HydraConfig

    return {key: str(value) for key, value in HydraConfig.get().runtime.choices.items() if "/" not in key}


def refuse_unknown(config: DictConfig) -> None:
    """Refuse keys that `+key=value` has added to a class that doesn't know them, and values left open.

    Raises:
        ConfigError: names the key.
    """
    try:
        _refuse_unknown(config)
        OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:  # `${...}` that leads nowhere, or to a value of another type
        raise explained(error) from error


def _refuse_unknown(config: DictConfig) -> None:
    for path, node in _typed_nodes(config, ""):
        known = [item.name for item in dataclasses.fields(cast(Any, OmegaConf.get_type(node)))]
        for key in map(str, node):
            if key not in known:
                full = f"{path}.{key}" if path else key
                raise ConfigError(f"Configuration: there is no key {full!r}. {nearest(key, known)} ({full})")
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(
            f"Configuration: {missing[0]} has no value. Give one: {missing[0]}=... ({', '.join(missing)})"
        )


def _typed_nodes(node: DictConfig, path: str) -> Iterable[tuple[str, DictConfig]]:
    cls = OmegaConf.get_type(node)
    if dataclasses.is_dataclass(cls):
        yield path, node
    for key in map(str, node):
        value = node._get_node(key)
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_missing():
            yield from _typed_nodes(value, f"{path}.{key}" if path else key)


def explained(error: Exception) -> ConfigError:
    """One line for what Hydra or OmegaConf says in several."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, ConfigError):
            return inner
        if isinstance(inner, OmegaConfBaseException):
            return _explained_key(inner)
        inner = inner.__cause__
    text = str(error)
    choice = re.search(r"Could not (?:find|load) '([\w/.-]+)'", text)
    if isinstance(error, MissingConfigException) and choice:
        group, _, option = choice.group(1).rpartition("/")
        options = [path.stem for path in (CONF / group).glob("*.yaml")]
        with contextlib.suppress(OSError):  # how Hydra says that code has registered none
            options += [name.removesuffix(".yaml") for name in ConfigStore.instance().list(group)]
        return ConfigError(
            f"Configuration: {group}={option} is not a choice. {nearest(option, options)} ({group or option})"
        )
    if isinstance(error, OverrideParseException):
        return ConfigError(
            f"Configuration: can't read the argument {error.override!r}: {text.splitlines()[0]}. "
            "Write key=value, and quote what the shell would change."
        )
    return ConfigError(f"Configuration: {' '.join(line.strip() for line in text.splitlines() if line.strip())}")


def _explained_key(error: OmegaConfBaseException) -> ConfigError:
    key = str(error.full_key or error.key or "")
    parent = error.parent_node
    first = str(error).splitlines()[0]
    if re.match(r"Key '.*' (is )?not in", first) and isinstance(parent, DictConfig):
        known = [str(name) for name in parent]
        return ConfigError(f"Configuration: there is no key {key!r}. {nearest(key.rpartition('.')[2], known)} ({key})")
    expected = f" {_type_hint(error)}" if "could not be converted" in first else ""
    return ConfigError(f"Configuration: {key}: {first.rstrip('.')}.{expected} Give another value ({key}).")


def _type_hint(error: OmegaConfBaseException) -> str:
    kind = getattr(error.ref_type, "__name__", "") if error.ref_type is not None else ""
    return f"It takes {kind}." if kind in ("int", "float", "bool", "str") else ""
