"""Muon, an optimizer for matrices, in float32 and with matrices of one shape batched.

torch.optim.Muon orthogonalises one matrix after another in bfloat16, which takes as long as the model itself on a
processor without bfloat16 units.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch

# Coefficients of the quintic iteration, which raise small singular values fast and leave all near one.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Brings the singular values of matrices [N, rows, columns] near one (Newton-Schulz iteration)."""
    tall = matrices.shape[1] > matrices.shape[2]
    now = matrices.mT if tall else matrices
    now = now / now.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    first, second, third = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        square = now @ now.mT
        now = first * now + (second * square + third * square @ square) @ now
    return now.mT if tall else now


class Muon(torch.optim.Optimizer):
    """SGD with momentum and orthogonalised steps, scaled by sqrt(max(1, rows / columns)) (Jordan et al. 2024).

    Args:
        matrices: The parameters, with two dimensions each.
        rate: The learning rate.
        momentum: The decay of the running mean of gradients (Nesterov's form).
        weight_decay: The decoupled weight decay, multiplied by the rate.
    """

    def __init__(
        self,
        matrices: Iterable[torch.nn.Parameter],
        rate: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ):
        super().__init__(matrices, {"lr": rate, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Takes one step along the gradients, which all parameters must have."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape].append(parameter)
            for (rows, columns), parameters in by_shape.items():
                directions = []
                for parameter in parameters:
                    state = self.state[parameter]
                    if not state:
                        state["momentum"] = torch.zeros_like(parameter)
                    state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                    directions.append(parameter.grad.lerp(state["momentum"], group["momentum"]))
                steps = orthogonalise(torch.stack(directions)) * max(1.0, rows / columns) ** 0.5
                for parameter, step in zip(parameters, steps, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(step, alpha=group["lr"])
