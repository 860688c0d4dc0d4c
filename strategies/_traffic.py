"""In which messages tensors travel together: what predictions of several strategies share."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from strategies.base import Collective, ModelSpec, Plan

_COALESCED_BYTES = 250 << 20
"""Buffers that DistributedDataParallel copies travel in so much (`broadcast_bucket_size`)."""


def buckets(tensors: Sequence[Tensor], sizes: Sequence[int], limits: Sequence[int]) -> Iterator[list[Tensor]]:
    """Neighbours together until they reach the limit; the last of `limits` goes on for ever."""
    limit, further = limits[0], iter(limits[1:])
    bucket: list[Tensor] = []
    filled = 0
    for tensor, size in zip(tensors, sizes, strict=True):
        bucket.append(tensor)
        filled += size
        if filled >= limit:
            yield bucket
            bucket, filled, limit = [], 0, next(further, limit)
    if bucket:
        yield bucket


def coalesced(buffers: Sequence[Tensor], plan: Plan) -> Iterator[int]:
    """Bytes of the messages in which `buffers` travel: those of one dtype together."""
    by_dtype = sorted(buffers, key=lambda value: str(value.dtype))
    for _, group in itertools.groupby(by_dtype, key=lambda value: value.dtype):
        alike = list(group)
        for bucket in buckets(alike, [buffer_bytes(value, plan) for value in alike], [_COALESCED_BYTES]):
            yield sum(buffer_bytes(value, plan) for value in bucket)


def buffer_bytes(buffer: Tensor, plan: Plan) -> int:
    """Of a buffer as it is trained with: fractions in double where all is."""
    if buffer.is_floating_point() and plan.precision.master_dtype is torch.float64:
        return buffer.numel() * torch.float64.itemsize
    return buffer.nbytes


def statistics(model: ModelSpec, plan: Plan, size: int) -> Iterator[Collective]:
    """Rank 0's buffers of a model with batch norm, one by one before each micro-batch (`take_over`)."""
    for buffer in model.statistics():
        taken = buffer_bytes(buffer, plan)
        yield Collective(kind="broadcast", payload_bytes=taken, count=plan.accumulation, ranks=size, phase="forward")


def up_to(sizes: Iterable[int], limit: int) -> Iterator[list[int]]:
    """Neighbours together that aren't more than `limit`; what is larger, alone."""
    group: list[int] = []
    for size in sizes:
        if group and sum(group) + size > limit:
            yield group
            group = []
        group.append(size)
    if group:
        yield group
