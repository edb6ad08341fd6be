"""Attention in Triton. One program owns an output row and walks its sum front to back: no splits, no atomics.

A pair is (sequence, key head). The query heads that share a key head are packed into the rows of a tile: row r of a
pair is query r // HEADS and head r % HEADS of the group. A program takes GROUPS pairs; on a GPU that is one, and what
is written as a vector over pairs is then a scalar.
"""
