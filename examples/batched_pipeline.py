"""Run a text-generation pipeline with StepFlow on several chats at once; each row of a batch has its own steps.

Runs offline on the tiny reasoning model of the package. A preset repository loads by its name with
`trust_remote_code=True`.
"""

from transformers import pipeline

from hf_stepflow import load_problems, load_reasoner


def main() -> None:
    model, tokenizer = load_reasoner(stepflow={"tau_max": 0.15, "alpha": 0.06})
    tokenizer.padding_side = "left"  # as for every decoder-only model, so that answers directly follow prompts
    problems = load_problems("reasoner:chains-2", 4)
    chats = [[{"role": "user", "content": problem.question}] for problem in problems]

    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    answers = pipe(chats, batch_size=4, max_new_tokens=200, do_sample=False)
    for problem, (answer,) in zip(problems, answers, strict=True):
        thinking, _, summary = answer["generated_text"][-1]["content"].rpartition(" The answer is ")
        print(f"right: {problem.answer:>3}, given: {summary:<5}thinking:{thinking}")

    # The report has one entry a row; padding belongs to none.
    for row in model.stepflow_report().rows:
        injections = max(layer.injections for layer in row.layers)
        thinking_steps = sum(step.label == "thinking" for step in row.steps)
        print(f"{thinking_steps} thinking steps, momentum injected {injections} times a layer")


if __name__ == "__main__":
    main()
