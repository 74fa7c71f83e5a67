"""Attach StepFlow to a loaded model, generate, read the report, change settings for one call, and detach it.

Runs offline on the tiny reasoning model of the package. Replace FOLDER with the name of your model.
"""

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_stepflow import StepFlowConfig, StepFlowModelForCausalLM, segment_trace
from hf_stepflow.reasoner import FOLDER

QUESTION = "Eve has 65 more than Ray. Ann has 97 points. Ray has 67 fewer than Ann. How many points does Ray have?"


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")
    model = StepFlowModelForCausalLM.attach(model, StepFlowConfig(tau_max=0.15, alpha=0.06), tokenizer=tokenizer)

    messages = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=200)

    # The trace as StepFlow read it: question, thinking and summary, cut into steps.
    for step in segment_trace(tokenizer, output[0], model.stepflow_config).steps:
        print(f"{step.label:<9}{step.index:>3} {step.text.strip()}")
    # By layer: the attention on the bridge before and after, and the number of injections.
    print(model.stepflow_report())

    # Settings for one call are merged over the model's settings; False leaves StepFlow out.
    for settings in ({"tau_max": 0.3, "alpha": 0.0}, False):
        output = model.generate(**inputs, max_new_tokens=200, stepflow=settings)
        print(settings, tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
    with model.disable_stepflow():
        base_logits = model(**inputs).logits
    # Detaching gives the base model back, bit for bit.
    model.detach_stepflow()
    print("the base model:", bool((model(**inputs).logits == base_logits).all()))


if __name__ == "__main__":
    main()
