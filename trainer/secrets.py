"""Tokens and passwords stay out of everything that a run writes: found by the names of their keys and variables."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_SECRET = re.compile(
    r"(token|secret|password|passwd|passphrase|(api|access|private|secret)_?key(_?id)?|credential)s?$", re.IGNORECASE
)
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_SHORTEST = 6
"""A shorter value isn't looked for in texts: it would be found in words that mean something else."""
_HIDDEN = "***"

_learned: set[str] = set()


def redacted(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the values of secret-sounding keys replaced."""

    def clean(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {inner: clean(str(inner), item) for inner, item in value.items()}
        if isinstance(value, list):
            return [clean(key, item) for item in value]
        if not isinstance(value, str):
            return value
        return _HIDDEN if _SECRET.search(key) else hidden(value)

    return {key: clean(key, value) for key, value in config.items()}


def redacted_words(words: Sequence[str]) -> list[str]:
    """A command line with the values of secret-sounding keys replaced, also those inside of `{...}`."""

    def clean(match: re.Match[str]) -> str:
        key, between, value = match.groups()
        return f"{key}{between}{_HIDDEN}" if _SECRET.search(key) and not value.isdecimal() else match.group()

    return [hidden(re.sub(r"([\w.-]+)([=:]\s*)([^,{}\s]+)", clean, word)) for word in words]


def learn(config: Mapping[str, Any]) -> None:
    """Remember the secrets of a configuration, for `hidden` in this process."""
    _learned.update(_values(config))


def hidden(text: str) -> str:
    """`text` without the secrets of configurations and environment, wherever in it they are."""
    known = _learned | {value for name, value in os.environ.items() if _names_secret(name)}
    for value in sorted(known, key=len, reverse=True):
        if len(value) >= _SHORTEST:
            text = text.replace(value, _HIDDEN)
    return _IN_ADDRESS.sub(_HIDDEN, text)


@functools.lru_cache(maxsize=10_000)
def _names_secret(name: str) -> bool:
    return _SECRET.search(name) is not None


class HidingFormatter(logging.Formatter):
    """Writes no secret, also none of a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        return hidden(super().format(record))


def _values(tree: Any, key: str = "") -> Iterator[str]:
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _values(value, str(name))
    elif isinstance(tree, list):
        for value in tree:
            yield from _values(value, key)
    elif isinstance(tree, str):
        for found in [tree] if _SECRET.search(key) else _IN_ADDRESS.findall(tree):
            yield from (found, found.rpartition(":")[2])  # of an address: with and without the name
