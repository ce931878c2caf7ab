"""megapints' training library: small language models on an unmodified megatron-core."""

__version__ = "0.1.0"
