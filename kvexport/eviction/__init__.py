"""KV cache eviction: policy configuration, and the reference cache in PyTorch."""
