"""Helpers that several tests share: small decoders, checkpoints, bundles and simulated devices."""
