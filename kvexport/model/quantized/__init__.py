"""Quantised weights of Hugging Face checkpoints, one module for each format: floats, and codes where exact.

`formats` finds the format from config.json, or says why it is not read.
"""
