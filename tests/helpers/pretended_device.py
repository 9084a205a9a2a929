"""A pretended accelerator: its tensors say that they are on a device of their own, and compute on the CPU.

What works on it works on a GPU, as far as placement goes. As CUDA does, it refuses operations on tensors of both
devices (scalars and indices of the CPU excepted), CPU generators and ``.numpy()``. Every read by the host, every copy
to the device and every operation that would launch a kernel is counted by the line of the package that asks for it ::

    with pretended_device() as machine:
        fit(task, device=machine.device)
        machine.counts.reads.total()

Collectives have to be pretended too: see :class:`DeviceGroup`.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from kngd_ray.sharding import Group

NAME = "npy"  # the one name that torch gives to a backend written in Python
REAL = os.environ.get("KNGD_TEST_DEVICE")
_PACKAGE = "/kngd_ray/"
_aten = torch.ops.aten

# operations that make another view of the same numbers, or of none: they launch nothing
_VIEWS = (
    "view",
    "transpose",
    "permute",
    "unsqueeze",
    "squeeze",
    "expand",
    "slice",
    "select",
    "detach",
    "alias",
    "aten.t.",
    "unfold",
    "diagonal.",
    "split",
    "as_strided",
    "unbind",
    "empty",
    "lift_fresh",
    "narrow",
    "_reshape_alias",
    "is_same_size",
    "sym_",
)
# operations whose sums CUDA adds up in any order, so that two runs differ
_UNORDERED = ("index_add", "scatter_add", "histc", "bincount")
# operations on CUDA that wait for the device, because the shape of what they give depends on numbers
_WAITING = ("nonzero", "unique", "masked_select", "repeat_interleave.Tensor", "bincount")


class DeviceError(RuntimeError):
    """The device refuses, as CUDA would."""


@dataclass
class Counts:
    """What was asked of the device, by the line of the package that asked.

    Attributes:
        reads: numbers that the host waited for: ``float(x)``, ``bool(x)``, ``x.cpu()``, shapes that depend on numbers.
        copies: tensors that went from the host to the device.
        kernels: operations that compute.
        unordered: operations that CUDA does not do in a fixed order.
    """

    reads: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    unordered: Counter[str] = field(default_factory=Counter)

    def since(self, before: "Counts") -> "Counts":
        """What was counted after an earlier copy of the same counts."""
        return Counts(
            self.reads - before.reads,
            self.copies - before.copies,
            self.kernels - before.kernels,
            self.unordered - before.unordered,
        )

    def copy(self) -> "Counts":
        """The counts as they are now."""
        return Counts(Counter(self.reads), Counter(self.copies), Counter(self.kernels), Counter(self.unordered))


@dataclass(frozen=True)
class _Kind:
    """What an operation does on CUDA, looked up once."""

    name: str
    computes: bool
    unordered: bool
    waits: bool
    aliases: bool


@cache
def _kind(func: Any) -> _Kind:
    name, schema = str(func), func._schema
    return _Kind(
        name,
        computes=not any(view in name for view in _VIEWS),
        unordered=any(f"aten.{op}" in name for op in _UNORDERED),
        waits=any(f"aten.{op}" in name for op in _WAITING),
        aliases=any(x.alias_info is not None for x in (*schema.arguments, *schema.returns)),
    )


class Machine(TorchDispatchMode):
    """The device, while it is plugged in: answers all operations of this thread.

    Attributes:
        device: what to ask tensors to move to.
        counts: what was asked of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device(NAME, 0)
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on the CPU what is asked of the device."""
        return self.run(func, args, kwargs or {})

    def owns(self, device: Any) -> bool:
        """Whether a `device=` argument means this one."""
        return device is not None and torch.device(device).type == NAME

    def given(self, numbers: Tensor) -> "DeviceTensor":
        """A tensor of the host as one of the device."""
        self.counts.copies[_line()] += 1
        return DeviceTensor(numbers, self)

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation.

        Args:
            func: of ``torch.ops``.
            args: of any devices.
            kwargs: likewise.

        Returns:
            What it gives, on the device that CUDA would have it on.

        Raises:
            DeviceError: the operation mixes devices.
        """
        tensors = list(_tensors((args, kwargs)))
        mine = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
        wanted = kwargs.get("device")
        stays = wanted is None or self.owns(wanted)
        kind = _kind(func)
        name = kind.name
        if func is _aten._local_scalar_dense.default:
            self.counts.reads[_line()] += mine
            return func(_inner(args[0]))
        if func is _aten.is_pinned.default:
            return False
        if func in (_aten._to_copy.default, _aten.copy_.default):
            self._count_copy(func, args, mine=mine, wanted=wanted)
        elif mine:
            self._check(name, args, tensors)
        if kwargs.get("generator") is not None and (mine or self.owns(wanted)):
            raise DeviceError(f"{name} with a CPU generator on the device, at {_line()}")
        on_device = (mine and stays) or self.owns(wanted)
        if on_device:
            self._count(kind)
        plain = {key: _mapped(_inner, value) for key, value in kwargs.items() if key != "pin_memory"}
        if self.owns(wanted):
            plain["device"] = torch.device("cpu")
        out = func(*_mapped(_inner, args), **plain)
        if func is _aten.copy_.default:
            return args[0]
        if not on_device:
            return out
        out = _mapped(lambda x: DeviceTensor(x, self) if isinstance(x, Tensor) else x, out)
        return return_and_correct_aliasing(func, args, kwargs, out) if mine and kind.aliases else out

    def _count(self, kind: "_Kind") -> None:
        if kind.computes:
            self.counts.kernels[_line()] += 1
        if kind.unordered:
            self.counts.unordered[f"{_line()} {kind.name}"] += 1
        if kind.waits:
            self.counts.reads[_line()] += 1

    def _count_copy(self, func: Any, args: Any, *, mine: bool, wanted: Any) -> None:
        if func is _aten.copy_.default:
            source, target = isinstance(args[1], DeviceTensor), isinstance(args[0], DeviceTensor)
        else:
            source = mine
            target = self.owns(wanted) or (mine and wanted is None)
        if source and not target:
            self.counts.reads[_line()] += 1
        if target and not source:
            self.counts.copies[_line()] += 1

    def _check(self, name: str, args: Any, tensors: Sequence[Tensor]) -> None:
        """Refuse tensors of both devices.

        Raises:
            DeviceError: there are some.
        """
        strangers = [tuple(x.shape) for x in tensors if not isinstance(x, DeviceTensor) and x.dim() > 0]
        if not strangers:
            return
        if name.startswith(("aten.index.Tensor", "aten.index_put")) and isinstance(args[0], DeviceTensor):
            self.counts.copies[_line()] += len(strangers)
            return
        raise DeviceError(f"{name}: expected all tensors on one device; of the CPU are {strangers}, at {_line()}")


