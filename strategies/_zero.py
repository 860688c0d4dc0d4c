"""Where DeepSpeed keeps a model's numbers, by the model's own names.

Uses what DeepSpeed calls its own business, so its version is pinned; each use has a test that would fail.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from strategies._fragments import Fragment, FragmentedOptimizer
from strategies._torch import check_names, weights_by_name
from strategies.base import State
from strategies.world import World


class Partitions(ABC):
    """The numbers of an engine's model and optimizer. Whole tensors are equal on all ranks; methods that give or take
    them are collective.
    """

    def __init__(
        self, engine: Any, optimizer: FragmentedOptimizer, names: Mapping[int, str], world: World, mesh: Any
    ) -> None:
        """Find them.

        Args:
            engine: from `deepspeed.initialize`.
            optimizer: that it steps.
            names: id of a parameter -> its name in the bare model.
            world: the ranks.
            mesh: of all of them, over which state is cut by rows.
        """
        self._mesh = mesh
        self.zero: Any = engine.optimizer
        self._optimizer, self._world, self._ids = optimizer, world, names
        found, self.aliases = weights_by_name(engine.module)
        self.names = list(found)
        """Of parameters and persistent buffers, tied ones once."""
        live: dict[str, nn.Parameter] = dict(engine.module.named_parameters())
        self._parameters = {name: live[name] for name in self.names if name in live}
        self._buffers = {name: value for name, value in found.items() if name not in live}
        self.trained = {name: value for name, value in self._parameters.items() if value.requires_grad}
        optimizer.adopt([*self._flats()])
        self._group = {self._ids[id(value)]: index for index, group in enumerate(self._groups()) for value in group}
        self._pieces = {piece.name: piece for _, piece in optimizer.fragments()}

    # What the stages differ in.

    @abstractmethod
    def _groups(self) -> list[list[nn.Parameter]]:
        """Trained parameters by the optimizer's group."""

    @abstractmethod
    def _flats(self) -> Iterator[tuple[int, Tensor, list[Fragment]]]:
        """This rank's flat partitions, each with its group's index and its pieces."""

    @abstractmethod
    def _full_shape(self, name: str) -> torch.Size:
        """Of a parameter."""

    @abstractmethod
    def _frozen(self, name: str) -> Tensor:
        """A frozen parameter, whole."""

    @abstractmethod
    def _compute_with(self, name: str, full: Tensor) -> None:
        """A parameter as forward sees it."""

    def clear_gradients(self) -> None:
        """Before a step's first micro-batch."""

    def skip(self, unused: set[str]) -> None:
        """Before a step, in which these change nothing."""
        self._optimizer.unused = unused

    # State under canonical names.

    def weights(self) -> dict[str, Tensor]:
        """All weights, cut by rows: of trained ones what the optimizer steps, in its full precision."""
        return {name: self._cut(self._weight(name)) for name in self.names}

    def state(self) -> State:
        """Weights and moments, cut by rows; one is whole at a time."""
        optim = {key: self._cut(value) for key, value in self._moments()}
        return State(weights=self.weights(), optim=optim, aliases=self.aliases)

    def template(self) -> State:
        """The same in zeros."""
        return State(
            weights={
                name: self._cut(torch.zeros_like(self._shape(name), device=self._world.device)) for name in self.names
            },
            optim={key: self._cut(value) for name in self.trained for key, value in self._fresh(name).items()},
            aliases=self.aliases,
        )

    @torch.no_grad()
    def compute_with(self, weights: Mapping[str, Tensor]) -> None:
        """Show forward `weights`; the optimizer keeps what it has."""
        for name in self.names:
            self._show(name, _whole(weights[name]))

    @torch.no_grad()
    def load_state(self, state: State) -> None:
        """Go on from `state`.

        Raises:
            ConfigError: names or shapes aren't this model's.
        """
        check_names("weights", {name: self._shape(name) for name in self.names}, state.weights)
        slots = {name: self._fresh(name, "meta") for name in self.trained}
        check_names("optimizer moments", {k: v for each in slots.values() for k, v in each.items()}, state.optim)
        for name in self.names:
            full = _whole(state.weights[name])
            self._show(name, full)
            if (piece := self._pieces.get(name)) is not None:
                piece.value.copy_(full.flatten().narrow(0, piece.start, piece.value.numel()))
        for name, fresh in slots.items():
            full_slots = {key.removeprefix(f"{name}/"): _whole(state.optim[key]) for key in fresh}
            self._load_moments(name, full_slots)

    def full_state_dict(self) -> dict[str, Tensor]:
        """All weights whole, on rank 0."""
        full: dict[str, Tensor] = {}
        for name in self.names:
            value = self._weight(name)
            if self._world.rank == 0:
                full[name] = value.to("cpu", copy=True)
        return full | ({alias: full[name] for alias, name in self.aliases.items()} if full else {})

    def _shape(self, name: str) -> Tensor:
        """A tensor without storage, shaped and typed as a weight."""
        value = self._buffers.get(name)
        if value is not None:
            return torch.empty_like(value, device="meta")
        return torch.empty(self._full_shape(name), dtype=self._parameters[name].dtype, device="meta")

    def _weight(self, name: str) -> Tensor:
        if name in self._buffers:
            return self._buffers[name]
        if name not in self.trained:
            return self._frozen(name)
        piece = self._pieces.get(name)
        return self._gathered(name, None if piece is None else piece.value, torch.float32)

    def _show(self, name: str, full: Tensor) -> None:
        if name in self._buffers:
            self._buffers[name].copy_(full)
        else:
            self._compute_with(name, full)

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        """`<parameter>/<slot>` and the whole moment, one after the other."""
        mine = {
            f"{piece.name}/{slot}": value
            for group, piece in self._optimizer.fragments()
            for slot, value in self._optimizer.slots(piece, group).items()
        }
        wanted = {
            f"{name}/{slot}": (name, template)
            for name in self.trained
            for slot, template in self._optimizer.kinds(self._group[name]).items()
        }
        counts = [key for key, (_, template) in wanted.items() if template.ndim == 0]
        told = torch.tensor([float(mine[key]) if key in mine else 0.0 for key in counts], device=self._world.device)
        if counts and self._world.size > 1:
            dist.all_reduce(told, op=dist.ReduceOp.MAX)
        known = dict(zip(counts, told.tolist(), strict=True))
        for key, (name, template) in wanted.items():
            if key in known:
                yield key, torch.tensor(known[key], dtype=template.dtype)
            else:
                yield key, self._gathered(name, mine.get(key), template.dtype)

    def _fresh(self, name: str, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """`<parameter>/<slot>` -> zeros, whole."""
        shape, device = self._full_shape(name), self._world.device if device is None else device
        return {
            f"{name}/{slot}": torch.zeros(shape if template.ndim else (), dtype=template.dtype, device=device)
            for slot, template in self._optimizer.kinds(self._group[name]).items()
        }

    def _load_moments(self, name: str, slots: Mapping[str, Tensor]) -> None:
        piece = self._pieces.get(name)
        if piece is None:
            return
        group, length = self._group[name], piece.value.numel()
        mine = {
            slot: slots[slot].flatten().narrow(0, piece.start, length) if template.ndim else slots[slot]
            for slot, template in self._optimizer.kinds(group).items()
        }
        self._optimizer.put(piece, group, mine)

    def _cut(self, value: Tensor) -> Tensor:
        """Of a whole tensor, equal on all ranks: this rank's rows."""
        from torch.distributed.tensor import Shard, distribute_tensor

        if value.ndim == 0 or self._world.size == 1:
            return value
        return distribute_tensor(value.to(self._world.device), self._mesh, [Shard(0)], src_data_rank=None)

    def give_zeros(self, name: str) -> None:
        """A gradient for a parameter that this rank didn't use and another did."""
        value, shape = self.trained[name], self._full_shape(name)
        held, value.data = value.data, value.data.new_empty(shape)  # a gradient must have its parameter's shape
        value.grad = torch.zeros(shape, dtype=value.dtype, device=self._world.device)
        value.data = held

    def _gathered(self, name: str, piece: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The whole of what each rank has a piece of."""
        shape = self._full_shape(name)
        whole = torch.zeros(shape.numel(), dtype=dtype, device=self._world.device)
        if piece is not None:
            whole.narrow(0, self._pieces[name].start, piece.numel()).copy_(piece.detach())
        if self._world.size > 1:
            dist.all_reduce(whole)  # elsewhere it is zero
        return whole.view(shape)


class WholeWeights(Partitions):
    """Stages 1 and 2: weights whole on each rank, a partition of them as the optimizer's."""

    def _groups(self) -> list[list[nn.Parameter]]:
        groups: list[list[nn.Parameter]] = self.zero.bit16_groups
        return groups

    def _flats(self) -> Iterator[tuple[int, Tensor, list[Fragment]]]:
        zero, rank = self.zero, self._world.rank
        for index, flat in enumerate(zero.single_partition_of_fp32_groups):
            begin, length = rank * zero.partition_size[index], zero.partition_size[index]
            pieces = []
            parameters, offsets = zero.round_robin_bit16_groups[index], zero.round_robin_bit16_offsets[index]
            for parameter, offset in zip(parameters, offsets, strict=True):
                first, end = max(offset, begin), min(offset + parameter.numel(), begin + length)
                if first < end:
                    value = nn.Parameter(flat.detach().narrow(0, first - begin, end - first))
                    name = self._ids[id(parameter)]
                    pieces.append(Fragment(name=name, start=first - offset, offset=first - begin, value=value))
            yield index, flat, pieces

    def _full_shape(self, name: str) -> torch.Size:
        return self._parameters[name].shape

    def _frozen(self, name: str) -> Tensor:
        return self._parameters[name].detach()

    @torch.no_grad()
    def _compute_with(self, name: str, full: Tensor) -> None:
        self._parameters[name].copy_(full)


class CutWeights(Partitions):
    """Stage 3: each parameter cut into equal runs of its flattened numbers, the last one padded."""

    def _groups(self) -> list[list[nn.Parameter]]:
        groups: list[list[nn.Parameter]] = [[] for _ in self._optimizer.inner.param_groups]
        for number, parameters in enumerate(self.zero.fp16_groups):
            groups[self.zero.sub_group_to_group_id[number]] += parameters
        return groups

    def _flats(self) -> Iterator[tuple[int, Tensor, list[Fragment]]]:
        zero = self.zero
        for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
            pieces, offset = [], 0
            for parameter in zero.fp16_groups[number]:
                start, length = self._run(parameter)
                if length:
                    value = nn.Parameter(flat.detach().narrow(0, offset, length))
                    name = self._ids[id(parameter)]
                    pieces.append(Fragment(name=name, start=start, offset=offset, value=value))
                offset += parameter.partition_numel()
            yield zero.sub_group_to_group_id[number], flat, pieces

    def _run(self, parameter: Any) -> tuple[int, int]:
        """Where this rank's numbers of a parameter begin, and how many there are."""
        each = parameter.partition_numel()
        start = min(self._world.rank * each, parameter.ds_numel)
        return start, min(each, parameter.ds_numel - start)

    def _full_shape(self, name: str) -> torch.Size:
        parameter: Any = self._parameters[name]
        return torch.Size(parameter.ds_shape)

    def _frozen(self, name: str) -> Tensor:
        parameter: Any = self._parameters[name]
        start, length = self._run(parameter)
        whole = torch.zeros(parameter.ds_numel, dtype=parameter.dtype, device=self._world.device)
        whole.narrow(0, start, length).copy_(parameter.ds_tensor.detach().flatten().narrow(0, 0, length))
        if self._world.size > 1:
            dist.all_reduce(whole)
        return whole.view(self._full_shape(name))

    @torch.no_grad()
    def _compute_with(self, name: str, full: Tensor) -> None:
        parameter: Any = self._parameters[name]
        start, length = self._run(parameter)
        mine = full.flatten().narrow(0, start, length)
        parameter.ds_tensor.data.flatten().narrow(0, 0, length).copy_(mine)
        if parameter.data.numel() == parameter.ds_numel:  # it stays gathered
            parameter.data.copy_(full)
        parameter.ds_secondary_tensor = None  # of the old values

    def clear_gradients(self) -> None:
        # What a parameter that isn't used leaves behind would count as its gradient in the next step.
        self.zero.grad_partitions_flat_buffer.zero_()


def partitions_of(
    engine: Any, optimizer: FragmentedOptimizer, names: Mapping[int, str], world: World, mesh: Any
) -> Partitions:
    """Of whichever stage the engine has."""
    kind = CutWeights if engine.zero_optimization_stage() == 3 else WholeWeights
    return kind(engine, optimizer, names, world, mesh)


def _whole(value: Tensor) -> Tensor:
    """Gathered, if it is cut. Collective."""
    full: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full
