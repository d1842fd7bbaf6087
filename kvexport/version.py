"""Version of kvexport, for Python and C++."""

__version__ = "0.1.0"
