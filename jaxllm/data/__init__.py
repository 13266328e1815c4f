"""From raw text to batches: tokenizer, sources, token shards, packing, loader."""
