"""The floating-point types that weights may be stored in and computed with; by name, as the command line loads no torch."""

from typing import Final

__all__ = ["FLOAT_DTYPES"]

FLOAT_DTYPES: Final = ("float32", "bfloat16", "float16")
"""Names in torch, in config.json and in `--dtype`."""
