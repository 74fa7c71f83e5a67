"""The page of the app, made with gradio: its controls, its tabs, and which function fills which panel."""

import html
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, cast

from hf_stepflow.evaluation.problem import EvalProblem
from hf_stepflow.reasoner.levels import LEVELS
from hf_stepflow.runtime.errors import StepFlowError, StepFlowInputError
from hf_stepflow.saliency.api import step_saliency
from hf_stepflow.saliency.result import StepSaliency

from .answers import Answer, stream_answer
from .comparison import stream_comparison
from .model import (
    CONTROLS,
    OWN,
    REASONER,
    LoadedModel,
    choices,
    draw_problem,
    draw_problems,
    load_model,
    settings_of_choice,
    shown_band,
)
from .panels import NAMES, answers_panel, comparison_panel, effect_panel, note, saliency_panel

_LEVEL = "reasoner:chains-7"
# One model answers one visitor at a time.
_IN_TURN: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
_INTRO = (
    "A model answers a problem by itself and with StepFlow, which keeps the question and the steps in view while it "
    "thinks. Whether that helps depends on the model and the problems: the third tab measures it."
)


def make_app(
    model: "LoadedModel | str" = REASONER, *, may_load: bool = True, load: Callable[[str], LoadedModel] = load_model
) -> Any:
    """Makes the page, which `launch_app` serves.

    Args:
        model: The model that it starts with: `reasoner`, a folder, a Hub id, or a model that was loaded.
        may_load: Whether visitors may load other models.
        load: Loads a model by its name.

    Returns:
        A `gradio.Blocks`.

    Raises:
        StepFlowError: The model cannot be loaded.
        ModuleNotFoundError: gradio is not installed (`pip install 'hf-stepflow[app]'`).

    Example:
        >>> from hf_stepflow.app import launch_app, make_app
        >>> launch_app(make_app("reasoner"))  # doctest: +SKIP
    """
    import gradio

    first = load(model) if isinstance(model, str) else model
    return _Page(gradio, first, may_load, load).blocks


def launch_app(page: Any, **options: Any) -> None:
    """Serves a page of `make_app`, with fonts of the visitor's system, so that nothing is fetched.

    Args:
        page: The page.
        **options: Further arguments of gradio's `launch`, such as `server_name` and `server_port`.
    """
    import gradio

    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.launch(theme=theme, footer_links=[], **options)


