"""The configuration: which class belongs to which group, and one line for whatever is wrong with it.

Every configurable class is its own schema. It is registered in the group `schema` under its class
name, and a YAML of `conf/` starts from it (`/schema@_here_: ClassName`), so that Hydra knows each
key and type before anything is built.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

import strategies
from strategies.backends import AutoBackend, GlooBackend, NCCLBackend, NeuronBackend
from strategies.efa import EFABackend
from strategies.errors import ConfigError, nearest
from strategies.precision import Precision
from strategies.smddp import SMDDPBackend
from trainer import checkpoint, data, hooks, launch, metrics, models, optim, profiling, schedule
from trainer.complaints import CONF, OPTIONAL, SEVERAL, explained, options, refuse_unknown
from trainer.doctor import Doctor
from trainer.launch import Launcher
from trainer.place import Run
from trainer.planner.auto import Auto
from trainer.planner.cluster import Cluster
from trainer.trainer import Trainer

_SEEDS = 1 << 63
CHOOSERS = {"auto"}
"""Words that `strategy=` takes for one of the others."""
C = TypeVar("C", bound=type)
T = TypeVar("T")


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
    profiler: Any | None = None
    cluster: Any | None = None
    """The machines to plan for: shardwright plan and strategy=auto read it; nothing else in a run does."""
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
    doctor: Doctor | None = None
    """`quick`: before the model is built, look at every host and link for a few seconds, and end where one is bad."""


@dataclass(kw_only=True)
class Own:
    """The Trainer subclass makes it itself."""


_SCHEMAS: tuple[type, ...] = (
    Config,
    AutoBackend,
    EFABackend,
    GlooBackend,
    NCCLBackend,
    NeuronBackend,
    SMDDPBackend,
    Precision,
    Auto,
    Cluster,
    *checkpoint.SCHEMAS,
    *data.SCHEMAS,
    *hooks.SCHEMAS,
    *metrics.SCHEMAS,
    *models.SCHEMAS,
    *optim.SCHEMAS,
    *profiling.SCHEMAS,
    *schedule.SCHEMAS,
)


def register(group: str, name: str) -> Callable[[C], C]:
    """Make a class of your own a choice: `@register("hooks", "mine")`, then `hooks=[mine]`.

    Args:
        group: `data`, `model`, `optimizer`, `schedule`, `hooks`, `logger`, `profiler` or `strategy`.
        name: the word after `group=`.
    """

    def store(cls: C) -> C:
        package = f"{group}.{name}" if group in SEVERAL else group
        ConfigStore.instance().store(group=group, name=name, node=cls, package=package)
        return cls

    return store


def register_schemas(trainer_class: type[Trainer] = Trainer) -> None:
    """Tell Hydra about every configurable class.

    Raises:
        ConfigError: an installed plugin is broken, or `trainer_class` can't be its own schema.
    """
    OmegaConf.register_new_resolver("where_held_out", _where_held_out, replace=True)
    store = ConfigStore.instance()
    for cls in (*_SCHEMAS, *strategies.built_in()):
        store.store(group="schema", name=cls.__name__, node=cls)
    _refuse_no_schema(trainer_class)
    store.store(group="schema", name="Trainer", node=trainer_class)
    for name, cls in strategies.from_other_packages().items():
        store.store(group="strategy", name=name, node=cls)
    for group in ("model", "data"):
        store.store(group=group, name="own", node=Own)


def _refuse_no_schema(trainer_class: type[Trainer]) -> None:
    own, name = vars(trainer_class), trainer_class.__name__
    generated = "__dataclass_fields__" in own
    if not generated and ("__init__" in own or own.get("__annotations__")):
        raise ConfigError(
            f"{name}: it is no keyword-only dataclass on top of Trainer, so its fields can't be settings. "
            f"Write @dataclass(kw_only=True) above class {name}(Trainer), and no __init__ (trainer)."
        )
    try:
        OmegaConf.structured(trainer_class)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"{name}: its field {error.full_key} can't be a setting: {reason}. Annotate it with int, float, bool, str, "
            f"an Enum, or lists and dictionaries of these (trainer.{error.full_key})."
        ) from error


def _where_held_out(value: Any, *, _root_: DictConfig) -> Any:
    """`${where_held_out:x}`: x if the chosen data holds something out, else null."""
    data = _root_.data
    parts = data.get("sources", {}).values() if "sources" in data else [data]
    keys = ("validation", "validation_path", "validation_paths", "validation_files", "validation_split")
    return value if any(part.get(key) for part in parts for key in keys) else None


def strategy_names() -> list[str]:
    """Every strategy by its word, those of other packages among them."""
    ours = {path.stem for path in (CONF / "strategy").glob("*.yaml")} - CHOOSERS
    return sorted({*ours, *strategies.from_other_packages()})


def with_config(task: Callable[[DictConfig, dict[str, str]], None]) -> None:
    """Compose the configuration from the command line and hand it to `task`, with the chosen options by group.

    Raises:
        ConfigError: an unknown key, a wrong type, an unknown choice: one line that names the nearest.
    """
    words = sys.argv[1:]
    plain = not any(word.startswith("-") or word.lstrip("+~").startswith("hydra") for word in words)
    # Hydra's own way in composes everything twice; only its flags and settings need it.
    for config, choices in [_opening_dicts(words, _composed)] if plain else _composed_by_hydra():
        refuse_wrong(config)
        task(config, choices)


def _composed(words: list[str], root: str = "config") -> tuple[DictConfig, dict[str, str]]:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose(root, overrides=words, return_hydra_config=True)
    choices = _choices(config.hydra)
    with open_dict(config):
        del config["hydra"]
    return config, choices


def _composed_by_hydra() -> list[tuple[DictConfig, dict[str, str]]]:
    """Several for a sweep; none where a flag only asks."""
    from hydra.core.hydra_config import HydraConfig

    found: list[tuple[DictConfig, dict[str, str]]] = []  # run outside of Hydra, which would add to our errors

    def main(config: DictConfig) -> None:
        found.append((config, _choices(HydraConfig.get())))

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
    return found


def _choices(hydra_config: Any) -> dict[str, str]:
    """Group -> option, as composed."""
    return {key: str(value) for key, value in hydra_config.runtime.choices.items() if "/" not in key}


def compose(overrides: Sequence[str], trainer_class: type[Trainer] = Trainer) -> DictConfig:
    """The configuration for `overrides`, without a command line; for notebooks and tests.

    Raises:
        ConfigError: as the command line would.
    """
    return composed(overrides, trainer_class)[0]


def composed(overrides: Sequence[str], trainer_class: type[Trainer] = Trainer) -> tuple[DictConfig, dict[str, str]]:
    """The same, and the option chosen in each group."""
    register_schemas(trainer_class)
    config, choices = _opening_dicts(overrides, _composed)
    refuse_wrong(config)
    return config, choices


def compose_launcher(overrides: Sequence[str]) -> Launcher:
    """The launcher that `launcher=...` and `launcher.key=value` describe.

    Raises:
        ConfigError: an unknown key, a wrong type, an unknown choice, a value that doesn't fit.
    """
    for cls in launch.SCHEMAS:
        ConfigStore.instance().store(group="schema", name=cls.__name__, node=cls)
    config, _ = _opening_dicts(overrides, lambda words: _composed(words, "launch"))
    refuse_wrong(config)
    return cast(Launcher, made(config.launcher))


def settings_of(group: str, overrides: Sequence[str]) -> dict[str, Any]:
    """A group's settings as the overrides leave them, whole or not: `???` stands where one has to be given."""
    config, _ = _opening_dicts(overrides, _composed)
    found = OmegaConf.to_container(config[group], enum_to_str=True)
    return {str(key): value for key, value in cast(dict[Any, Any], found).items()}


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
    # Elsewhere an experiment is added, here it is a group like the others: either way will do.
    optional = tuple(f"+{group}=" for group in OPTIONAL)
    words = [word.removeprefix("+") if word.startswith(optional) else word for word in overrides]
    # Hydra has no null on a command line.
    words = [f"~{word.removesuffix('=null')}" if word in ("profiler=null", "cluster=null") else word for word in words]
    for _ in range(len(words) + 1):
        try:
            return compose_with(words)
        except (HydraException, OmegaConfBaseException, OSError, ValueError, TypeError) as error:  # Hydra's slips too
            key = _missing_in_dict(error)
            at = [index for index, word in enumerate(words) if key is not None and _gives(word, key)]
            if not at:
                raise explained(error, words) from error
            words[at[0]] = f"++{words[at[0]]}"
    raise AssertionError("each turn opens one key")


