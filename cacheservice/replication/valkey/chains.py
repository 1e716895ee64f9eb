"""Decides how the pieces of a dataset in the Valkey are kept few. Pure: members in, runs of pieces out.

A replica of the generation before a delta needs that delta and those after it; any other replica needs all pieces. Each
publish writes the names of all pieces, and each replica reads them (28 bytes a piece), so they must not become many.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from cacheservice.replication.valkey.manifest import Member, Piece

KEPT_DELTAS = 64
"""The newest deltas stay single, for replicas that are late by as many publishes."""
MERGED_DELTAS = 32
"""Older ones are merged if they are as many. So a chain of small deltas has at most about a hundred."""
MOST_DELTAS = 512
"""More than these (large deltas, or those of earlier leaders, are not merged) are replaced by a snapshot."""
_MOST_SHARE = 0.5
"""Of the snapshot's size: so that a replica that starts has little to apply besides the snapshot."""
SMALL_BYTES = 64 * 1024
"""A compressed snapshot, of some thousands of rows, that is written in two or three milliseconds."""
_ENDLESS_DELTAS = 1024
_ENDLESS_SHARE = 2.0
"""Deltas wait for a snapshot if the work in the background has failed, or is slower than the publishes: the manifest
then has 30 KiB, and a replica that starts has applied each row three times."""


def must_begin_again(deltas: Sequence[Piece], snapshot: Piece) -> bool:
    """Return whether a snapshot must be published instead of the last of these deltas."""
    if snapshot.size_bytes <= SMALL_BYTES:
        return _exceed(deltas, snapshot, KEPT_DELTAS, _MOST_SHARE)
    return _exceed(deltas, snapshot, _ENDLESS_DELTAS, _ENDLESS_SHARE)


def is_long(member: Member) -> bool:
    """Return whether a snapshot should take the place of all pieces."""
    return _exceed(member.deltas, member.snapshot, MOST_DELTAS, _MOST_SHARE)


def _exceed(deltas: Sequence[Piece], snapshot: Piece, most: int, share: float) -> bool:
    return len(deltas) > most or sum(delta.size_bytes for delta in deltas) > share * snapshot.size_bytes


def mergeable(deltas: Sequence[Piece], known: Container[str]) -> tuple[Piece, ...]:
    """Return the longest run of older deltas that are worth a merge; empty if there is none.

    :param known: the tokens of the deltas whose content is at hand.
    """
    longest: Sequence[Piece] = ()
    begin = 0
    older = deltas[: max(0, len(deltas) - KEPT_DELTAS)]
    for end, delta in enumerate(older, 1):
        if delta.token not in known:
            begin = end
        elif end - begin > len(longest):
            longest = older[begin:end]
    return tuple(longest) if len(longest) >= MERGED_DELTAS else ()


def substituted(member: Member, run: Sequence[Piece], piece: Piece) -> Member | None:
    """Return the member with `piece` instead of a run of its pieces; None if it does not have the run."""
    pieces = member.pieces
    if not run or run[0] not in pieces:
        return None
    begin = pieces.index(run[0])
    end = begin + len(run)
    if pieces[begin:end] != tuple(run):
        return None
    chain = (*pieces[:begin], piece, *pieces[end:])
    return Member(chain[0], chain[1:], member.renewal, member.read_us)
