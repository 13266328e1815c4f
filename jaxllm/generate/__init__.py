"""Generation: KV cache, sampling and the engine that runs them."""
