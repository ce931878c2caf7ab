"""Layer 4: tokenizer, datasets, sample order, batches."""
