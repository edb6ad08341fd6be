"""Attention where plain Triton stops: warp-specialised kernels for Hopper, in Gluon, each with its launch.

`config` says which serves where. Modules that need Gluon are imported where they run: not every Triton has it.
"""
