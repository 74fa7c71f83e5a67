"""Arms of a comparison: StepFlow settings, another method that spends tokens, or both at once."""

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from hf_stepflow.runtime.configuration_stepflow import StepFlowSettings
from hf_stepflow.runtime.errors import StepFlowConfigError, StepFlowInputError

# Wang et al., "Plan-and-Solve Prompting" (ACL 2023), section 2.1.
PLAN_AND_SOLVE = (
    "Let's first understand the problem and devise a plan to solve the problem. "
    "Then, let's carry out the plan and solve the problem step by step."
)


@dataclass(frozen=True)
class Arm:
    """One way to answer.

    Attributes:
        stepflow: False, or the settings that differ from the model's own.
        samples: answers drawn for one result; the one given most often counts (self-consistency).
        temperature: of these draws, where the run itself is greedy.
        min_steps: thinking may not end before so many steps (budget forcing).
        max_steps: thinking is ended after so many steps.
        length_factor: how many times the run's max_new_tokens this arm may use.
        instruction: what the user's message ends with, after a blank line.
    """

    stepflow: "dict[str, Any] | bool" = False
    samples: int = 1
    temperature: float = 0.7
    min_steps: int = 0
    max_steps: int | None = None
    length_factor: float = 1.0
    instruction: str | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "min_steps", "max_steps"):
            value = getattr(self, name)
            if type(value) is not int and not (name == "max_steps" and value is None):
                raise StepFlowConfigError(f"{name} of an arm must be a whole number, got {value!r}")
        for name in ("temperature", "length_factor"):
            if type(getattr(self, name)) not in (int, float):
                raise StepFlowConfigError(f"{name} of an arm must be a number, got {getattr(self, name)!r}")
        if self.samples < 1 or self.length_factor <= 0 or self.temperature <= 0:
            raise StepFlowConfigError(
                f"an arm needs samples >= 1, length_factor > 0 and temperature > 0, got {self.samples}, "
                f"{self.length_factor} and {self.temperature}"
            )
        if self.min_steps < 0 or (self.max_steps is not None and self.max_steps < max(self.min_steps, 1)):
            raise StepFlowConfigError(
                f"an arm needs 0 <= min_steps <= max_steps, got {self.min_steps} and {self.max_steps}"
            )
        if self.instruction is not None and (not isinstance(self.instruction, str) or not self.instruction.strip()):
            raise StepFlowConfigError(f"instruction of an arm must be a text or None, got {self.instruction!r}")
        if isinstance(self.stepflow, dict):
            StepFlowSettings().replace(**self.stepflow)  # raises for keys and values that no setting takes

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return asdict(self)

    @property
    def method(self) -> "Arm":
        """The same without StepFlow."""
        return replace(self, stepflow=False)


_KINDS: dict[str, dict[str, Any]] = {
    "base": {},
    "stepflow": {"stepflow": True},
    "self-consistency": {"samples": 8},
    "budget-forcing": {},
    "longer": {"length_factor": 2.0},
    "plan-and-solve": {"instruction": PLAN_AND_SOLVE},
}


def make_arms(arms: Any) -> dict[str, Arm]:
    """Arms by name, from what users write.

    Args:
        arms: {name: False | True | dict of StepFlow settings | Arm}. The first is what the others are held against.

    Raises:
        StepFlowInputError: no arms, or a value of another kind.
        StepFlowConfigError: settings that StepFlow does not take.
    """
    if not isinstance(arms, dict) or not arms:
        raise StepFlowInputError(
            f"arms must be a dict with at least one entry, got {arms!r}",
            hint='for instance {"base": False, "stepflow": {"tau_max": 0.15}}',
        )
    made = {}
    for name, value in arms.items():
        if isinstance(value, Arm):
            made[str(name)] = value
        elif isinstance(value, bool | dict):
            made[str(name)] = Arm(stepflow=value)
        else:
            raise StepFlowInputError(
                f"the arm {name!r} must be False, True, a dict of settings or an Arm, got {value!r}"
            )
    return made


