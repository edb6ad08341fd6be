"""Attention where plain Triton stops: warp-specialised kernels for Hopper, in Gluon, each with its launch.

`support` says which kernel serves where. The others need Gluon: import them inside the functions that launch them.
"""
