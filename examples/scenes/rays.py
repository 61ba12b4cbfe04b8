"""Exact ray intersections with a closed room and the solids in it; every array is (3, N) or (N,), float32.

A solid lives in its own frame as a canonical shape inside [-1, 1]^3: unit ball, cube, cylinder and cone along y. World
and own frame differ by a turn about y, a shift and a scale per axis, none of which changes the parameter t of a ray's
points origin + t * direction, so one formula per shape serves every solid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
FLOOR, CEILING, WALLS = 2, 3, (0, 1, 4, 5)
"""Faces of the room: 2 * axis + (1 on the far side)."""


@dataclass(frozen=True, slots=True)
class Solid:
    """One object: `shape` is a key of `SHAPES`, `half` its half extents in metres, `turn` radians about the y axis."""

    shape: str
    centre: Floats
    half: Floats
    turn: float = 0.0

    def to_local(self, vectors: Floats, *, points: bool) -> Floats:
        """World vectors (3, N) in the solid's own frame, in metres; points are shifted as well as turned."""
        x, y, z = vectors - self.centre[:, None] if points else vectors
        cos, sin = np.float32(np.cos(self.turn)), np.float32(np.sin(self.turn))
        return np.stack([cos * x - sin * z, y, sin * x + cos * z])

    def to_world(self, vectors: Floats) -> Floats:
        """Directions (3, N) of the own frame in the world's."""
        x, y, z = vectors
        cos, sin = np.float32(np.cos(self.turn)), np.float32(np.sin(self.turn))
        return np.stack([cos * x + sin * z, y, cos * z - sin * x])

    def distances(self, origin: Floats, directions: Floats, lengths: Floats) -> tuple[NDArray[np.intp], Floats]:
        """The rays from origin (3,) along (3, N), of squared `lengths`, that pass near, and their t (inf: a miss)."""
        to_centre = self.centre - origin
        along, apart = to_centre @ directions, to_centre @ to_centre - self.half @ self.half
        near = np.flatnonzero((along > 0) & (along * along >= apart * lengths))
        start = self.to_local(origin[:, None], points=True) / self.half[:, None]
        step = self.to_local(directions[:, near], points=False) / self.half[:, None]
        return near, SHAPES[self.shape].distance(start, step)

    def normals(self, points: Floats) -> Floats:
        """Outward unit normals, world frame, at surface points (3, N) of the world."""
        local = self.to_local(points, points=True) / self.half[:, None]
        outward = self.to_world(SHAPES[self.shape].normal(local) / self.half[:, None])
        return outward / np.linalg.norm(outward, axis=0)


def room_distances(size: Floats, origin: Floats, directions: Floats) -> tuple[Floats, NDArray[np.intp]]:
    """Distance t to the room [0, size] from inside it, and the face hit."""
    far = directions >= 0
    wall = np.where(far, size[:, None], np.float32(0))
    steps = (wall - origin[:, None]) / np.where(directions == 0, np.float32(1e-9), directions)
    axis = steps.argmin(axis=0)
    pixel = np.arange(directions.shape[1])
    return steps[axis, pixel], 2 * axis + far[axis, pixel]


def nearest(
    solids: tuple[Solid, ...], origin: Floats, directions: Floats, limit: Floats
) -> tuple[Floats, NDArray[np.intp]]:
    """First solid each ray meets before `limit`: its t and its index, or `limit` and -1."""
    best, index = limit.copy(), np.full(limit.shape, -1)
    lengths = np.einsum("cn,cn->n", directions, directions)
    for number, solid in enumerate(solids):
        near, t = solid.distances(origin, directions, lengths)
        closer = t < best[near]
        best[near[closer]], index[near[closer]] = t[closer], number
    return best, index


def _ball(start: Floats, step: Floats) -> Floats:
    a = (step * step).sum(0)
    b = (start * step).sum(0)
    c = (start * start).sum(0) - 1
    return _first(*_roots(a, b, c))


def _cube(start: Floats, step: Floats) -> Floats:
    inverse = 1 / np.where(step == 0, np.float32(1e-9), step)
    middle, reach = -start * inverse, np.abs(inverse)
    enter, leave = (middle - reach).max(0), (middle + reach).min(0)
    return np.where((enter < leave) & (enter > 0), enter, np.float32(np.inf))


def _cylinder(start: Floats, step: Floats) -> Floats:
    flat = np.array([1, 0, 1], np.float32)[:, None]
    side = _roots((flat * step * step).sum(0), (flat * start * step).sum(0), (flat * start * start).sum(0) - 1)
    inverse = 1 / np.where(step[1] == 0, np.float32(1e-9), step[1])
    middle, reach = -start[1] * inverse, np.abs(inverse)
    return _first(np.maximum(side[0], middle - reach), np.minimum(side[1], middle + reach))


def _cone(start: Floats, step: Floats) -> Floats:
    # Apex at y = 1, base of radius 1 at y = -1: x^2 + z^2 = h^2 with h = (1 - y) / 2.
    h, dh = (1 - start[1]) / 2, -step[1] / 2
    a = step[0] * step[0] + step[2] * step[2] - dh * dh
    b = start[0] * step[0] + start[2] * step[2] - h * dh
    c = start[0] * start[0] + start[2] * start[2] - h * h
    best = np.full(step.shape[1], np.inf, np.float32)
    for t in _roots(np.where(a == 0, np.float32(1e-9), a), b, c):
        best = np.where((t > 0) & (np.abs(start[1] + t * step[1]) <= 1), np.fmin(best, t), best)
    base = (-1 - start[1]) / np.where(step[1] == 0, np.float32(1e-9), step[1])
    on_base = (start[0] + base * step[0]) ** 2 + (start[2] + base * step[2]) ** 2 <= 1
    return np.where((base > 0) & on_base, np.fmin(best, base), best)


def _roots(a: Floats, b: Floats, c: Floats) -> tuple[Floats, Floats]:
    """Both t of a t^2 + 2 b t + c = 0, the smaller first if a > 0; the empty interval (inf, -inf) without any."""
    square = b * b - a * c
    root = np.sqrt(np.maximum(square, 0))
    miss = square < 0
    infinite = np.float32(np.inf)
    return np.where(miss, infinite, (-b - root) / a), np.where(miss, -infinite, (-b + root) / a)


def _first(enter: Floats, leave: Floats) -> Floats:
    return np.where((enter < leave) & (enter > 0), enter, np.float32(np.inf))


def _ball_normal(p: Floats) -> Floats:
    return p


def _cube_normal(p: Floats) -> Floats:
    return np.where(np.abs(p) == np.abs(p).max(0), np.sign(p), np.float32(0))


def _cylinder_normal(p: Floats) -> Floats:
    x, y, z = p
    cap = np.abs(y) > np.hypot(x, z)
    return np.where(cap, np.stack([0 * x, np.sign(y), 0 * z]), np.stack([x, 0 * y, z]))


def _cone_normal(p: Floats) -> Floats:
    x, y, z = p
    base = y < np.float32(-0.9999)
    return np.where(base, np.stack([0 * x, np.full_like(y, -1), 0 * z]), np.stack([x, (1 - y) / 4, z]))


class Shape(NamedTuple):
    """A canonical shape: t of rays (start (3, 1), step (3, N)) into it, inf where they miss; normals at its surface."""

    distance: Callable[[Floats, Floats], Floats]
    normal: Callable[[Floats], Floats]


SHAPES = {
    "ball": Shape(_ball, _ball_normal),
    "cube": Shape(_cube, _cube_normal),
    "cylinder": Shape(_cylinder, _cylinder_normal),
    "cone": Shape(_cone, _cone_normal),
}
