"""Writes `docs/planner-measured.md`: what the planner predicts of memory, beside what is measured on CPU.

    python -m tests.trainer.planner.measured

A few minutes on two cores. Needs DeepSpeed, Horovod and Accelerate for all rows; says which are left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from strategies.testing import Workers
from tests.trainer.planner.measured_peaks import CASES, SUBJECTS, peak
from tests.trainer.planner.measured_states import CHOICES, SIZES, chosen, states_of, why_not

PAGE = Path(__file__).parents[3] / "docs" / "planner-measured.md"
_KINDS = ("weights", "gradients", "moments", "nvme")
_LIBRARIES = ("torch", "transformers", "deepspeed", "horovod", "accelerate")
_HEAD = """# Memory: predicted and measured

Written by `python -m tests.trainer.planner.measured`. Of `tests/trainer/planner/`, `test_measured_states.py` holds the
first table to 2 %, and `test_measured_peaks.py` the second to 5 %. On CPU, with {versions}.

## Model states, MiB of the rank that holds most

Storages of weights, with masters and what stays gathered; of gradients, before the step; of moments, after it; and of
all of them, what lies in files. A model of 1.2 million parameters, in matrices that no number of ranks divides, with a
tied embedding and a frozen layer; fp32, AdamW. Four processes are two on each of two pretended machines.

| strategy | processes | weights | predicted | gradients | predicted | moments | predicted | on NVMe | predicted |
| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |"""
_PEAKS = """
## The highest moment of a step, MiB of rank 0

All that torch's CPU allocator has given out, where it is most in the fourth step (`[memory]` events of
torch.profiler), the model's weights included. The prediction is without the margin for fragmentation. Where there are
several ranks, the others are torch's fake process group.

| step | parameters, million | micro-batch | measured | predicted | difference |
| --- | --: | --: | --: | --: | --: |"""


def main() -> None:
    """Measure all, and write the page."""
    PAGE.write_text("\n".join([_HEAD.format(versions=", ".join(_versions())), *_states(), _PEAKS, *_peaks()]) + "\n")


def _states() -> Iterator[str]:
    left_out: dict[str, list[str]] = {}
    with contextlib.closing(Workers()) as workers:
        for choice in CHOICES:
            for size in SIZES:
                if reason := why_not(choice, size):
                    left_out.setdefault(reason, []).append(f"`{choice}` on {size}")
                    continue
                states, predicted = states_of(workers, chosen()[choice], size)
                pairs = ((getattr(states, kind), getattr(predicted, f"{kind}_bytes")) for kind in _KINDS)
                yield f"| {choice} | {size} | {' | '.join(_mib(amount, 3) for pair in pairs for amount in pair)} |"
    for reason, which in left_out.items():
        yield f"\nLeft out: {', '.join(which)}, which {reason}."


def _peaks() -> Iterator[str]:
    with contextlib.closing(Workers()) as workers:  # others: DeepSpeed leaves its own linear layer in a process
        for name, case in CASES.items():
            [found] = workers.run(peak, 1, case)
            yield (
                f"| {name} | {found.num_parameters / 1e6:.1f} | {SUBJECTS[case.subject].micro_batch} "
                f"| {_mib(found.measured, 1)} | {_mib(found.predicted, 1)} "
                f"| {100 * (found.predicted / found.measured - 1):+.1f} % |"
            )


def _mib(amount: int, digits: int) -> str:
    return f"{amount / 2**20:.{digits}f}"


def _versions() -> Iterator[str]:
    for library in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            yield f"{library} {version(library)}"


if __name__ == "__main__":
    main()
