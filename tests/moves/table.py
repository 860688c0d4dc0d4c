"""What was measured, as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tests.moves.controls import CONTROLS
from tests.moves.job import AFTER, BEFORE, KINDS, LLAMA_FP32
from tests.moves.plan import SIZES, Place
from tests.moves.runner import Result

_INTRODUCTION = """# From any strategy to any other

Written by `python -m tests.moves`; don't edit. Measured with {versions}.

A run is trained for {before} steps under one strategy, killed, and goes on under another one for {after}, often on
another number of ranks, from the same `run.dir`. It is held against the run that stayed where it was: losses and
evaluations (of the weights and of their average) may be {loss:.0e} apart; learning rate, tokens and position must be
equal, and so must be the samples of each step and their order; each step stands once in `metrics.jsonl`; the last
checkpoints must hold the same names. Every other checkpoint was saved in the background. The global batch stays, the
micro-batch is another one on each number of ranks, so accumulation changes with it. fp32, a small Llama on packed
documents. `strategy@ranks`; four ranks are on two (pretended) machines, so that hybrid sharding is 2 x 2 there.

The strategies are those that are registered; which numbers of ranks each of them takes is asked of itself.
Where the number of ranks stays, the run has dropout, and its random streams move too. On another number of ranks
dropout necessarily draws other numbers ([the rule](nothing-lost.md#random-streams)), and there is none.

Checkpoints that DeepSpeed or Accelerate wrote without us: [coming over](coming-over.md).
"""


def document(
    places: Sequence[Place],
    grid: Sequence[Result],
    kinds: Mapping[str, Sequence[Result]],
    controls: Mapping[str, Result],
    versions: str,
) -> str:
    """The page."""
    names = sorted({place.strategy for place in places})
    worst = max((result.loss for result in grid), default=0.0)
    summary = (
        f"**{len(grid)} moves between {len(names)} strategies: losses at most {worst:.1e} apart,\n"
        f"{sum(result.same_order for result in grid)} with the same samples in the same order, "
        f"{sum(bool(result.problems) for result in grid)} with a difference.**\n"
    )
    pairs = (
        "## Every pair\n\n"
        "Largest differences after the move. `tensors`: of the last checkpoints, L2 distance over L2 norm, all\n"
        "weights, all averages or all moments of a kind taken together, whichever is worst.\n\n"
    )
    parts = [
        _INTRODUCTION.format(versions=versions, before=BEFORE, after=AFTER, loss=LLAMA_FP32.loss),
        summary,
        _sizes(places, names),
        pairs + _table(grid),
        "## Other models and numbers\n\n" + "\n".join(_kind(name, results) for name, results in kinds.items()),
        _controls(controls),
    ]
    return "\n".join(parts)


def _sizes(places: Sequence[Place], names: Iterable[str]) -> str:
    rows = [
        [name, *("yes" if Place(strategy=name, size=size) in places else "refused" for size in SIZES)] for name in names
    ]
    return _lines(["ranks", *map(str, SIZES)], rows)


def _table(results: Sequence[Result]) -> str:
    rows = [
        [
            str(result.move.source),
            str(result.move.target),
            f"{result.loss:.1e}",
            f"{result.evaluation:.1e}",
            f"{result.norm:.1e}",
            f"{result.tensors:.1e}",
            "identical" if result.same_order else "DIFFERS",
            "; ".join(result.problems) or "-",
        ]
        for result in results
    ]
    return _lines(["from", "to", "loss", "evaluation", "gradient norm", "tensors", "order", "problems"], rows)


def _kind(name: str, results: Sequence[Result]) -> str:
    bound = KINDS[name].loss
    return f"### {name}\n\n{KINDS[name].what} Losses may be {bound:.0e} apart.\n\n{_table(results)}"


def _controls(controls: Mapping[str, Result]) -> str:
    rows = [
        [
            name,
            (CONTROLS[name].__doc__ or "").rstrip("."),
            f"{result.loss:.1e}",
            f"{result.evaluation:.1e}",
            "identical" if result.same_order else "differs",
            "yes" if result.problems else "NO",
        ]
        for name, result in controls.items()
    ]
    move = next(iter(controls.values())).move
    return (
        f"## What would be noticed\n\nThe same comparison for {move} with dropout, after something was taken "
        "out of the checkpoint on purpose.\n\n"
        + _lines(["lost", "that is", "loss", "evaluation", "order", "noticed"], rows)
    )


def _lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)) + "\n"
