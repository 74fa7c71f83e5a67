"""Masks that are written out by rows, so that long traces need no mask of all queries and keys."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import sdpa_mask


class NotATensorError(AttributeError):
    """A model did something with a `RowMask` that it does with masks that are tensors."""


@dataclass(frozen=True, eq=False)
class RowMask:
    """A mask as the arguments that it is made from, so that no [q, K] tensor is ever held.

    It serves models that hand their masks to attention as they got them; others raise `NotATensorError`.
    """

    arguments: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        raise NotATensorError(f"a mask that is written out by rows has no {name!r}")

    def _refuse(self, *operands: Any) -> Any:
        raise NotATensorError("a mask that is written out by rows cannot be indexed or calculated with")

    __getitem__ = __invert__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __and__ = __rand__ = __or__ = __ror__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = _refuse

    @classmethod
    def make(cls, **arguments: Any) -> "RowMask | None":
        """The mask function of Transformers' mask interface: None where attention is plainly causal."""
        # Asked with a mask function of one element, sdpa_mask decides and writes nothing out.
        if sdpa_mask(**arguments | {"mask_function": _everything, "use_vmap": False}) is None:
            return None
        return cls(arguments | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    def rows(self, start: int, end: int) -> torch.Tensor:
        """Which keys queries [start, end) see, bool [B, 1, c, K]."""
        first = self.arguments.get("q_offset", 0) + start
        rows = sdpa_mask(**self.arguments | {"q_length": end - start, "q_offset": first})
        assert rows is not None
        return rows


def _everything(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=query.device)
