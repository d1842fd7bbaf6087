"""Files: atomic directories, hashing, typed TOML and JSON, safetensors, and shipped data."""
