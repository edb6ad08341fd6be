"""Attention in Triton. One CTA owns an output row and sums it front to back: no split-K, no atomics.

A pair is (sequence, KV head). The query heads that share a KV head are packed into the rows of a tile: row r of a pair
is query r // HEADS and head r % HEADS of the group. A CTA takes GROUPS pairs; on a GPU that is one, and what is written
as a vector over pairs is then a scalar.
"""
