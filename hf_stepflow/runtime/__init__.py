"""Everything that runs inside a model: flat, on torch and transformers alone, so that it can travel to a Hub repo."""
