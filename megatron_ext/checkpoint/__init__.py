"""Layer 4: checkpoints on disk, and Hugging Face folders."""
