"""A configuration as SageMaker's hyperparameters, and back.

SageMaker's own ways lose something on the way: the SDK's version 3 exports each hyperparameter as a shell variable, so
that a name with a dot ends the job; the toolkit writes values as Python would. So one is sent that holds everything,
in pieces that the service takes.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from strategies.errors import ConfigError

PIECE = "shardwright_"
"""Before the number of a piece."""
MOST_CHARACTERS = 2500
"""Of a value; the service's limit."""
MOST_PIECES = 90
"""Of the service's 100 hyperparameters, those that a toolkit needs left out."""
_NOT_OURS = re.compile(r"sagemaker_.*|_tuning_objective_metric")


def packed(overrides: Sequence[str]) -> dict[str, str]:
    """Hyperparameters that hold `overrides`, whatever characters are in them.

    Raises:
        ConfigError: they are too long.
    """
    text = base64.b64encode(json.dumps(list(overrides)).encode()).decode()
    pieces = [text[start : start + MOST_CHARACTERS] for start in range(0, len(text), MOST_CHARACTERS)]
    if len(pieces) > MOST_PIECES:
        raise ConfigError(
            f"launch: the settings take {len(text):,} characters, {MOST_PIECES * MOST_CHARACTERS:,} can be sent. "
            "Put what is long into a file of a channel (launcher.channels)."
        )
    return {f"{PIECE}{number}": piece for number, piece in enumerate(pieces)}


def overrides_of(hyperparameters: Mapping[str, Any]) -> list[str]:
    """What the hyperparameters of a job say, as `key=value` words.

    Those that `packed` made come first, so that what a tuning job sets beside them counts.

    Args:
        hyperparameters: names -> values of JSON; a value may also be a text that holds JSON.

    Raises:
        ConfigError: a piece is missing, or a name is no key.
    """
    names = [name for name in hyperparameters if not _NOT_OURS.fullmatch(name)]
    pieces = {name: str(hyperparameters[name]) for name in names if re.fullmatch(PIECE + r"\d+", name)}
    return [*_unpacked(pieces), *(_word(name, hyperparameters[name]) for name in names if name not in pieces)]


def _unpacked(pieces: Mapping[str, str]) -> list[str]:
    ordered = [f"{PIECE}{number}" for number in range(len(pieces))]
    try:
        text = "".join(pieces[name] for name in ordered)
        return [str(word) for word in json.loads(base64.b64decode(text, validate=True))] if text else []
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"SageMaker: the hyperparameters {', '.join(sorted(pieces))} don't hold a whole configuration. Send them "
            "as shardwright launch made them (hyperparameters)."
        ) from error


def _word(name: str, value: Any) -> str:
    if not re.fullmatch(r"[+~]{0,2}[A-Za-z_][\w/@-]*(\.[\w-]+)*", name):
        raise ConfigError(
            f"SageMaker: the hyperparameter {name!r} is no key. Name it like one, as in trainer.max_steps "
            "(hyperparameters)."
        )
    return f"{name}={written(value)}"


_PLAIN = re.compile(r"[\w./+-]+(:[\w./+-]+)*")


def written(value: Any) -> str:
    """A value of JSON in the grammar of Hydra's overrides.

    A text that holds a number, a truth value, null, a list or an object is taken for what it holds: the service knows
    texts only, and so do those who fill in its forms.
    """
    if isinstance(value, str):
        try:
            held = json.loads(value)
        except ValueError:
            return _text(value)
        return _text(value) if isinstance(held, float) and not -1e308 < held < 1e308 else _held(held, value)
    return _value(value)


def _held(held: Any, text: str) -> str:
    return _text(held) if isinstance(held, str) else text.strip() if isinstance(held, int | float) else _value(held)


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return "[" + ",".join(map(_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{_key(name)}:{_value(each)}" for name, each in value.items()) + "}"
    return _text(str(value))


def _key(name: str) -> str:
    escaped = re.sub(r"([\\()\[\]{}:=,\t ])", r"\\\1", name)
    if not name or re.search(r"[^\w/+.$%*@?|\\()\[\]{}:=,\t -]", name):
        raise ConfigError(
            f"SageMaker: the key {name!r} inside of a value can't be written as an override. Name it with letters, "
            "digits, blanks and - _ . / (hyperparameters)."
        )
    return escaped


def _text(text: str) -> str:
    """Without quotes where the words of a group and of a list need none: `ddp`, `[samples]`."""
    return text if _PLAIN.fullmatch(text) and text.lower() not in ("null", "true", "false") else _quoted(text)


def _quoted(text: str) -> str:
    # A backslash counts as one before a quote, or at the end, alone.
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return f"'{escaped}'"
