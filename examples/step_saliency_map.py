"""Map which steps of a trace draw on which (Step-Saliency), with indices and an interactive page. Extra: saliency.

Runs offline on the tiny reasoning model of the package. Replace the model and the trace with yours.
"""

from pathlib import Path
from tempfile import mkdtemp

from hf_stepflow import load_problems, load_reasoner, step_saliency
from hf_stepflow.prompts import encode_prompt


def main() -> None:
    model, tokenizer = load_reasoner()
    problem = load_problems("reasoner:chains-4", 1)[0]
    prompt = encode_prompt(tokenizer, problem.question)
    trace = prompt + tokenizer.encode(problem.trace, add_special_tokens=False)

    with model.disable_stepflow():  # the base model; leave this line out to look at the model with StepFlow
        maps = step_saliency(model, trace, tokenizer=tokenizer, prompt_length=len(prompt))
    # maps.maps is [layers, steps, steps]: what step i draws from step j in each layer.
    print(f"{len(maps.steps)} steps, {len(maps.layers)} layers, maps of shape {list(maps.maps.shape)}")
    print("layer  on the question  on the step before  decay of the summary")
    for row, layer in enumerate(maps.layers):
        question, previous, decay = (maps.indices[name][row] for name in ("question", "previous_step", "decay_share"))
        print(f"{layer:>5}{question:>17.3f}{previous:>20.3f}{decay:>22.3f}")

    # Where the last step of thinking draws from, in the deepest layer.
    last = max(place for place, step in enumerate(maps.steps) if step.label == "thinking")
    strongest = maps.maps[-1, last, :last].argmax()
    print(f"{maps.steps[last].text!r} draws most on {maps.steps[strongest].text!r}")

    page = Path(mkdtemp()) / "step_saliency.html"
    maps.to_html(page)
    print(f"open {page.as_uri()}")


if __name__ == "__main__":
    main()
