"""Following and bounding the steps of a generation; this works with any model, StepFlow attached or not.

Runs offline with the tiny reasoning model of the package; put the name of a model of yours in place of FOLDER.
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
    vocabulary = StepVocabulary.from_tokenizer(tokenizer)  # where steps end; takes the settings of a StepFlowConfig
    messages = [{"role": "user", "content": load_problems("reasoner:chains-4", 1)[0].question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    # Steps while another thread generates, as TextIteratorStreamer hands out text.
    streamer = StepStreamer(tokenizer, vocabulary, skip_special_tokens=True)
    thread = Thread(target=model.generate, kwargs={**inputs, "max_new_tokens": 200, "streamer": streamer})
    thread.start()
    for step in streamer:
        print(f"streamed {step.label} {step.index}: {step.text.strip()}")
    thread.join()

    # At most three steps of thinking, then the answer; and a word whenever a step has ended.
    tell = StepBoundaryLogitsProcessor(
        vocabulary, on_step=lambda row, step: print(f"ended {step.label} {step.index}: tokens {step.start}-{step.end}")
    )
    budget = StepBudgetLogitsProcessor(vocabulary, max_steps=3)
    output = model.generate(**inputs, max_new_tokens=200, logits_processor=[budget, tell])
    tell.finish(output)  # a logits processor never sees the last token
    print("within the budget:", tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
