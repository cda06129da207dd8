"""Data: tokenizer, sources, packed tokens, loader, mixtures, and n-gram baselines."""
