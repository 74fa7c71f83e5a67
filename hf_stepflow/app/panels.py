"""The panels of the app as HTML: two answers side by side, the effect of StepFlow by layer, a map, a comparison.

Everything that a model wrote is escaped.
"""

from collections.abc import Sequence
from html import escape

from hf_stepflow.evaluation.aligned_steps import StepPair, align_steps
from hf_stepflow.evaluation.answers import CORRECT
from hf_stepflow.evaluation.result import EvaluationResult, percent
from hf_stepflow.report import element, forest, table
from hf_stepflow.runtime.report import LayerReport, RowReport
from hf_stepflow.runtime.trace import TraceStep
from hf_stepflow.saliency.page import render_report
from hf_stepflow.saliency.result import StepSaliency

from .answers import Answer

NAMES = ("Base model", "With StepFlow")


def note(text: str) -> str:
    """A line of explanation."""
    return element("p", class_="sf-soft", text=text)


def answers_panel(base: Answer, other: Answer | None) -> str:
    """Shows two answers side by side: a step that both have once, and the first difference marked.

    An answer without steps is shown as one piece without a number.

    Args:
        base: The base model's answer.
        other: The answer with StepFlow; None before it begins.
    """
    cards = [_card(name, answer) for name, answer in zip(NAMES, (base, other), strict=True)]
    rows: list[str] = []
    is_first = True
    ours, theirs = _pieces(base), _pieces(other)
    for pair in _pairs(base, other):
        if pair.is_same:
            cells = [_cell(ours, pair.first, "", pair.other)]
        else:
            cells = [_cell(ours, pair.first, NAMES[0]), _cell(theirs, pair.other, NAMES[1])]
        is_open = other is None or other.response is None
        kind = "same" if pair.is_same else "waiting" if is_open and _is_ahead(pair, len(theirs)) else "apart"
        if kind == "apart" and is_first:
            rows.append(element("div", class_="sf-flag", text="first difference"))
            kind, is_first = "apart sf-first", False
        rows.append(element("div", *cells, class_=f"sf-row sf-{kind}"))
    if is_first and other is not None and other.response is not None:
        rows.insert(0, element("div", class_="sf-flag sf-none", text="no difference"))
    return element("div", element("div", *cards, class_="sf-cards"), *rows, class_="sf-answers")


def _pairs(base: Answer, other: Answer | None) -> list[StepPair]:
    """The alignment; while the other answer is written, of as many steps as it has finished."""
    ours, theirs = ([step.text or "" for step in _pieces(answer)] for answer in (base, other))
    if other is not None and other.response is not None:
        return align_steps(ours, theirs)
    done = max(len(theirs) - 1, 0)
    rest = range(done, max(len(ours), len(theirs)))
    ahead = [StepPair(n if n < len(ours) else None, n if n < len(theirs) else None, False) for n in rest]
    return align_steps(ours[:done], theirs[:done]) + ahead


def _pieces(answer: Answer | None) -> list[TraceStep]:
    """The steps of an answer, or its whole text as one step of number 0 where none was found."""
    if answer is None:
        return []
    whole = TraceStep("question", 0, 0, len(answer.prompt), len(answer.prompt) + len(answer.ids), answer.text)
    return answer.steps or [whole] * bool(answer.text)


def _is_ahead(pair: StepPair, written: int) -> bool:
    """Whether a pair holds a step that the other answer has not finished."""
    return pair.other == written - 1 or (pair.other is None and pair.first is not None and pair.first >= written - 1)


def _card(name: str, answer: Answer | None) -> str:
    head = element("h3", text=name)
    if answer is None:
        return element("section", head, note("waits for the base model"), class_="sf-card")
    counts = f"{len(answer.ids)} tokens, {len(answer.steps)} steps"
    response = answer.response
    if response is None or answer.seconds is None:
        return element("section", head, note(f"writes … {counts}"), class_="sf-card")
    counts += f", {answer.seconds:.1f} s"
    if not response.is_finished:
        counts += ", cut off"
    verdict = "" if answer.outcome is None else element("b", class_=_colour(answer.outcome), text=answer.outcome)
    return element("section", head, verdict, note(counts), class_="sf-card")


def _colour(outcome: str) -> str:
    return "sf-good" if outcome == CORRECT else "sf-bad"


