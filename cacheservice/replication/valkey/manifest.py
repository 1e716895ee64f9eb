"""What a Valkey holds of a dataset, or of all datasets of a group: which pieces make up the current generation. No I/O.

All keys of a unit, which is a dataset or a group, share a hash tag, so that they are in one slot of a cluster, where a
script changes them in one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

import msgpack  # type: ignore[import-untyped]  # ships no type information

from cacheservice.base.errors import SnapshotRejected

VERSION = 1


@dataclass(frozen=True, slots=True)
class Names:
    """The names of a unit's keys.

    :param prefix: of all keys of the service.
    :param unit: ``dataset/NAME`` or ``group/NAME``.
    """

    prefix: str
    unit: str

    @property
    def head(self) -> bytes:
        """The hash that is changed in one step."""
        return f"{self._tag}:head".encode()

    @property
    def channel(self) -> bytes:
        """The channel on which a new manifest is announced."""
        return f"{self._tag}:published".encode()

    def chunk(self, piece: Piece, number: int) -> bytes:
        """The key of a part of a piece."""
        return f"{self._tag}:{piece.token}:{number}".encode()

    def chunks(self, piece: Piece) -> list[bytes]:
        """The keys of all parts of a piece."""
        return [self.chunk(piece, number) for number in range(piece.chunks)]

    @property
    def _tag(self) -> str:
        return f"{self.prefix}:{{{self.unit}}}"


@dataclass(frozen=True, slots=True)
class Piece:
    """Frames of one generation of a dataset, in parts.

    :param base: the generation that they change; 0 for a snapshot.
    :param token: names its keys, which are never used for anything else.
    """

    generation: int
    base: int
    token: str
    chunks: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Member:
    """A dataset's current generation: a snapshot, the deltas that follow it, and the frames of the last renewal."""

    snapshot: Piece
    deltas: tuple[Piece, ...] = ()
    renewal: bytes = b""

    @property
    def generation(self) -> int:
        return self.deltas[-1].generation if self.deltas else self.snapshot.generation

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return (self.snapshot, *self.deltas)

    def since(self, generation: int) -> tuple[Piece, ...] | None:
        """Return the deltas that lead from a generation to the current one; None if the snapshot is needed."""
        if generation == self.generation:
            return ()
        for number, delta in enumerate(self.deltas):
            if delta.base == generation:
                return self.deltas[number:]
        return None


@dataclass(frozen=True, slots=True)
class Manifest:
    """The current state of a unit, by dataset.

    :param epoch: of the lead in which it was published; a later lead has a greater one.
    :param moment: counts the publishes of the unit.
    """

    epoch: int
    moment: int
    members: Mapping[str, Member] = field(default_factory=dict)

    @property
    def pieces(self) -> Iterator[Piece]:
        return chain.from_iterable(member.pieces for member in self.members.values())

    def to_bytes(self) -> bytes:
        """Return it as a msgpack map."""
        members = {
            name: {"pieces": [_fields(piece) for piece in member.pieces], "renewal": member.renewal}
            for name, member in self.members.items()
        }
        packed: bytes = msgpack.packb(
            {"version": VERSION, "epoch": self.epoch, "moment": self.moment, "members": members}
        )
        return packed


def from_bytes(data: bytes, name: str) -> Manifest:
    """Return the manifest of these bytes.

    :param name: of the key, for the error.
    :raises SnapshotRejected: if they are not a manifest of this version.
    """
    try:
        fields = msgpack.unpackb(data)
        if fields["version"] != VERSION:
            raise SnapshotRejected(f"{name}: version {fields['version']} is unknown; this one reads version {VERSION}")
        members = {str(dataset): _member(content) for dataset, content in fields["members"].items()}
        return Manifest(_number(fields["epoch"]), _number(fields["moment"]), members)
    except SnapshotRejected:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, msgpack.UnpackException) as error:
        raise SnapshotRejected(f"{name}: it is not a manifest of a cacheservice") from error


def _member(content: Mapping[str, object]) -> Member:
    pieces, renewal = content["pieces"], content["renewal"]
    if not isinstance(pieces, list) or not isinstance(renewal, bytes):
        raise TypeError
    snapshot, *deltas = [_piece(fields) for fields in pieces]
    chained = [snapshot.generation, *(delta.generation for delta in deltas)]
    if snapshot.base or [delta.base for delta in deltas] != chained[:-1] or chained != sorted(set(chained)):
        raise ValueError
    return Member(snapshot, tuple(deltas), renewal)


def _piece(fields: list[object]) -> Piece:
    generation, base, token, chunks, size_bytes = fields
    if not isinstance(token, str):
        raise TypeError
    return Piece(_number(generation), _number(base), token, _number(chunks), _number(size_bytes))


def _number(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError
    return value


def _fields(piece: Piece) -> list[object]:
    return [piece.generation, piece.base, piece.token, piece.chunks, piece.size_bytes]
