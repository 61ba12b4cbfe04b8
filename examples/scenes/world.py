"""The procedural world: a seeded room with textured, lit solids, seen by one camera, with exact labels.

Labels of a view, in camera axes (x right, y down, z forward):
    segmentation  (H, W) uint8, index into `CLASSES`
    depth         (H, W) float32, metres along z
    normals       (3, H, W) float32, unit vectors that face the camera
A view is a function of (split, index) alone; the splits share no seed.
"""

import sys
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from .rays import CEILING, FLOOR, WALLS, Floats, nearest, room_distances
from .rooms import Material, Panel, Room, furnish

CLASSES = ("ceiling", "wall", "floor", "window", "rug", "table", "box", "sphere", "cylinder", "cone")
SPLITS = ("train", "calibrate", "validate")
SIZE = 96
RECORD = np.dtype(
    [
        ("image", "u1", (SIZE, SIZE, 3)),
        ("segmentation", "u1", (SIZE, SIZE)),
        ("depth", "<f2", (1, SIZE, SIZE)),
        ("normals", "<f2", (3, SIZE, SIZE)),
    ]
)
"""How a view is kept; half precision costs 0.05 % of a depth and 0.03 degrees of a normal."""
FOCAL = 68.0
"""Pixels; a horizontal field of view of 70 degrees."""

_GRID = (np.arange(SIZE, dtype=np.float32) + np.float32(0.5) - SIZE / 2) / FOCAL
_PIXELS = np.stack([*(axis.ravel() for axis in np.meshgrid(_GRID, _GRID)), np.ones(SIZE * SIZE, np.float32)])
"""Ray directions (3, H * W) in camera axes with z = 1, so that t along a ray is its depth."""


@dataclass(frozen=True, slots=True)
class View:
    """An image (H, W, 3) uint8 and its labels, laid out as the module says."""

    image: NDArray[np.uint8]
    segmentation: NDArray[np.uint8]
    depth: Floats
    normals: Floats


def view(split: str, index: int) -> View:
    """The scene of that index in that split."""
    rng = np.random.default_rng([SPLITS.index(split), index])
    return draw(furnish(rng), rng)


def write(stream: BinaryIO, split: str, first: int, step: int, count: int) -> None:
    """Render scenes first, first + step, ... and write each as one `RECORD`."""
    record = np.zeros((), RECORD)
    for number in range(count):
        seen = view(split, first + step * number)
        for name in RECORD.names:
            record[name] = getattr(seen, name)
        stream.write(record.tobytes())


def draw(room: Room, rng: np.random.Generator) -> View:
    """Cast one ray a pixel, shade it with one point light and hard shadows, and add the sensor's noise."""
    rays = room.camera @ _PIXELS
    limit, face = room_distances(room.size, room.eye, rays)
    depth, solid = nearest(room.solids, room.eye, rays, limit)
    points = room.eye[:, None] + depth * rays
    normals, albedo, gloss, glow = (np.zeros((channels, depth.size), np.float32) for channels in (3, 3, 1, 1))
    classes = np.zeros(depth.size, np.uint8)

    for kind, faces in enumerate(((CEILING,), WALLS, (FLOOR,))):
        seen = np.flatnonzero((solid < 0) & np.isin(face, faces))
        classes[seen] = kind
        axis, far = face[seen] // 2, face[seen] % 2
        normals[axis, seen] = 1 - 2 * far
        albedo[:, seen] = _paint(room.surfaces[kind], points[:, seen])
    for panel in room.panels:
        seen = np.flatnonzero((solid < 0) & (face == panel.face))
        place = panel.axes @ (points[:, seen] - panel.centre[:, None]) / panel.half[:, None]
        inside = np.abs(place).max(0) < 1
        seen, place = seen[inside], place[:, inside]
        classes[seen] = CLASSES.index(panel.name)
        albedo[:, seen], glow[:, seen] = (_window if panel.name == "window" else _rug)(panel, place)
    for number, (body, name, material) in enumerate(zip(room.solids, room.names, room.materials, strict=True)):
        seen = np.flatnonzero(solid == number)
        if seen.size == 0:
            continue
        classes[seen] = CLASSES.index(name)
        normals[:, seen] = body.normals(points[:, seen])
        albedo[:, seen] = _paint(material, body.to_local(points[:, seen], points=True))
        gloss[:, seen] = material.gloss

    light, shine = _lighting(room, points, normals), _highlight(room, points, normals, rays)
    colour = albedo * np.maximum(glow, light) + gloss * shine
    colour = np.sqrt(np.clip(colour, 0, 1)) + np.float32(room.noise) * rng.standard_normal(colour.shape, np.float32)
    shape = (SIZE, SIZE)
    return View(
        image=np.ascontiguousarray((np.clip(colour, 0, 1) * 255 + 0.5).astype(np.uint8).T).reshape(*shape, 3),
        segmentation=classes.reshape(shape),
        depth=depth.reshape(shape),
        normals=(room.camera.T @ normals).reshape(3, *shape),
    )