def _cell(steps: Sequence[TraceStep], place: int | None, name: str, other: int | None = None) -> str:
    """A step with its number, and with its number in the other answer where that differs."""
    if place is None:
        return element("div", class_="sf-cell sf-empty")
    step = steps[place]
    places = [place] if other in (None, place) else [place, other]
    shown = "|".join(str(one + 1) for one in places) if step.index else ""
    number = element("span", class_="sf-number", text=shown, title_=step.label if step.index else "no steps")
    who = element("span", class_="sf-who", text=name)
    text = element("span", class_="sf-text", text=(step.text or "").strip())
    return element("div", number, who, text, class_=f"sf-cell sf-{step.label}")


def effect_panel(report: RowReport | None) -> str:
    """Shows what StepFlow did, layer by layer.

    Args:
        report: The report on the answer; None where StepFlow's settings ask for nothing.
    """
    if report is None:
        return note("StepFlow had nothing to do: its settings ask for nothing.")
    if not any(step.label == "thinking" for step in report.steps):
        return note(
            "StepFlow had nothing to do: it found no thinking between the model's markers, which "
            "`hf-stepflow doctor MODEL` shows. For a model that writes none, start the app with "
            "`--stepflow implicit_thinking=true`: its whole answer then counts as thinking."
        )
    heads = (
        "layer",
        "heads lifted",
        "attention on the bridge, before and after",
        "injections",
        "size of an injection",
    )
    rows = [element("tr", *(element("th", text=head) for head in heads))]
    rows += [element("tr", *_layer(layer)) for layer in report.layers]
    about = (
        "The bridge: of the queries of all heads, the share that lay below the floor and was lifted, and the mean "
        "attention on the question and the steps that the present one builds on. Injections: tokens that got the "
        "previous step's momentum, and its mean norm relative to the head output."
    )
    return note(about) + element("div", element("table", *rows), class_="sf-wide")


def _layer(layer: LayerReport) -> list[str]:
    share = "-" if layer.bridged_share is None else f"{layer.bridged_share:.0%}"
    bars = ""
    if layer.mass_before is not None and layer.mass_after is not None:
        bars = "".join(
            element("span", element("i", style=f"width:{100 * mass:.1f}%"), class_=f"sf-bar sf-{name}")
            + element("span", class_="sf-value", text=f"{mass:.3f}")
            for name, mass in (("before", layer.mass_before), ("after", layer.mass_after))
        )
    norm = "-" if layer.injection_norm is None else f"{layer.injection_norm:.3f}"
    cells = (str(layer.layer), share, None, str(layer.injections or "-"), norm)
    return [
        element("td", element("div", bars, class_="sf-bars")) if cell is None else element("td", text=cell)
        for cell in cells
    ]


def saliency_panel(saliency: StepSaliency) -> str:
    """Shows the interactive page of Step-Saliency in a frame, where its script can reach nothing else."""
    page = escape(render_report(saliency), quote=True)
    return f'<iframe class="sf-frame" title="Step-Saliency" sandbox="allow-scripts" srcdoc="{page}"></iframe>'


def comparison_panel(result: EvaluationResult) -> str:
    """Shows a comparison, finished or not: how far it is, the verdict, and both arms."""
    expected = result.run["n_problems"] * len(result.run["arms"])
    done = len(result.results)
    share = element("i", style=f"width:{100 * done / expected:.1f}%")
    state = "finished" if result.is_complete else "so far"
    parts = [
        element("div", share, class_="sf-progress", role="progressbar", aria_valuenow=done, aria_valuemax=expected),
        note(f"{done} of {expected} responses"),
    ]
    parts += [element("p", class_="sf-verdict", text=f"{text} ({state})") for text in result.verdicts()]
    arms = result.arms()
    if arms:
        heads = ("arm", "right %", "tokens", "steps", "unfinished", "loops")
        rows = [
            [
                one.name, percent(one.accuracy), f"{one.tokens:.1f}", f"{one.steps:.1f}",
                str(one.outcomes.get("unfinished", 0)), str(one.loops or 0),
            ]
            for one in arms
        ]  # fmt: skip
        parts.append(table(heads, rows))
    if result.comparisons:
        found = [(one.name, one.paired.delta, percent(one.paired.delta, "+")) for one in result.comparisons]
        parts.append(element("div", forest(found), class_="sf-wide"))
        parts.append(note("Points of accuracy on the same problems, with the 95 % bootstrap interval."))
    return element("div", *parts, class_="sf-comparison")
