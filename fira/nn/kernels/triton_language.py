"""Triton, imported in one place. Only code that runs on a GPU imports this module."""

try:  # transformers requires every package that the code of an exported folder imports outside of a try block
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused kernels need Triton: pip install triton") from error

__all__ = ["tl", "triton"]
