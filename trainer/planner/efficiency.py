"""How much of its datasheet a device reaches, from `efficiency.csv`; each row says where its numbers come from.

What each factor means, and how sure each is: docs/planner-factors.md. None is fitted to runs for which a prediction
is promised.
"""

from __future__ import annotations

import csv
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError, nearest

if TYPE_CHECKING:
    from strategies.precision import Numbers

EVERY_DEVICE = "*"
"""In the column `device`: rows for all of them."""
EVERY_NUMBERS = "any"
"""In the column `numbers`: rows for all formats."""

# What is found first in a device's name counts, so variants stand before the plain name.
_NAMES = (
    *((name, rf"\b{name}\b") for name in ("GB300", "B300", "GB200", "B200", "GH200", "H200 NVL", "H200")),
    *((name, rf"\b{name}\b") for name in ("H100 NVL", "H100 PCIe", "H100", "H800", "A100", "A800", "A40", "A30")),
    *((name, rf"\b{name}\b") for name in ("A10G", "A10", "A6000", "L40S", "L40", "L4")),
    ("V100", r"\bV100"),
    ("T4", r"\bT4\b"),
)

# Where a device's missing factors come from: the same chip, else the nearest of its generation, else of
# the one before. Followed until the last, and A100 and H100 have nearly all, so they end every chain.
_NEXT = {
    "GB300": "B300",
    "B300": "GB200",
    "GB200": "B200",
    "B200": "H200",
    "GH200": "H200",
    "H200 NVL": "H200",
    "H200": "H100",
    "H100 NVL": "H100",
    "H100 PCIe": "H100",
    "H800": "H100",
    "H100": "A100",
    "A800": "A100",
    "A30": "A100",
    "A40": "A6000",
    "A10G": "A6000",
    "A10": "A6000",
    "L40S": "L40",
    "L40": "A6000",
    "L4": "A6000",
    "A6000": "A100",
    "T4": "V100",
    "V100": "A100",
}

_INSTEAD = {  # of formats, in which order
    "bf16": ("fp16", "tf32"),
    "fp16": ("bf16", "tf32"),
    "tf32": ("bf16", "fp16"),
    "fp32": ("tf32", "bf16", "fp16"),
    "fp64": ("fp32", "tf32", "bf16", "fp16"),
}

