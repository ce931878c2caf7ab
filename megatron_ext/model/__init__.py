"""Layer 4: the model, as megatron-core modules behind one adapter."""
