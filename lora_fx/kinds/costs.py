"""The cost model: when W' = W + s B A is formed, and when thin products are added instead.

Of a weight W: (out, in) at N rows of input, or N places of a convolution's output, and rank r. A product is
counted by its multiplications where it is large, by the elements that it passes over where it is thin, and
by its operations where it is so small that dispatching is what costs:

    kept       W' by autograd's own nodes      few operations: N * out * in is small, and so is W
    merged     W' in the forward               a pass over W is less than one over y: out * in against N * out
    merged     W' in the backward              the same against dx: out * in against N * in
    conv       W', twice r out in              against the branch's r (out + in) at each of N places, twice
    conv       dA and dB by thin products      twice r (out + in) at every place, against out * in of all dW'

The numbers below were fitted to measured steps on one core (tests/benchmarks). In half precision W' would
round the adapter away, so that all of this is for float32 and wider.
"""

from __future__ import annotations

SMALL_PRODUCT = 1 << 20
"""Multiplications of a product below which its dispatch is what costs."""
SMALL_WEIGHT = 1 << 16
"""Elements of a weight above which W' is never kept."""
MANY = 2
"""A pass over W is as dear as one over half as many elements of an activation: it is read and written."""


def keeps(rows: int, out: int, columns: int) -> bool:
    """Say whether W' is formed by autograd's own nodes, and kept: dispatch is all that costs."""
    return out * columns <= SMALL_WEIGHT and rows * out * columns <= SMALL_PRODUCT


def merges(rows: int, out: int, columns: int) -> tuple[bool, bool]:
    """Say whether W' is formed in a linear's forward, and in its backward."""
    return rows >= MANY * columns, rows >= MANY * out


def conv_merges(places: int, out: int, columns: int, groups: int) -> bool:
    """Say whether a convolution forms W'; with groups, the branch has an A for each, and always loses."""
    return groups > 1 or places * (out + columns) > 2 * out * columns


def conv_thin(rank: int, out: int, columns: int, groups: int) -> bool:
    """Say whether the gradients of a merged convolution's A and B are thin products."""
    return groups == 1 and 2 * rank * (out + columns) < out * columns
