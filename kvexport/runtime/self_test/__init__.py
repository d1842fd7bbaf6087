"""Self-test: compare a bundle on this machine with the reference outputs recorded when it was built."""

from kvexport.runtime.self_test.verdict import self_test

__all__ = ["self_test"]
