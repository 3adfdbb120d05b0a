"""From raw text to batches of tokens: sources, tokenizers, token shards and the deterministic loader."""
