"""Devices: targets as data, and what the operating system and the GPU driver report about this machine."""
