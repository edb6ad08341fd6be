"""Sums over the GPUs of a host whose order is fixed: kernels that read the memory of other ranks."""

from bi_ops.parallel.peer.memory import PeerMemory
from bi_ops.parallel.peer.sums import PeerAllReduce

__all__ = ["PeerAllReduce", "PeerMemory"]
