"""Hydra's and OmegaConf's complaints, each as one line that says what to do."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from strategies.errors import ConfigError, nearest

CONF = Path(__file__).resolve().parent.parent / "conf"
SEVERAL = ("logger", "hooks")
"""Groups of which any number may be chosen, by name."""
OPTIONAL = ("cluster", "experiment", "profiler")
"""Groups of which none has to be chosen."""


def explained(error: Exception, words: Sequence[str] = ()) -> ConfigError:
    """One line for what Hydra or OmegaConf says in several.

    Args:
        error: what they raised.
        words: the overrides that it was raised for.
    """
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
        near = nearest(option, options(group))
        return ConfigError(f"Configuration: {group}={option} is not a choice. {near} ({group or option})")
    if isinstance(error, OverrideParseException):
        return ConfigError(
            f"Configuration: can't read the argument {error.override!r}. Write key=value; around a value with special "
            "characters put quotes that the shell leaves alone, as in \"run.dir='a b'\"."
        )
    return _explained_choice(words) or ConfigError(f"Configuration: {' '.join(text.split())}")


def _explained_choice(words: Sequence[str]) -> ConfigError | None:
    """A group for which something else than its options was given, if one of `words` does that."""
    for word in words:
        key, sign, value = word.lstrip("+~").partition("=")
        group = key.partition("@")[0]
        if not sign or not group:
            return ConfigError(f"Configuration: the argument {word!r} names no key. Write key=value.")
        if "," in value and not re.match(r"['\"\[{]", value):
            fixes = f"{key}=[{value}] for a list, or {key}=\"'{value}'\" for a text with commas"
            fixes += "; shardwright launch --multirun runs a job with each"
            return ConfigError(f"Configuration: {word!r} gives several values. Write {fixes} ({key}).")
        named = re.fullmatch(r"\[(.*)\]", value) if group in SEVERAL else re.fullmatch(r"['\"]?(.*?)['\"]?", value)
        names = re.findall(r"[^\s,'\"]+", named.group(1)) if named else [""]
        known = [*options(group), "null"] if group in OPTIONAL else options(group)
        if known and (len(set(names)) < len(names) or not set(names) <= set(known)):
            how = f"{group}=[a,b], each once" if group in SEVERAL else f"{group}=a, one of them"
            return ConfigError(
                f"Configuration: {word[:100]} is not a choice. Write {how}. Choices: {', '.join(known)}. ({group})"
            )
    return None


def options(group: str) -> list[str]:
    """The choices of a group, those that code has registered among them."""
    found = {path.stem for path in (CONF / group).glob("*.yaml")}
    with contextlib.suppress(OSError):  # how Hydra says that code has registered none
        found |= {name.removesuffix(".yaml") for name in ConfigStore.instance().list(group)}
    return sorted(found)


def _explained_key(error: OmegaConfBaseException) -> ConfigError:
    key = str(error.full_key or error.key or "")
    parent = error.parent_node
    first = str(error).splitlines()[0]
    if re.match(r"Key '.*' (is )?not in", first) and isinstance(parent, DictConfig):
        known = [str(name) for name in parent]
        return ConfigError(f"Configuration: there is no key {key!r}. {nearest(key.rpartition('.')[2], known)} ({key})")
    return ConfigError(f"Configuration: {key}: {first.rstrip('.')}. Give another value ({key}).")


def refuse_unknown(config: DictConfig) -> None:
    """Refuse keys that the schemas don't know, single values where several are taken, and values left open.

    Raises:
        ConfigError: names the key.
        OmegaConfBaseException: a value can't be resolved.
    """
    for path, node in _typed_nodes(config, ""):
        known = [item.name for item in dataclasses.fields(cast(Any, OmegaConf.get_type(node)))]
        for key in map(str, node):
            full = f"{path}.{key}" if path else key
            if key not in known:
                raise ConfigError(f"Configuration: there is no key {full!r}. {nearest(key, known)} ({full})")
            several = isinstance(node._get_node(key), Container)
            if several and isinstance(one := OmegaConf.select(config, full), str | int | float):
                raise ConfigError(f"Configuration: {full} takes several values, not {one!r} alone ({full}).")
    for key in sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(f"Configuration: {key} has no value. Give one: {key}=... ({key})")


def _typed_nodes(node: DictConfig, path: str) -> Iterable[tuple[str, DictConfig]]:
    cls = OmegaConf.get_type(node)
    if dataclasses.is_dataclass(cls):
        yield path, node
    for key in map(str, node):
        value = node._get_node(key)
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_missing():
            yield from _typed_nodes(value, f"{path}.{key}" if path else key)