_MAY_BE_ZERO = {"intra_latency_s", "inter_latency_s", "inter_step_s", "launch_s", "power"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of `efficiency.csv`."""

    device: str
    numbers: tuple[str, ...]
    factor: str
    value: float
    low: float | None
    high: float | None
    """The lowest and highest that a source shows; None: none is shown."""
    source: str
    note: str


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """The factors of one device in one number format; `with_factors` puts measured ones in their place."""

    device: str
    """As it was asked for."""
    numbers: str
    matmul: float
    """Large matrix products: of the dense peak."""
    attention_forward: float
    attention_backward: float
    """Fused attention (torch's SDPA, FlashAttention-2), causal, head size 128: of the dense peak. Half the
    products are counted where half of them are masked, and the backward as 2.5 forwards."""
    memory: float
    """Operators that only move bytes: of the memory's bandwidth."""
    in_step: float
    """Forward and backward passes: of the speed that their operators have one by one, each alone and many times."""
    fusion: float
    """Bytes that memory-bound operators move under torch.compile, of those they move without it."""
    overlap: float
    """How many times as long compute takes while a collective runs beside it."""
    intra_collective: float
    """All-gather and reduce-scatter within a node: bus bandwidth of NVLink's one direction."""
    intra_all_reduce: float
    """All-reduce within a node, the same; above 1 where the switch adds."""
    inter_collective: float
    """Collectives between nodes: bus bandwidth of all that a node's network carries one way."""
    intra_latency_s: float
    inter_latency_s: float
    """Of one call on few bytes, all ranks of one node or of two."""
    inter_step_s: float
    """Between nodes, a call on many bytes goes round a ring: this times (ranks - 1), besides its bytes."""
    launch_s: float
    """From one operator's start on the host to the next one's, without torch.compile."""
    power: float
    """Products go as fast as (limit / nominal) ** power under a lower power limit."""
    nominal_w: float | None
    """The power that the other factors were measured at; None: not known."""
    notes: tuple[str, ...] = ()
    """Which factors are another device's or format's, and what was changed since."""
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    ranges: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict, compare=False, repr=False)
    """The lowest and highest of each factor that a source shows."""

    @classmethod
    def factors(cls) -> tuple[str, ...]:
        """The names of all factors, for a table of what a prediction hangs on."""
        return tuple(item.name for item in fields(cls) if item.type == "float")

    def with_factors(self, **values: float) -> Efficiency:
        """These factors in place of the published ones: measured ones, or ones to try.

        Raises:
            ConfigError: there is no such factor, or it can't have that value.
        """
        for name, value in values.items():
            if name not in self.factors():
                raise ConfigError(
                    f"Efficiency: {name} is not a factor. {nearest(name, self.factors())} (efficiency.{name})."
                )
            if not math.isfinite(value) or value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
                raise ConfigError(
                    f"Efficiency: {name}={value} can't be. Try a positive number near "
                    f"{getattr(self, name):.3g} (efficiency.{name})."
                )
        if not values:
            return self
        changes: dict[str, Any] = {
            **values,
            "notes": (*self.notes, f"given: {', '.join(f'{name}={value:.4g}' for name, value in values.items())}"),
            "sources": {**self.sources, **dict.fromkeys(values, "given")},
            "ranges": {**self.ranges, **dict.fromkeys(values, (None, None))},
        }
        return replace(self, **changes)

    def at_power(self, watts: float) -> Efficiency:
        """The same under a power limit: products and attention slow down, memory and links don't.

        A limit above the nominal power changes nothing.

        Raises:
            ConfigError: `watts` is not positive, or this device's nominal power isn't known.
        """
        if not 0 < watts < math.inf:
            raise ConfigError(f"Efficiency: a power limit of {watts} W is none. Give watts above 0 (power_limit_w).")
        if self.nominal_w is None:
            raise ConfigError(
                f"Efficiency: the nominal power of {self.device!r} isn't known, so a limit of {watts:g} W says "
                "nothing. Leave it out (power_limit_w)."
            )
        if watts >= self.nominal_w:
            return replace(
                self, notes=(*self.notes, f"{watts:g} W is no limit: the nominal power is {self.nominal_w:g} W")
            )
        slower = (watts / self.nominal_w) ** self.power
        names = ("matmul", "attention_forward", "attention_backward")
        changes: dict[str, Any] = {name: getattr(self, name) * slower for name in names}
        note = f"{', '.join(names)}: {slower:.3f} of those at {self.nominal_w:g} W, for {watts:g} W"
        ranges = dict(self.ranges)
        for name in names:
            low, high = ranges.get(name, (None, None))
            ranges[name] = (None if low is None else low * slower, None if high is None else high * slower)
        return replace(self, **changes, nominal_w=watts, notes=(*self.notes, note), ranges=ranges)


@functools.cache
def rows() -> tuple[Row, ...]:
    """All rows, in the file's order."""
    with Path(__file__).with_name("efficiency.csv").open(newline="") as file:
        return tuple(
            Row(
                device=row["device"],
                numbers=tuple(row["numbers"].split()),
                factor=row["factor"],
                value=float(row["value"]),
                low=float(row["low"]) if row["low"] else None,
                high=float(row["high"]) if row["high"] else None,
                source=row["source"],
                note=row["note"],
            )
            for row in csv.DictReader(file)
        )


def efficiency_of(device: str, numbers: Numbers) -> Efficiency:
    """The factors of the device called `device`, as `torch.cuda.get_device_name` or a table of instances says it.

    What was not measured on it, or not in these `numbers`, is the nearest device's or format's: the same
    chip's, else its generation's, else the generation's before; a device nobody knows has A100's. `notes`
    says each of these.
    """
    known = next((name for name, pattern in _NAMES if re.search(pattern, device)), None)
    chain = _chain(known)
    shown = known or repr(device)
    found = {factor: _row(factor, chain, numbers.name) for factor in Efficiency.factors()}
    missing: dict[str, list[str]] = {}
    for factor, (row, format_) in found.items():
        if format_ != numbers.name:
            missing.setdefault(f"on {shown} in {numbers.name}, taken from {row.device} in {format_}", []).append(factor)
        elif row.device not in (known, EVERY_DEVICE):
            missing.setdefault(f"on {shown}, taken from {row.device}", []).append(factor)
    nominal = next((row.value for row in rows() if row.device == known and row.factor == "nominal_w"), None)
    return Efficiency(
        device=device,
        numbers=numbers.name,
        nominal_w=nominal,
        notes=tuple(f"{', '.join(factors)}: not measured {how}" for how, factors in missing.items()),
        sources={factor: row.source for factor, (row, _) in found.items()},
        ranges={factor: (row.low, row.high) for factor, (row, _) in found.items()},
        **{factor: row.value for factor, (row, _) in found.items()},
    )


def _chain(known: str | None) -> list[str]:
    """The devices to look at, one after the other."""
    chain = []
    while known is not None:
        chain.append(known)
        known = _NEXT.get(known)
    return [*chain, *(name for name in ("A100", "H100") if name not in chain), EVERY_DEVICE]


def _row(factor: str, chain: list[str], numbers: str) -> tuple[Row, str]:
    """The first device's row of that factor, and the format it is for, in the order of preference."""
    for device in chain:
        of_device = [row for row in rows() if row.device == device and row.factor == factor]
        for wanted in (numbers, *_INSTEAD[numbers]):
            for row in of_device:
                if row.numbers == (EVERY_NUMBERS,) or wanted in row.numbers:
                    return row, numbers if row.numbers == (EVERY_NUMBERS,) else wanted
    raise LookupError(f"efficiency.csv has no row of {factor}")
