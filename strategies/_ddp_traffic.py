"""What DistributedDataParallel sends in a step, once it has put its buckets together anew: from the third step on.

After torch 2.13: `compute_bucket_assignment_by_size`, `Reducer::rebuild_buckets` and `broadcast_coalesced` in C++,
`_BucketCapacityConfig` and `powerSGD_hook` in Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from strategies._traffic import buckets, coalesced
from strategies.base import Collective, ModelSpec, Plan, WorldSpec
from strategies.footprint import merged

_DEFAULT_MB = 25.0
_FIRST_BYTES = 1 << 20
"""Of the first bucket, where nobody gave a size."""
_LEAST_COMPRESSION = 2
"""PowerSGD leaves matrices alone that it would make less than this many times smaller."""


@dataclass(frozen=True, kw_only=True)
class Messages:
    """In what gradients and buffers travel."""

    bucket_mb: float | None = None
    """MiB of a bucket; None: torch's own sizes."""
    number_bytes: int | None = None
    """Of each number that travels; None: as it is kept."""
    powersgd_rank: int | None = None
    """Of the matrices that travel in place of gradients, once PowerSGD has begun with it; None: gradients travel."""
    find_unused: bool = False
    """Unused parameters are looked for."""
    buffers: bool | None = None
    """Rank 0's buffers are copied to all; None: those of batch norm."""

    def of_step(self, model: ModelSpec, world: WorldSpec, plan: Plan) -> tuple[Collective, ...]:
        """Those of one optimizer step."""
        key = ("ddp", self, world, plan.accumulation, plan.precision.master_dtype)
        return model.once(key, lambda: self._of_step(model, world, plan))

    def _of_step(self, model: ModelSpec, world: WorldSpec, plan: Plan) -> tuple[Collective, ...]:
        number = plan.precision.master_dtype.itemsize
        sent = [("all_reduce", size, "backward") for size in self._of_gradients(model, number)]
        if self.find_unused:  # which of them were used, as int32
            sent.append(("all_reduce", 4 * len(model.trained()), "backward"))
        if self.buffers is not False:
            buffers = model.statistics(always=self.buffers is True)
            sent += [("broadcast", size, "forward") for size in coalesced(buffers, plan)]
        return merged(
            Collective(kind=kind, payload_bytes=size, count=1, ranks=world.size, phase=phase)
            for kind, size, phase in sent
        )

    def _of_gradients(self, model: ModelSpec, number: int) -> Iterator[int]:
        cap = int((self.bucket_mb or _DEFAULT_MB) * 2**20)
        limits = [_FIRST_BYTES, cap] if self.bucket_mb is None else [cap]
        travels = self.number_bytes or number
        if model.outline is None:  # no tensors to end a bucket at
            for first in range(0, model.num_trainable * number, cap):
                yield min(cap, model.num_trainable * number - first) // number * travels
            return
        gradients: Sequence[Tensor] = model.trained()
        if self.find_unused:  # torch keeps the buckets of the start, which follow the model's own order
            gradients = [value for value in model.outline.parameters() if value.requires_grad]
        for bucket in buckets(gradients, [value.numel() * number for value in gradients], limits):
            if self.powersgd_rank is None:
                yield sum(value.numel() for value in bucket) * travels
            else:
                yield from (size * number for size in _compressed(bucket, self.powersgd_rank))


def _compressed(bucket: Iterable[Tensor], rank: int) -> tuple[int, int, int]:
    """Numbers that PowerSGD sends: gradients as they are, and both matrices."""
    plain = left = right = 0
    for value in bucket:
        rows = value.shape[0]
        columns = value.numel() // rows
        least = min(rows, columns, rank)
        if (rows + columns) * least * _LEAST_COMPRESSION < rows * columns:
            left, right = left + rows * least, right + columns * least
        else:
            plain += value.numel()
    return plain, left, right
