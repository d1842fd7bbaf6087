"""File helpers: atomic output directories, hashing, safetensors files and shipped resources."""
