"""Follow and limit the steps of a generation, on any model, with or without StepFlow.

Runs offline on the tiny reasoning model of the package. Replace FOLDER with the name of your model.
"""

from threading import Thread

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_stepflow import (
    StepBoundaryLogitsProcessor,
    StepBudgetLogitsProcessor,
    StepStreamer,
    StepVocabulary,
    load_problems,
)
from hf_stepflow.reasoner import FOLDER


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")
    vocabulary = StepVocabulary.from_tokenizer(tokenizer)  # also takes a StepFlowConfig, for other step rules
    messages = [{"role": "user", "content": load_problems("reasoner:chains-4", 1)[0].question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    # Steps, while another thread generates: as TextIteratorStreamer, but step by step.
    streamer = StepStreamer(tokenizer, vocabulary, skip_special_tokens=True)
    thread = Thread(target=model.generate, kwargs={**inputs, "max_new_tokens": 200, "streamer": streamer})
    thread.start()
    for step in streamer:
        print(f"streamed {step.label} {step.index}: {step.text.strip()}")
    thread.join()

    # At most three steps of thinking, then the answer; `follow` reports each step when it ends.
    follow = StepBoundaryLogitsProcessor(
        vocabulary, on_step=lambda row, step: print(f"ended {step.label} {step.index}: tokens {step.start}-{step.end}")
    )
    budget = StepBudgetLogitsProcessor(vocabulary, max_steps=3)
    output = model.generate(**inputs, max_new_tokens=200, logits_processor=[budget, follow])
    follow.finish(output)  # a logits processor never sees the last token
    print("within the budget:", tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
