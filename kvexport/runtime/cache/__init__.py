"""KV caches of a session: buffers, sequences, eviction, and saved caches."""
