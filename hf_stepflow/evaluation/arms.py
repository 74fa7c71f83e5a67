"""The arms of a comparison: StepFlow settings, another method that spends tokens, both at once, or a rival."""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from hf_stepflow.runtime.errors import StepFlowConfigError, StepFlowInputError, shown
from hf_stepflow.runtime.settings import StepFlowSettings

from .rivals import RIVALS, Rival, make_rival, parameters_of

# Wang et al., "Plan-and-Solve Prompting" (ACL 2023), section 2.1.
PLAN_AND_SOLVE = (
    "Let's first understand the problem and devise a plan to solve the problem. "
    "Then, let's carry out the plan and solve the problem step by step."
)


@dataclass(frozen=True)
class Arm:
    """One way to answer.

    Attributes:
        stepflow: False, True for the model's own settings, or the settings that differ from these.
        samples: The number of responses that vote on one answer (self-consistency).
        temperature: The temperature of these responses in a run that is otherwise greedy.
        min_steps: The number of steps before which thinking may not end (budget forcing).
        max_steps: The number of steps after which thinking is ended; None for no limit.
        length_factor: The factor on the run's `max_new_tokens`.
        instruction: A text that ends the user's message, after a blank line.
        rival: Another method that steers attention, without StepFlow: a key of `RIVALS`, or None.
        rival_parameters: The parameters of this method; those that are missing are filled in with their defaults.

    Example:
        >>> from hf_stepflow import Arm
        >>> Arm(stepflow={"tau_max": 0.15}, samples=8).method == Arm(samples=8)
        True
    """

    stepflow: "dict[str, Any] | bool" = False
    samples: int = 1
    temperature: float = 0.7
    min_steps: int = 0
    max_steps: int | None = None
    length_factor: float = 1.0
    instruction: str | None = None
    rival: str | None = None
    rival_parameters: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        whole, real = ("a whole number", (int,)), ("a number", (int, float))
        expected = {"samples": whole, "min_steps": whole, "temperature": real, "length_factor": real}
        for name, (kind, types) in (expected if self.max_steps is None else expected | {"max_steps": whole}).items():
            if type(getattr(self, name)) not in types:
                raise StepFlowConfigError(f"{name} of an arm must be {kind}, got {getattr(self, name)!r}")
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
            StepFlowSettings().replace(**self.stepflow)  # raises for unknown keys and bad values
        steering = self.steering
        if steering is not None and self.stepflow is not False:
            raise StepFlowConfigError(
                f"{self.rival} and StepFlow both change attention, so an arm has one of them",
                hint="give each an arm of its own",
            )
        if steering is None and self.rival_parameters:
            raise StepFlowConfigError(
                f"an arm without a rival takes no rival_parameters, got {shown(self.rival_parameters)}",
                hint=f"name the rival: {', '.join(RIVALS)}",
            )
        object.__setattr__(self, "rival_parameters", {} if steering is None else parameters_of(steering))

    @property
    def steering(self) -> Rival | None:
        """The rival with its parameters, if the arm has one.

        Raises:
            StepFlowConfigError: The rival or a parameter is unknown, or a value is out of range.
        """
        return None if self.rival is None else make_rival(self.rival, self.rival_parameters)

    def to_dict(self) -> dict[str, Any]:
        """The arm as JSON-ready data; without a rival, as in results files from before there were any."""
        data = asdict(self)
        if self.rival is None:
            del data["rival"], data["rival_parameters"]
        return data

    @property
    def method(self) -> "Arm":
        """The same arm without StepFlow and without a rival: how it spends tokens and what it asks."""
        return replace(self, stepflow=False, rival=None, rival_parameters={})


_KINDS: dict[str, dict[str, Any]] = {
    "base": {},
    "stepflow": {"stepflow": True},
    "self-consistency": {"samples": 8},
    "budget-forcing": {},
    "longer": {"length_factor": 2.0},
    "plan-and-solve": {"instruction": PLAN_AND_SOLVE},
    "length-temperature": {"stepflow": {"tau_max": 0, "alpha": 0, "length_temperature": 1}},
    **{kind: {"rival": kind} for kind in RIVALS},
}


def make_arms(arms: Any) -> dict[str, Arm]:
    """Makes arms from shorthand.

    Args:
        arms: {name: False | True | dict of StepFlow settings | Arm}. The first is the reference of the comparison.

    Raises:
        StepFlowInputError: There are no arms, or one is of the wrong type.
        StepFlowConfigError: StepFlow does not take the settings.
    """
    if not isinstance(arms, dict) or not arms:
        raise StepFlowInputError(
            f"arms must be a dict with at least one entry, got {arms!r}",
            hint='for instance {"base": False, "stepflow": {"tau_max": 0.15}}',
        )
    for name, value in arms.items():
        if not isinstance(value, Arm | bool | dict):
            raise StepFlowInputError(
                f"the arm {name!r} must be False, True, a dict of settings or an Arm, got {value!r}"
            )
    return {str(name): value if isinstance(value, Arm) else Arm(stepflow=value) for name, value in arms.items()}