class DeviceTensor(Tensor):
    """A tensor that says it is on the device, around one on the CPU.

    Args:
        inner: the numbers.
        machine: where it says it is.
    """

    inner: Tensor
    machine: Machine

    @staticmethod
    def __new__(cls, inner: Tensor, machine: Machine) -> "DeviceTensor":
        """A tensor of the same shape that has no storage of its own."""
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=machine.device,
            requires_grad=False,
        )

    def __init__(self, inner: Tensor, machine: Machine) -> None:
        self.inner = inner
        self.machine = machine

    def __repr__(self) -> str:
        """As of the CPU's."""
        return f"DeviceTensor({self.inner})"

    @property
    def data(self) -> Tensor:
        """What :meth:`torch.nn.Module.to` swaps."""
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: "DeviceTensor") -> None:
        self.inner = value.inner
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    def tolist(self) -> Any:
        """One read, of all numbers."""
        self.machine.counts.reads[_line()] += 1
        return self.inner.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        """Refused.

        Raises:
            TypeError: always, as CUDA's tensors do.
        """
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Where no machine is plugged in, as in the threads of autograd, that of a tensor answers."""
        machine = next(x.machine for x in _tensors((args, kwargs)) if isinstance(x, DeviceTensor))
        return machine.run(func, args, kwargs or {})


class DeviceGroup:
    """A group of ranks whose collectives take tensors of the device alone, as nccl does.

    Args:
        group: does the work, on the CPU.
        machine: the device.
    """

    def __init__(self, group: Group, machine: Machine) -> None:
        self._group = group
        self._machine = machine
        self.rank, self.world_size = group.rank, group.world_size

    @property
    def bytes_moved(self) -> int:
        """Of the group."""
        return self._group.bytes_moved

    def sum(self, tensor: Tensor) -> Tensor:
        """As of the group, on the device."""
        return DeviceTensor(self._group.sum(self._own(tensor)), self._machine)

    def gather_rows(self, local: Tensor, sizes: Sequence[int]) -> Tensor:
        """As of the group, on the device."""
        return DeviceTensor(self._group.gather_rows(self._own(local), sizes), self._machine)

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[int]) -> list[Tensor]:
        """As of the group, on the device."""
        found = self._group.exchange([self._own(message) for message in outgoing], incoming)
        return [DeviceTensor(message, self._machine) for message in found]

    def spread_slices(self, whole: Tensor, bounds: Sequence[int]) -> None:
        """As of the group, on the device."""
        self._group.spread_slices(self._own(whole), bounds)

    def _own(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DeviceTensor):
            raise DeviceError(f"a collective of the device was given a tensor of the CPU, at {_line()}")
        return tensor.inner.detach()


@contextmanager
def pretended_device() -> Iterator[Machine]:
    """A pretended accelerator, for as long as the context lasts.

    Yields:
        The device. Tensors that are left of it go on computing.
    """
    module = _backend()
    machine = Machine()
    with (
        machine,
        # the threads of autograd are started once, for the devices that there are at the first backward pass
        torch.autograd.set_multithreading_enabled(False),
        mock.patch.object(module, "plugged_in", True),
        mock.patch.object(torch, "tensor", _made(machine, torch.tensor)),
        mock.patch.object(torch, "as_tensor", _made(machine, torch.as_tensor)),
        mock.patch.object(Tensor, "new_tensor", _new(machine, torch.tensor, Tensor.new_tensor)),
    ):
        yield machine


@dataclass(frozen=True)
class RealDevice:
    """A device that torch itself has.

    Attributes:
        device: what to ask tensors to move to.
    """

    device: torch.device


@contextmanager
def device_to_test() -> Iterator[Machine | RealDevice]:
    """The device that ``KNGD_TEST_DEVICE`` names, or a pretended one.

    Yields:
        The device.
    """
    if REAL is not None:
        yield RealDevice(torch.device(REAL))
        return
    with pretended_device() as machine:
        yield machine


def _made(machine: Machine, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function like ``torch.tensor``, whose numbers reach the device by way of the host."""

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if isinstance(data, Tensor) or not machine.owns(device):
            return make(data, *args, **kwargs) if device is None else make(data, *args, device=device, **kwargs)
        return machine.given(make(data, *args, **kwargs))

    return made


