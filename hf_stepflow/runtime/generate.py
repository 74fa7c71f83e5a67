"""The `generate` of a repository: transformers runs it in place of its own."""

from .modeling_stepflow import generate_with_stepflow as generate

__all__ = ["generate"]
