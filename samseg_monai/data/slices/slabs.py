"""Which slices of a volume a network sees together, call by call."""

from __future__ import annotations

from collections.abc import Iterator


def calls(wanted: list[int], depth: int, slab: int, batch_size: int) -> Iterator[tuple[list[int], list[int]]]:
    """For each call of the network the numbers of the slices that it sees, of ``depth``, and the places among them of
    those that are ``wanted`` and not in a slab before."""
    if slab == 1:
        for start in range(0, len(wanted), batch_size):
            numbers = wanted[start : start + batch_size]
            yield numbers, list(range(len(numbers)))
        return
    asked = set(wanted)
    # beginning of a slab -> the slices that are of no slab before it
    new = {max(min(z, depth - slab), 0): range(z, min(z + slab, depth)) for z in range(0, depth, slab)}
    slabs = [start for start, own in new.items() if asked.intersection(own)]
    several = max(1, batch_size // slab)
    for first in range(0, len(slabs), several):
        numbers, places = [], []
        for start in slabs[first : first + several]:
            places += [len(numbers) + z - start for z in new[start] if z in asked]
            numbers += [min(z, depth - 1) for z in range(start, start + slab)]
        yield numbers, places
