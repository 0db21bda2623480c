"""A second device that is none, to find what would fail on a GPU.

Its tensors say `device='second:0'`. Their values lie in host memory and are computed there, so results must
be those of the CPU; but they refuse what a GPU's refuse: an operation with a tensor of the CPU (numbers
without a dimension and indices excepted), a generator of the CPU, and becoming a numpy array. Built with
torch's own means for backends in Python (`torch.utils.backend_registration`, `Library.fallback`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyDeviceGuard,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

NAME = "second"

_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_",
             "aten::_unsafe_index")  # fmt: skip
_LOWERED = ("linear", "conv1d", "conv_transpose1d", "matmul", "bmm", "addmm", "mm",
            "scaled_dot_product_attention")  # fmt: skip
"""What autocast computes in bf16, of what revox uses."""


class There(torch.Tensor):
    """A tensor on the second device; `held` has its values."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> There:
        # Not an inference tensor, which could have no views here.
        with torch.inference_mode(False), torch.no_grad():
            return torch.Tensor._make_wrapper_subclass(
                cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
                dtype=held.dtype, device=torch.device(NAME, 0),
            )  # fmt: skip

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl

    def new_tensor(self, data: Any) -> torch.Tensor:  # as `by_copy`
        return torch.tensor(data, dtype=self.dtype).to(self.device)

    def tolist(self) -> Any:
        return self.held.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied = There(self.held.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            return torch.nn.Parameter(copied, self.requires_grad)
        return copied.requires_grad_(self.requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)  # in a file it is a tensor like others

    def __repr__(self, **_: Any) -> str:
        return f"There({self.held})"

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(op, args, kwargs or {})


def _compute(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = op._schema.name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = any(isinstance(tensor, There) for tensor in tensors)
    asked = kwargs.get("device")
    goes = there if asked is None else torch.device(asked).type == NAME
    if there and name != "aten::copy_":
        _refuse_mixtures(name, args, tensors)
    if goes and any(isinstance(leaf, torch.Generator) for leaf in tree_leaves((args, kwargs))):
        raise RuntimeError(f"{name}: a generator of the CPU for tensors of another device")
    given = dict(kwargs) if asked is None else {**kwargs, "device": torch.device("cpu")}
    made = op(*tree_map(_held, args), **tree_map(_held, given))
    if not goes or name == "aten::_local_scalar_dense":
        return made
    changed = _changed(op, args, kwargs)
    if changed is None:
        return tree_map(_there, made)
    if torch.Tag.inplace_view in op.tags:
        _turn(op, args, kwargs)
    return changed


def _turn(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give the wrapper the sizes and strides that an operation in place gave its values (as
    `torch.utils._python_dispatch.return_and_correct_aliasing` does)."""
    before = torch._C._meta_in_tls_dispatch_include()
    with torch.utils._mode_utils.no_dispatch():
        torch._C._set_meta_in_tls_dispatch_include(True)
        try:
            op(*args, **kwargs)
        finally:
            torch._C._set_meta_in_tls_dispatch_include(before)


def _refuse_mixtures(name: str, args: tuple[Any, ...], tensors: list[torch.Tensor]) -> None:
    here = [tensor for tensor in tensors if not isinstance(tensor, There) and tensor.dim()]
    if name in _INDEXING and isinstance(args[0], There):
        here = [tensor for tensor in here if tensor.dtype not in (torch.int64, torch.int32, torch.bool)]
    if here:
        found = ", ".join(f"{list(tensor.shape)} on {tensor.device.type}" for tensor in tensors)
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {found}")


def _changed(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The argument that an operation in place gives back; None for others."""
    returns = op._schema.returns
    if len(returns) != 1 or returns[0].alias_info is None or not returns[0].alias_info.is_write:
        return None
    for i, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return args[i] if i < len(args) else kwargs[argument.name]
    return None


def _held(value: Any) -> Any:
    return value.held if isinstance(value, There) else value


def _there(value: Any) -> Any:
    return There(value) if isinstance(value, torch.Tensor) and not isinstance(value, There) else value


class _Module(_DummyBackendModule):
    """What `torch.second` is: never found by itself, and able to autocast."""

    def is_available(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class _Hook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False


_registered: list[torch.library.Library] = []


def register() -> None:
    """Make the device known to this process; once."""
    if _registered:
        return
    _setup_privateuseone_for_python_backend(NAME, _Module(), _Hook(), _DummyDeviceGuard())
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(lambda op, *args, **kwargs: _compute(op, args, kwargs), "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    lowered = torch.library.Library("aten", "IMPL")
    for name in _LOWERED:
        lowered.impl(name, _in_low_precision(getattr(torch.ops.aten, name).default), "AutocastPrivateUse1")
    _registered.extend((everything, lowered))


def _in_low_precision(op: Any) -> Callable[..., Any]:
    outside = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def low(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            return value.to(torch.get_autocast_dtype(NAME))
        return value

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(outside):
            return op(*tree_map(low, args), **tree_map(low, kwargs))

    return call


def by_copy(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.tensor` and `torch.as_tensor` fill a new tensor where no backend in Python can: copied there."""

    def call(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != NAME:
            return make(*args, device=device, **kwargs)
        return make(*args, device="cpu", **kwargs).to(device)

    return call


def loaded_there(load: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.load`, everything of a file going where `map_location` says, as with a GPU."""

    def call(*args: Any, map_location: Any = None, **kwargs: Any) -> Any:
        if map_location is None or torch.device(map_location).type != NAME:
            return load(*args, map_location=map_location, **kwargs)
        found = load(*args, map_location="cpu", **kwargs)
        return tree_map(lambda one: one.to(NAME) if isinstance(one, torch.Tensor) else one, found)

    return call
