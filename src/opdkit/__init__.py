"""opdkit: the engine for on-policy distillation of language models."""

__version__ = "0.2.0"
