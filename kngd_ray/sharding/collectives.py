"""The few collectives that the sharded filter needs, over torch.distributed or in one process."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Group(Protocol):
    """A set of ranks that advance together."""

    rank: int
    world_size: int

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, bitwise the same on every rank."""
        ...

    def gather_rows(self, local: Tensor, sizes: Sequence[int]) -> Tensor:
        """Concatenate the ranks' tensors along dimension 0; rank r brings sizes[r] rows."""
        ...

    def exchange_columns(self, rows: Tensor, row_sizes: Sequence[int], column_sizes: Sequence[int]) -> Tensor:
        """Give each rank its columns of everybody's rows.

        Args:
            rows: (row_sizes[rank], sum(column_sizes)) local rows.
            row_sizes: rows of each rank.
            column_sizes: columns that each rank is to receive.

        Returns:
            (sum(row_sizes), column_sizes[rank]) own columns of all rows, in rank order.
        """
        ...


class SingleProcess:
    """The group of one."""

    rank = 0
    world_size = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def gather_rows(self, local: Tensor, sizes: Sequence[int]) -> Tensor:
        """The tensor itself."""
        return local

    def exchange_columns(self, rows: Tensor, row_sizes: Sequence[int], column_sizes: Sequence[int]) -> Tensor:
        """The rows themselves."""
        return rows


class ProcessGroup:
    """The ranks of a torch.distributed process group (gloo or nccl).

    Args:
        group: the process group; None is the default group, which must be initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)

    def sum(self, tensor: Tensor) -> Tensor:
        """One all_reduce."""
        total = tensor.clone(memory_format=torch.contiguous_format)  # all_reduce writes into its argument
        dist.all_reduce(total, group=self._group)
        return total

    def gather_rows(self, local: Tensor, sizes: Sequence[int]) -> Tensor:
        """One all_gather of rows padded to the longest."""
        longest = max(sizes)
        padded = local.new_zeros(longest, *local.shape[1:])
        padded[: len(local)] = local
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded, group=self._group)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    def exchange_columns(self, rows: Tensor, row_sizes: Sequence[int], column_sizes: Sequence[int]) -> Tensor:
        """One all_to_all of uneven pieces."""
        own_columns = column_sizes[self.rank]
        outgoing = torch.cat([piece.reshape(-1) for piece in rows.split(list(column_sizes), 1)])
        incoming = rows.new_empty(sum(row_sizes) * own_columns)
        dist.all_to_all_single(
            incoming,
            outgoing,
            output_split_sizes=[size * own_columns for size in row_sizes],
            input_split_sizes=[len(rows) * size for size in column_sizes],
            group=self._group,
        )
        return incoming.view(sum(row_sizes), own_columns)
