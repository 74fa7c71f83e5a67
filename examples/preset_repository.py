"""Save settings as a small repository without weights, and load it with transformers alone.

Runs offline on the tiny reasoning model of the package. Replace FOLDER with the name of your model, and saving with
`model.push_to_hub("your-name/my-preset", preset_only=True)`.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_stepflow import StepFlowConfig, StepFlowModelForCausalLM, list_presets, load_preset
from hf_stepflow.reasoner import FOLDER


def main() -> None:
    # The presets that come with the package are data, each with its provenance.
    print(len(list_presets()), "presets, for instance", load_preset("qwen3-8b"))

    # Your own settings: the bridge with the current step as its segment, without momentum.
    config = StepFlowConfig(tau_max=0.2, alpha=0.0, bridge_scope="step")
    model = StepFlowModelForCausalLM.from_pretrained(FOLDER, stepflow=config)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, preset_only=True)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        print(f"{size // 1000} kB: settings, the name of the base model, and code")

        # This needs no hf_stepflow: the folder brings its code, and trust_remote_code=True allows it to run.
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    print("loaded:", loaded.stepflow_config.bridge_scope, loaded.stepflow_config.tau_max)

    ids = tokenizer("<|user|> Who?<|end|><|assistant|><think> Sue has 4 points. So Ola has 6.", return_tensors="pt")
    with torch.no_grad():
        print("the same model:", torch.equal(model(**ids).logits, loaded(**ids).logits))


if __name__ == "__main__":
    main()