def combine_arms(arms: Any, methods: Any) -> dict[str, Arm]:
    """Adds every method to every arm, so that one run shows a method alone and together with StepFlow or a rival.

    Args:
        arms: Arms as for `make_arms`, with StepFlow, a rival or neither, and without another method.
        methods: {name: Arm}, without StepFlow and without a rival.

    Returns:
        The arms; then, for each method, the arm with neither under the method's name, and the others under
        "ARM + METHOD".

    Raises:
        StepFlowInputError: An arm has a method, a method has StepFlow or a rival or is none, or a name comes twice.

    Example:
        >>> from hf_stepflow import Arm, combine_arms
        >>> list(combine_arms({"base": False, "stepflow": True}, {"vote": Arm(samples=8)}))
        ['base', 'stepflow', 'vote', 'stepflow + vote']
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
        if method.rival is not None:
            raise StepFlowInputError(
                f"the method {name!r} steers attention, and is combined with other methods as StepFlow is",
                hint="give it as an arm, --arm on the command line",
            )
        if method != method.method or method == Arm():
            raise StepFlowInputError(
                f"the method {name!r} must spend tokens or change the prompt, and leave StepFlow to the arms",
                hint="for instance self-consistency:samples=8, with stepflow:tau_max=0.15 as an arm",
            )
        for label, arm in made.items():
            both = name if arm == Arm() else f"{label} + {name}"
            if both in combined:
                raise StepFlowInputError(f"the arm {both!r} comes twice", hint="write LABEL=KIND to tell them apart")
            combined[both] = replace(
                method, stepflow=arm.stepflow, rival=arm.rival, rival_parameters=arm.rival_parameters
            )
    return combined


def parse_arm(text: str) -> tuple[str, Arm]:
    """Reads an arm from its form on the command line, `[LABEL=]KIND[:KEY=VALUE,...]`.

    The kinds are `base`; `stepflow` (any StepFlow setting); `length-temperature` (length_temperature_base and any
    StepFlow setting), which is the length temperature alone, with the exponent 1; the methods `self-consistency`
    (samples, temperature), `budget-forcing` (min_steps, max_steps), `longer` (length_factor) and `plan-and-solve`,
    which also take StepFlow settings; and the rivals `pasta` (alpha, heads), `spotlight` (target) and `instaboost`
    (factor), which do not.

    Returns:
        The label, or the whole text if it has none, and the arm.

    Raises:
        StepFlowInputError: The kind is unknown, or a key has no value.
        StepFlowConfigError: StepFlow does not take the settings.
    """
    head, colon, rest = text.partition(":")
    label, equals, kind = head.partition("=")
    kind = kind if equals else label
    if kind not in _KINDS:
        raise StepFlowInputError(f"unknown kind of arm {kind!r} in {text!r}", hint=f"kinds: {', '.join(_KINDS)}")
    own = {field.name for field in fields(Arm)} - {"stepflow", "rival", "rival_parameters"}
    settings: dict[str, Any] = {}
    arguments = dict(_KINDS[kind])
    for key, value in read_pairs(rest) if colon else ():
        (arguments if key in own else settings)[key] = value
    if kind == "budget-forcing" and not arguments:
        raise StepFlowInputError(f"{text!r} names no budget", hint="write budget-forcing:min_steps=8 or max_steps=20")
    if settings:
        if kind == "base":
            raise StepFlowInputError(f"{text!r}: the base takes no settings", hint=f"write stepflow:{rest}")
        if kind in RIVALS:
            arguments["rival_parameters"] = settings
        else:
            given = arguments.get("stepflow")
            arguments["stepflow"] = (given if isinstance(given, dict) else {}) | settings
    try:
        return (label if equals else text), Arm(**arguments)
    except TypeError as error:
        raise StepFlowInputError(f"{text!r}: {error}") from error


def read_pairs(text: str) -> list[tuple[str, Any]]:
    """Reads settings from their form on the command line, such as `a=1,b=[2,3],c=top:0.25`.

    A value is JSON if it can be read as JSON, else a text.

    Raises:
        StepFlowInputError: A key has no value.
    """
    parts: list[str] = []
    for part in text.split(","):
        if parts and sum(map(parts[-1].count, "[{")) > sum(map(parts[-1].count, "]}")):
            parts[-1] += "," + part  # the comma stands inside brackets
        else:
            parts.append(part)
    pairs: list[tuple[str, Any]] = []
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
