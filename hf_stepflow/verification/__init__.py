"""Proves on this machine that StepFlow acts on a model, and that it computes what it should."""

from .checks import Check, Verification, verify_model

__all__ = ["Check", "Verification", "verify_model"]
