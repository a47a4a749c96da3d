"""Triton kernels behind the operators of :mod:`e2e_fast.kernels`, for CUDA tensors and for Triton's interpreter.

Imported by the operators when the first CUDA tensor arrives, never on ``import e2e_fast``: this package needs triton.
Every module holds plain functions, tensors in and tensors out, without autograd; the operators own registration and
differentiation. Inside this package ``import triton`` is the compiler, since imports are absolute.
"""
