"""Sums and gathers over the GPUs of a host by kernels, or copies, that write into the memory of other ranks."""

from bi_ops.parallel.peer.copies import PeerCopies
from bi_ops.parallel.peer.gather import PeerAllGather
from bi_ops.parallel.peer.memory import PeerMemory, over_peer_memory
from bi_ops.parallel.peer.sums import PeerAllReduce

__all__ = ["PeerAllGather", "PeerAllReduce", "PeerCopies", "PeerMemory", "over_peer_memory"]
