"""What the warp-specialised kernels share: Gluon is the language in which Triton shows the GPU's own units.

A kernel splits its warps into partitions: a producer, which has TMA copy tiles into stages of shared memory, consumer
warp groups of four warps, which multiply them, and where needed warps that store or reduce. Modules here import Gluon,
which not every release of Triton has: import them inside the functions that launch such a kernel.
"""
