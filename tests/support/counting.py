"""What a block of code starts, counted: operations, the bytes that they move, and reads by the host."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero")
# Names for the same memory, memory without contents, and what Python asks.
_NO_WORK = {
    *("aten::_unsafe_view", "aten::alias", "aten::detach", "aten::lift_fresh"),
    *("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided"),
    *("aten::_local_scalar_dense", "aten::promote_types"),
}


@contextlib.contextmanager
def counted_reads() -> Iterator[Counter[str]]:
    """Counts what would wait for a device: reads of tensor values by Python."""
    counts: Counter[str] = Counter()
    originals = {name: getattr(torch.Tensor, name) for name in _READS}

    def counting(name: str):
        def read(self, *args, **kwargs):
            counts[name] += 1
            return originals[name](self, *args, **kwargs)

        return read

    for name in _READS:
        setattr(torch.Tensor, name, counting(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(torch.Tensor, name, original)


class CountedOperations(TorchDispatchMode):
    """Counts the operations that a device would start; views are none, an operator of StepFlow's own is one.

    Attributes:
        counts: How often each operation was started.
        moved: Bytes of the tensors that they read and wrote.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name not in _NO_WORK and not func.is_view:
            self.counts[name] += 1
            leaves = tree_leaves((args, kwargs, result))
            tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}.values()
            self.moved += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result