class _Page:
    """The page and its handlers.

    A session keeps a dict: `problem`, the problem drawn last; `seed`, with which it was drawn; `answers`, the two
    answers; `key`, which question and which limit the first of them is for; `settings`, those of the other.
    """

    def __init__(self, gradio: Any, first: LoadedModel, may_load: bool, load: Callable[[str], LoadedModel]):
        self._gradio = gradio
        self._loaded = first
        self._load = load
        self.blocks = self._build(may_load)

    def _build(self, may_load: bool) -> Any:
        gr = self._gradio
        style = (Path(__file__).parent / "assets" / "app.css").read_text(encoding="utf-8")
        with gr.Blocks(title="StepFlow", analytics_enabled=False, fill_width=True) as blocks:
            gr.HTML(f"<style>{style}</style>", padding=False)
            gr.Markdown(f"# StepFlow\n\n{_INTRO}")
            session = gr.State({})
            question = gr.Textbox(
                label="Problem", lines=3, placeholder="Type a problem, or draw one", elem_id="question"
            )
            with gr.Row(equal_height=True):
                source = gr.Dropdown(
                    [f"reasoner:{level}" for level in LEVELS], value=_LEVEL, allow_custom_value=True, elem_id="level",
                    label="Level, or a source of problems", min_width=220,
                )  # fmt: skip
                choice = gr.Dropdown(choices(), value=OWN, label="Settings", elem_id="choice", min_width=220)
                tau_max = gr.Slider(0, 1, step=0.01, label="tau_max", elem_id="tau-max", min_width=220)
                alpha = gr.Slider(-1, 1, step=0.01, label="alpha", elem_id="alpha", min_width=220)
            with gr.Row():
                draw = gr.Button("Draw a problem", elem_id="draw", min_width=140)
                answer = gr.Button("Answer", variant="primary", elem_id="answer", min_width=140)
                stop = gr.Button("Stop", elem_id="stop", min_width=80)
            with gr.Accordion("Layers, length and model", open=False):
                with gr.Row():
                    oeb = gr.Textbox(
                        label="Layers of the bridge, such as bottom:0.25, all, none or [0, 1]", min_width=220,
                        elem_id="oeb",
                    )  # fmt: skip
                    smi = gr.Textbox(
                        label="Layers of the momentum, such as top:0.25, all, none or [6, 7]", min_width=220,
                        elem_id="smi",
                    )  # fmt: skip
                    limit = gr.Slider(16, 4096, value=512, step=16, label="Tokens of an answer", min_width=220)
                with gr.Row(visible=may_load, equal_height=True):
                    name = gr.Textbox(
                        self._loaded.name, label="Model: reasoner, a folder or a Hub id", scale=3, elem_id="model"
                    )
                    load = gr.Button("Load", elem_id="load", min_width=100)
            with gr.Tabs():
                with gr.Tab("Answers", id="answers"):
                    answers = gr.HTML(
                        note("Draw a problem or type one, then press Answer."),
                        elem_id="answers",
                        apply_default_css=False,
                    )
                    gr.Markdown("### What StepFlow did, by layer")
                    effect = gr.HTML(note("Nothing yet."), elem_id="effect", apply_default_css=False)
                with gr.Tab("Step-Saliency", id="saliency"):
                    with gr.Row():
                        which = gr.Radio(list(NAMES), value=NAMES[1], label="Trace", elem_id="which")
                        measure = gr.Button("Show what its steps draw on", variant="primary", elem_id="measure")
                    saliency = gr.HTML(note("Answer a problem first."), elem_id="saliency", apply_default_css=False)
                with gr.Tab("More problems", id="more"):
                    with gr.Row():
                        number = gr.Slider(8, 400, value=40, step=8, label="Problems of this level", elem_id="number")
                        compare = gr.Button("Compare both", variant="primary", elem_id="compare")
                        end = gr.Button("Stop", elem_id="end")
                    comparison = gr.HTML(
                        note("Both answer the same problems."), elem_id="comparison", apply_default_css=False
                    )

            controls = [tau_max, alpha, oeb, smi]
            settings = [choice, *controls]
            blocks.load(self._show(self.choose), choice, controls, **_IN_TURN)
            load.click(self._show(self.load), name, [*settings, session], **_IN_TURN)
            choice.input(self._show(self.choose), choice, controls, **_IN_TURN)
            draw.click(self._show(self.draw), [source, session], [question, session], api_visibility="private")
            asked = [question, limit, *settings, session]
            answering = gr.on(
                [answer.click, question.submit], self._show(self.answer), asked, [answers, effect, session],
                show_progress="minimal", **_IN_TURN,
            )  # fmt: skip
            stop.click(None, cancels=answering)
            measure.click(self._show(self.measure), [which, session], saliency, **_IN_TURN)
            comparing = compare.click(
                self._show(self.compare), [source, number, limit, *settings, session], comparison,
                show_progress="minimal", **_IN_TURN,
            )  # fmt: skip
            end.click(None, cancels=comparing)
        return blocks

    def _show(self, handler: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """Shows errors of StepFlow as messages with their hint."""

        @wraps(handler)
        def shown(*args: Any) -> Iterator[Any]:
            try:
                yield from handler(*args)
            except StepFlowError as error:
                message = html.escape(" ".join(error.message.split()))
                hint = "" if error.hint is None else f"<br>{html.escape(error.hint)}"
                raise self._gradio.Error(f"{message}{hint}", duration=None, print_exception=False) from error

        return shown

    def load(self, name: str) -> Iterator[tuple[Any, ...]]:
        """Loads a model, and sets the controls to its settings."""
        self._loaded = self._load(name)
        yield OWN, *self._controls(OWN), {}

    def choose(self, choice: str) -> Iterator[tuple[Any, ...]]:
        """Sets the controls to the settings of a choice."""
        yield self._controls(choice)

    def _controls(self, choice: str) -> tuple[Any, ...]:
        settings = settings_of_choice(choice, self._loaded.settings)
        return tuple(shown_band(settings[name]) if "layers" in name else settings[name] for name in CONTROLS)

    def draw(self, source: str, session: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Draws a problem."""
        problem, seed = draw_problem(source)
        yield problem.prompt, session | {"problem": problem, "seed": seed}

    def answer(self, question: str, limit: int, choice: str, *rest: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Answers without StepFlow, then with it. The first answer is kept while question and limit stay the same."""
        *controls, session = rest
        loaded = self._loaded
        settings = loaded.chosen_settings(choice, **dict(zip(CONTROLS, controls, strict=True)))
        problem = _problem_of(session, question)
        key = loaded.name, question, limit
        waiting = note("Nothing yet.")
        if session.get("key") == key:
            base: Answer = session["answers"][0]
        else:
            session = session | {"key": None, "answers": None}
            for base in stream_answer(loaded, question, False, limit, problem):
                yield answers_panel(base, None), waiting, session
        for other in stream_answer(loaded, question, settings, limit, problem):
            yield answers_panel(base, other), waiting, session
        assert other.response is not None
        session = session | {"key": key, "answers": (base, other), "settings": settings}
        yield answers_panel(base, other), effect_panel(other.response.report), session

    def measure(self, which: str, session: dict[str, Any]) -> Iterator[str]:
        """Measures Step-Saliency of one of the two answers."""
        if not session.get("answers"):
            raise StepFlowInputError("there is no answer to look at", hint="press Answer first")
        place = NAMES.index(which)
        answer = session["answers"][place]
        model = self._loaded.model
        with model.use_stepflow(session["settings"] if place else False):
            ids, length = answer.prompt + answer.ids, len(answer.prompt)
            maps = step_saliency(model, ids, prompt_length=length, progress=False)
        yield saliency_panel(cast(StepSaliency, maps))

    def compare(self, source: str, number: int, limit: int, choice: str, *rest: Any) -> Iterator[str]:
        """Compares both on problems after the one that was drawn."""
        *controls, session = rest
        settings = self._loaded.chosen_settings(choice, **dict(zip(CONTROLS, controls, strict=True)))
        problems = draw_problems(source, number, session.get("seed", -1) + 1)
        yield note(f"0 of {2 * len(problems)} responses")
        for result in stream_comparison(self._loaded, problems, settings, limit):
            yield comparison_panel(result)


def _problem_of(session: dict[str, Any], question: str) -> EvalProblem | None:
    """The problem that was drawn, if the question is still its own."""
    problem: EvalProblem | None = session.get("problem")
    return problem if problem is not None and problem.prompt == question else None