def _gives(word: str, key: str) -> bool:
    """Whether an override sets the key, something in it, or a dictionary that it is in."""
    name, _, value = word.partition("=")
    return name == key or name.startswith(f"{key}.") or (value.startswith("{") and key.startswith(f"{name}."))


def _missing_in_dict(error: BaseException | None) -> str | None:
    """The key that is missing in a dictionary without schema, if that is what `error` says."""
    while error is not None and not isinstance(error, OmegaConfBaseException):
        error = error.__cause__
    if error is None or not isinstance(error.parent_node, DictConfig) or not str(error).startswith("Key "):
        return None
    free = not dataclasses.is_dataclass(OmegaConf.get_type(error.parent_node))
    return str(error.full_key) if free else None


def resolved(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain values, to be kept with a run; secrets are still in it."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, enum_to_str=True))


def made(node: DictConfig) -> Any:
    """The object whose schema `node` has; its own checks run here. No other way leads from configuration to objects."""
    try:
        return OmegaConf.to_object(node)
    except OmegaConfBaseException as error:  # such as a class that can't be made from its fields
        raise explained(error) from error


def each_of(group: str) -> dict[str, Any]:
    """Choice -> its object, for all choices of a group that need no further setting; schemas are registered."""
    found = {}
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        for name in options(group):
            with contextlib.suppress(ConfigError, HydraException, OmegaConfBaseException):
                found[name] = made(hydra.compose(f"{group}/{name}")[group])
    return {name: it for name, it in found.items() if not isinstance(it, Auto)}


def option(group: str, name: str) -> DictConfig:
    """What a choice of a group stands for, with its schema."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return cast(DictConfig, hydra.compose(f"{group}/{name}")[group])


def restored(cls: type[T], stored: dict[str, Any]) -> T:
    """An object of `cls` from a configuration that was stored with a run; unknown keys are refused.

    Raises:
        ConfigError: it isn't a configuration of `cls`.
    """
    try:
        return cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), stored)))
    except OmegaConfBaseException as error:
        raise explained(error) from error


def refuse_wrong(config: DictConfig) -> None:
    """Refuse what a composed configuration can hold in spite of its schemas.

    Keys that `+key=value` has added to a class that doesn't know them, values left open, parts that no class stands
    behind (`~optimizer`, `+hooks.mine.x=3`), and values of the root that are out of range.

    Raises:
        ConfigError: names the key.
    """
    try:
        refuse_unknown(config)
        OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:  # `${...}` that leads nowhere, or to a value of another type
        raise explained(error) from error
    if OmegaConf.get_type(config) is Config:
        _refuse_without_class(config)
        _refuse_out_of_range(config)


def _refuse_without_class(config: DictConfig) -> None:
    for item in dataclasses.fields(Config):
        if item.name not in config:
            raise ConfigError(f"Configuration: {item.name} was taken away and is needed. Leave it in ({item.name}).")
        value = config[item.name]
        if not _has_class(value) and (item.type == "Any" or (item.type == "Any | None" and value is not None)):
            known = ", ".join(options(item.name))
            raise ConfigError(
                f"Configuration: nothing is chosen for {item.name}. Choose one: {item.name}=... of {known} "
                f"({item.name})"
            )
    for group in SEVERAL:
        for name in map(str, config[group]):
            if not _has_class(config[group][name]):
                raise ConfigError(
                    f"Configuration: {group}.{name} has keys, and {name} isn't chosen. "
                    f"{nearest(name, options(group))} Choose it with {group}=[{name}] ({group})"
                )


def _has_class(value: Any) -> bool:
    return isinstance(value, DictConfig) and dataclasses.is_dataclass(OmegaConf.get_type(value))


def _refuse_out_of_range(config: DictConfig) -> None:
    if not 0 <= config.seed < _SEEDS:
        raise ConfigError(f"Configuration: seed={config.seed} is not in 0 to {_SEEDS - 1}. Try 0 (seed).")
    for key, example in (("cache", "~/.cache/shardwright"), ("resume", "auto, never, or a checkpoint's folder")):
        if not config[key].strip():
            raise ConfigError(f"Configuration: {key} is empty. Give {example} ({key}).")
