"""Compare a setting with the base model on the same problems, with an interval for the difference. Extra: eval.

Runs offline on the tiny reasoning model of the package and its problems. `evaluate` takes any model, and problems as
dicts with `id`, `question` and `answer`.
"""

from hf_stepflow import evaluate, load_problems, load_reasoner


def main() -> None:
    model, tokenizer = load_reasoner()
    problems = load_problems("reasoner:chains-4", 40)
    arms = {"base": False, "stepflow": {"tau_max": 0.15, "alpha": 0.06}}
    result = evaluate(model, problems, arms, tokenizer=tokenizer, batch_size=40, max_new_tokens=150, progress=False)
    print(result)

    # Single results: answer, time, tokens, and what StepFlow did.
    by_problem = {(one["problem"], one["arm"]): one for one in result.results}
    for problem in problems:
        base, other = (by_problem[problem.id, arm] for arm in arms)
        if base["right"] != other["right"]:
            print(f"{problem.id}: right {problem.answer}, base {base['answer']}, stepflow {other['answer']}")


if __name__ == "__main__":
    main()
