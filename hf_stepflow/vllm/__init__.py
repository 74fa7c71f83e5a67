"""StepFlow in vLLM: a plugin that serves models with StepFlow, without a fork."""