def _new(machine: Machine, make: Callable[..., Tensor], plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``Tensor.new_tensor``, likewise."""

    def new(self: Tensor, data: Any, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
        if isinstance(self, DeviceTensor) and device is None:
            return machine.given(make(data, dtype=dtype or self.dtype))
        return plain(self, data, dtype=dtype, device=device, **kwargs)

    return new


class _Backend(_DummyBackendModule):  # type: ignore[misc]
    """What torch asks of a backend; there is a device only while one is plugged in."""

    plugged_in = False

    def is_available(self) -> bool:
        """Whether a device is there."""
        return self.plugged_in

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """What autocast may compute in."""
        return [torch.bfloat16, torch.float16]

    def is_autocast_enabled(self) -> bool:
        """Not unless it is asked for."""
        return False

    def _is_in_bad_fork(self) -> bool:
        """There is nothing to lose in a fork."""
        return False


@cache
def _backend() -> _Backend:
    """The backend, which a process registers once and cannot take back; without a device it has none to offer."""
    module = _Backend()
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    return module


def _tensors(x: Any) -> Iterator[Tensor]:
    """The tensors in arguments of an operation.

    Operations take lists, tuples and dictionaries alone. torch's own trees know many more kinds of containers, and
    looking for them takes longer than what is computed here.
    """
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for part in x:
            yield from _tensors(part)
    elif isinstance(x, dict):
        yield from _tensors(list(x.values()))


def _mapped(change: Callable[[Any], Any], x: Any) -> Any:
    """The same lists and tuples of what a function makes of their parts."""
    if isinstance(x, (list, tuple)):
        return type(x)([_mapped(change, part) for part in x])
    return change(x)


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, DeviceTensor) else x


def _line() -> str:
    """The line of the package that is being run, as ``module.py:number``."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if _PACKAGE in path and "/tests/" not in path and "/site-packages/" not in path:
            return f"{path.rpartition(_PACKAGE)[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
