"""Which of many 64-bit hashes are near each other, and which to keep, without comparing all pairs.

Two hashes that differ in at most d bits agree in at least k of d + k blocks of bits. So for each choice of k blocks,
only hashes that are equal there are compared (Manku, Jain and Sarma, Detecting near-duplicates for web crawling, 2007).
k is such that few unrelated hashes meet: as many bits as it takes to number all hashes.
"""

import math
from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np
from jaxtyping import Int64, UInt32, UInt64
from numpy import ndarray

_BITS = 64
_PART_ROWS = 2**24  # what is sorted at a time, at 32 bytes each


def find_leaders(
    hashes: UInt64[ndarray, " n"], pixels: UInt32[ndarray, " n"], max_distance: int
) -> Int64[ndarray, " n"]:
    """For each picture the one to keep in its place, itself if it stays.

    Pictures come in turn, the largest first and then in their order, and each that is still there removes all within
    ``max_distance`` bits of it. So whatever is removed is that near to one that is kept: chains of small differences
    join no strangers.
    """
    order = np.lexsort((-pixels.astype(np.int64), hashes))  # stable: equal ones stay in their order
    is_first = np.diff(hashes[order], prepend=~hashes[order[:1]]) != 0
    best, node = order[is_first], np.cumsum(is_first) - 1
    rank = np.empty(len(best), np.int64)
    rank[np.lexsort((best, -pixels[best].astype(np.int64)))] = np.arange(len(best))
    pairs = np.concatenate([*_near_pairs(hashes[best], max_distance), np.empty((0, 2), np.int64)])
    pairs = np.where((rank[pairs[:, 0]] < rank[pairs[:, 1]])[:, None], pairs, pairs[:, ::-1])
    leaders = np.arange(len(best))
    for better, worse in pairs[np.lexsort((rank[pairs[:, 1]], rank[pairs[:, 0]]))]:
        if leaders[better] == better and leaders[worse] == worse:
            leaders[worse] = better
    result = np.empty(len(hashes), np.int64)
    result[order] = best[leaders[node]]
    return result


def _near_pairs(hashes: ndarray, max_distance: int) -> Iterator[ndarray]:
    """Yield (m, 2) numbers of different hashes at most ``max_distance`` bits apart, each pair once."""
    num_equal = _num_equal_blocks(len(hashes), max_distance)
    blocks = _blocks(max_distance + num_equal)
    num_parts = -(-len(hashes) // _PART_ROWS)
    for chosen in combinations(range(len(blocks)), num_equal):
        mask = np.bitwise_or.reduce(blocks[list(chosen)])
        # The same pair meets in every choice of blocks it agrees in: it counts in the first.
        earlier = [block for number, block in enumerate(blocks[: chosen[-1]]) if number not in chosen]
        for part in range(num_parts):
            rows = np.arange(len(hashes))
            if num_parts > 1:
                rows = np.flatnonzero(_scatter(hashes & mask) % num_parts == part)
            rows = rows[np.argsort(hashes[rows] & mask, kind="stable")]
            yield from _pairs_of_equal_keys(rows, hashes[rows], mask, earlier, max_distance)


def _pairs_of_equal_keys(
    rows: ndarray, hashes: ndarray, mask: np.uint64, earlier: list[np.uint64], max_distance: int
) -> Iterator[ndarray]:
    keys = hashes & mask
    left, step = np.arange(len(keys)), 0
    while len(left):
        step += 1
        left = left[left + step < len(keys)]
        left = left[keys[left] == keys[left + step]]
        different = hashes[left] ^ hashes[left + step]
        is_near = np.bitwise_count(different) <= max_distance
        for block in earlier:
            is_near &= different & block != 0
        yield np.stack((rows[left[is_near]], rows[left[is_near] + step]), axis=1)


def _num_equal_blocks(num_hashes: int, max_distance: int) -> int:
    wanted = min(_BITS // 2, math.ceil(math.log2(max(2, num_hashes))))
    return next(k for k in range(1, _BITS) if _BITS * k // (max_distance + k) >= wanted)


def _blocks(number: int) -> ndarray:
    """Masks of as many runs of bits, which are as long as each other or longer by one."""
    edges = [_BITS * i // number for i in range(number + 1)]
    return np.array([(1 << high) - (1 << low) for low, high in pairwise(edges)], np.uint64)


def _scatter(keys: ndarray) -> ndarray:
    """Equal keys to equal numbers, others evenly."""
    return (keys * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
