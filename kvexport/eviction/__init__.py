"""KV cache eviction: the policies as data, and the PyTorch reference of a cache with a token budget."""
