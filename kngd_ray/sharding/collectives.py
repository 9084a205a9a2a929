"""The few collectives that the sharded filter needs, over torch.distributed or in one process."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Group(Protocol):
    """A set of ranks that advance together.

    Attributes:
        rank: this rank.
        world_size: number of ranks.
        bytes_moved: bytes that this rank has received from others; for a sum, as many as a ring moves.
    """

    rank: int
    world_size: int
    bytes_moved: int

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, bitwise the same on every rank."""
        ...

    def gather_rows(self, local: Tensor, sizes: Sequence[int]) -> Tensor:
        """Concatenate the ranks' tensors along dimension 0; rank r brings sizes[r] rows."""
        ...

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[int]) -> list[Tensor]:
        """Give each rank its own message.

        Args:
            outgoing: a flat message for each rank, of one dtype.
            incoming: numbers that each rank sends to this one.

        Returns:
            The flat messages from each rank.
        """
        ...

    def spread_slices(self, whole: Tensor, bounds: Sequence[int]) -> None:
        """Write each rank's slice [bounds[r], bounds[r + 1]) of a flat tensor into all others' tensors, in place."""
        ...


class SingleProcess:
    """The group of one."""

    rank = 0
    world_size = 1
    bytes_moved = 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def gather_rows(self, local: Tensor, sizes: Sequence[int]) -> Tensor:
        """The tensor itself."""
        return local

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[int]) -> list[Tensor]:
        """The message itself."""
        return list(outgoing)

    def spread_slices(self, whole: Tensor, bounds: Sequence[int]) -> None:
        """Nothing."""


class ProcessGroup:
    """The ranks of a torch.distributed process group (gloo or nccl).

    Args:
        group: the process group; None is the default group, which must be initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.bytes_moved = 0

    def sum(self, tensor: Tensor) -> Tensor:
        """One all_reduce."""
        total = tensor.clone(memory_format=torch.contiguous_format)  # all_reduce writes into its argument
        dist.all_reduce(total, group=self._group)
        self.bytes_moved += 2 * total.nbytes * (self.world_size - 1) // self.world_size
        return total

    def gather_rows(self, local: Tensor, sizes: Sequence[int]) -> Tensor:
        """One all_gather of rows padded to the longest."""
        longest = max(sizes)
        padded = local.new_zeros(longest, *local.shape[1:])
        padded[: len(local)] = local
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded, group=self._group)
        self.bytes_moved += padded.nbytes * (self.world_size - 1)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[int]) -> list[Tensor]:
        """One all_to_all of uneven messages."""
        sent = torch.cat(list(outgoing))
        received = sent.new_empty(sum(incoming))
        dist.all_to_all_single(
            received,
            sent,
            output_split_sizes=list(incoming),
            input_split_sizes=[len(message) for message in outgoing],
            group=self._group,
        )
        self.bytes_moved += (len(received) - incoming[self.rank]) * received.element_size()
        return list(received.split(list(incoming)))

    def spread_slices(self, whole: Tensor, bounds: Sequence[int]) -> None:
        """One broadcast from each rank that has a slice: an all_gather would need the whole tensor once more."""
        for rank in range(self.world_size):
            piece = whole[bounds[rank] : bounds[rank + 1]]
            if len(piece):
                dist.broadcast(piece, group=self._group, group_src=rank)
                self.bytes_moved += piece.nbytes * (rank != self.rank)