def _lighting(room: Room, points: Floats, normals: Floats) -> Floats:
    """Light (3, N) that reaches each point: ambient from above, and the lamp where nothing stands before it."""
    beams = points - room.light[:, None]
    square = (beams * beams).sum(0)
    facing = np.maximum(-(normals * beams).sum(0) / np.sqrt(square), 0)
    blocked = nearest(room.solids, room.light, beams, np.full(square.shape, 0.998, np.float32))[1] >= 0
    lamp = np.where(blocked, 0, facing / (1 + square / 6))
    sky = np.float32(room.ambient) * (1 + np.float32(0.25) * normals[1])
    return sky + room.light_colour[:, None] * lamp


def _highlight(room: Room, points: Floats, normals: Floats, rays: Floats) -> Floats:
    half = -rays / np.linalg.norm(rays, axis=0)
    beams = room.light[:, None] - points
    half += beams / np.linalg.norm(beams, axis=0)
    cosine = np.maximum((half * normals).sum(0), 0) / np.maximum(np.linalg.norm(half, axis=0), np.float32(1e-6))
    return cosine**32


def _paint(material: Material, points: Floats) -> Floats:
    """Colour (3, N) of a solid texture at points (3, N) in metres."""
    share = PATTERNS[material.pattern](points * np.float32(material.scale) + material.offset[:, None])
    return material.colours[0][:, None] * (1 - share) + material.colours[1][:, None] * share


def _window(panel: Panel, place: Floats) -> tuple[Floats, Floats]:
    """Panes that glow like the sky, brighter above, between a painted frame and its cross bars."""
    bars = (np.abs(place).max(0) > 0.88) | (np.abs(place).min(0) < 0.06)
    sky = panel.material.colours[0][:, None] * (np.float32(0.8) + np.float32(0.2) * place[1])
    return np.where(bars, panel.material.colours[1][:, None], sky), np.where(bars, 0, np.float32(1))


def _rug(panel: Panel, place: Floats) -> tuple[Floats, Floats]:
    """A patterned field inside a border of its second colour."""
    flat = np.stack([place[0] * panel.half[0], 0 * place[0], place[1] * panel.half[1]])
    border = np.abs(place).max(0) > 0.82
    return np.where(border, panel.material.colours[1][:, None], _paint(panel.material, flat)), np.float32(0)


def _checks(p: Floats) -> Floats:
    return np.floor(p).sum(0) % 2


def _stripes(p: Floats) -> Floats:
    return np.floor(p[0] + np.float32(0.02) * p[1]) % 2


def _planks(p: Floats) -> Floats:
    board = np.floor(p[0])
    return np.abs(np.sin(board * np.float32(12.9898) + np.floor(p[2] / 4 + board / 3) * np.float32(78.233)))


def _marble(p: Floats) -> Floats:
    bend = np.sin(p[0] * 2 + p[1]) + np.sin(p[2] * 2 - p[0]) + np.sin(p[1] * 2 + p[2])
    return np.float32(0.5) + np.float32(0.5) * np.sin(p[0] + p[1] + p[2] + bend)


def _plain(p: Floats) -> Floats:
    return np.zeros_like(p[0])


PATTERNS = {"checks": _checks, "stripes": _stripes, "planks": _planks, "marble": _marble, "plain": _plain}

if __name__ == "__main__":
    write(sys.stdout.buffer, sys.argv[1], *map(int, sys.argv[2:]))
