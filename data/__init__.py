"""From raw text to batches of tokens: sources, split, tokenizers, token shards, deterministic loader."""