def combine_arms(arms: Any, methods: Any) -> dict[str, Arm]:
    """The arms, and each of them with each method: so that a method stands alone and with StepFlow in one run.

    Args:
        arms: as for `make_arms`, with StepFlow or without, and no other method.
        methods: {name: Arm} without StepFlow.

    Returns:
        The arms, then for each method the arm without StepFlow under the method's name, and the others under
        "ARM + METHOD".

    Raises:
        StepFlowInputError: an arm that is a method already, a method that is none, or a name that comes twice.
    """
    made = make_arms(arms)
    for name, arm in made.items():
        if arm.method != Arm():
            raise StepFlowInputError(
                f"the arm {name!r} is a method already, and methods are combined with StepFlow only",
                hint="give it as a method, --with on the command line",
            )
    combined = dict(made)
    for name, method in make_arms(methods).items():
        if method != method.method or method == Arm():
            raise StepFlowInputError(
                f"the method {name!r} must spend tokens or ask otherwise, and leave StepFlow to the arms",
                hint="for instance self-consistency:samples=8, with stepflow:tau_max=0.15 as an arm",
            )
        for label, arm in made.items():
            both = name if arm == Arm() else f"{label} + {name}"
            if both in combined:
                raise StepFlowInputError(f"the arm {both!r} comes twice", hint="write LABEL=KIND to tell them apart")
            combined[both] = replace(method, stepflow=arm.stepflow)
    return combined


def parse_arm(text: str) -> tuple[str, Arm]:
    """An arm as the command line writes it: `[LABEL=]KIND[:KEY=VALUE,...]`.

    Kinds: `base`, `stepflow` (keys: any StepFlow setting), and the methods `self-consistency` (samples, temperature),
    `budget-forcing` (min_steps, max_steps), `longer` (length_factor), `plan-and-solve`, which take StepFlow settings
    as well.

    Raises:
        StepFlowInputError: another kind, or keys without values.
        StepFlowConfigError: settings that StepFlow does not take.
    """
    head, colon, rest = text.partition(":")
    label, equals, kind = head.partition("=")
    kind = kind if equals else label
    if kind not in _KINDS:
        raise StepFlowInputError(f"unknown kind of arm {kind!r} in {text!r}", hint=f"kinds: {', '.join(_KINDS)}")
    own = {field.name for field in fields(Arm)} - {"stepflow"}
    settings: dict[str, Any] = {}
    arguments = dict(_KINDS[kind])
    for key, value in read_pairs(rest) if colon else ():
        (arguments if key in own else settings)[key] = value
    if kind == "budget-forcing" and not arguments:
        raise StepFlowInputError(f"{text!r} names no budget", hint="write budget-forcing:min_steps=8 or max_steps=20")
    if settings:
        if kind == "base":
            raise StepFlowInputError(f"{text!r}: the base takes no settings", hint=f"write stepflow:{rest}")
        arguments["stepflow"] = settings
    try:
        return (label if equals else text), Arm(**arguments)
    except TypeError as error:
        raise StepFlowInputError(f"{text!r}: {error}") from error


def read_pairs(text: str) -> list[tuple[str, Any]]:
    """Settings as the command line writes them: `a=1,b=[2,3],c=top:0.25`.

    Values are JSON where they can be read as such, else texts.

    Raises:
        StepFlowInputError: keys without values.
    """
    pairs: list[tuple[str, Any]] = []
    parts: list[str] = []
    for part in text.split(","):  # a comma inside brackets belongs to its value
        inside = bool(parts) and parts[-1].count("[") + parts[-1].count("{") > parts[-1].count("]") + parts[-1].count(
            "}"
        )
        if inside:
            parts[-1] += "," + part
        else:
            parts.append(part)
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise StepFlowInputError(f"expected KEY=VALUE, got {part!r}", hint="for instance tau_max=0.15,alpha=0")
        try:
            read = json.loads(value)
        except json.JSONDecodeError:
            read = value
        pairs.append((key.strip(), read))
    return pairs
