"""What stands in a room: a random layout of solids, panels, materials, one lamp and one camera."""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from .rays import FLOOR, Floats, Solid


@dataclass(frozen=True, slots=True)
class Material:
    """A solid texture of two colours (linear RGB): `pattern` is a key of `PATTERNS`, `scale` its cells a metre."""

    pattern: str
    colours: Floats
    scale: float
    offset: Floats
    gloss: float = 0.0


@dataclass(frozen=True, slots=True)
class Panel:
    """A window on a wall or a rug on the floor: a rectangle of half extents (2,) around `centre` (3,).

    `face` is the room's (`rays.room_distances`); `axes` (2, 3) are the rectangle's directions.
    """

    name: str
    face: int
    centre: Floats
    axes: Floats
    half: Floats
    material: Material


@dataclass(frozen=True, slots=True)
class Room:
    """Everything a view is drawn from; `surfaces` is ceiling, walls, floor.

    World axes: y up, the room fills [0, size]. `camera` (3, 3) turns camera axes (x right, y down, z ahead) into them.
    `names` and `materials` go with `solids`; `noise` is the sensor's standard deviation, of a picture in [0, 1].
    """

    size: Floats
    surfaces: tuple[Material, ...]
    panels: tuple[Panel, ...]
    solids: tuple[Solid, ...]
    names: tuple[str, ...]
    materials: tuple[Material, ...]
    eye: Floats
    camera: Floats
    light: Floats
    light_colour: Floats
    ambient: float
    noise: float


def furnish(rng: Generator) -> Room:
    """A room of 3-7 m with a camera that looks across it, three to six things in view, windows and perhaps a rug."""
    size = rng.uniform([3.0, 2.4, 3.0], [7.0, 3.2, 7.0]).astype(np.float32)
    eye, camera = _look(rng, size)
    things = _things(rng, size, eye, camera)
    surfaces = tuple(
        _material(rng, patterns, scale, saturation)
        for patterns, scale, saturation in (
            (("plain", "plain", "marble"), (0.5, 1.5), 0.15),
            (("plain", "marble", "stripes", "planks"), (1.0, 3.0), 0.5),
            (("checks", "planks", "marble", "plain"), (1.0, 4.0), 0.6),
        )
    )
    return Room(
        size=size,
        surfaces=surfaces,
        panels=(*_windows(rng, size), *_rugs(rng, size, eye, camera)),
        solids=tuple(solid for solid, _, _ in things),
        names=tuple(name for _, name, _ in things),
        materials=tuple(material for _, _, material in things),
        eye=eye,
        camera=camera,
        light=(size * rng.uniform([0.2, 0.7, 0.2], [0.8, 0.95, 0.8])).astype(np.float32),
        light_colour=(rng.uniform(1.0, 2.0) * rng.uniform([0.9, 0.85, 0.7], 1.0)).astype(np.float32),
        ambient=rng.uniform(0.15, 0.4),
        noise=rng.uniform(0.0, 0.025),
    )


def _look(rng: Generator, size: Floats) -> tuple[Floats, Floats]:
    """A camera at eye height near the edge of the room, turned towards its middle, tilted down a little."""
    angle = rng.uniform(0, 2 * np.pi)
    middle = size / 2
    reach = rng.uniform(0.55, 0.85) * (middle - np.float32(0.3))
    height = rng.uniform(1.45, 1.55)
    eye = np.array([middle[0] + reach[0] * np.cos(angle), height, middle[2] + reach[2] * np.sin(angle)])
    aim = middle[[0, 2]] + rng.uniform(-0.25, 0.25, 2) * size[[0, 2]]
    pitch, roll = np.radians(rng.uniform(2, 24)), np.radians(rng.normal(0, 2))
    ahead = np.array([aim[0] - eye[0], 0, aim[1] - eye[2]])
    ahead /= np.linalg.norm(ahead)
    forward = np.cos(pitch) * ahead - np.sin(pitch) * np.array([0, 1, 0])
    right = np.cross(forward, [0, 1, 0])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    turned = np.cos(roll) * right + np.sin(roll) * down
    return eye.astype(np.float32), np.stack([turned, np.cross(forward, turned), forward], axis=1).astype(np.float32)


Thing = tuple[Solid, str, Material]


def _things(rng: Generator, size: Floats, eye: Floats, camera: Floats) -> list[Thing]:
    """Things on the floor where the camera looks, none inside another, some with a small one on top."""
    things: list[Thing] = []
    taken: list[tuple[Floats, float]] = []
    for _ in range(rng.integers(3, 7)):
        name = str(rng.choice(["table", *_SHAPE_OF]))
        half = _half(rng, name)
        radius = float(np.hypot(half[0], half[2]))
        for _ in range(10):
            spot = _spot_in_view(rng, eye, camera, (1.1, 5.0))
            inside = np.all(spot > radius) and np.all(spot < size[[0, 2]] - radius)
            clear = np.hypot(*(spot - eye[[0, 2]])) > radius + 0.5
            if inside and clear and all(np.hypot(*(spot - at)) > radius + far for at, far in taken):
                taken.append((spot, radius))
                things += _stand(rng, name, spot, half)
                break
    return things


def _stand(rng: Generator, name: str, spot: Floats, half: Floats) -> list[Thing]:
    """One thing on the floor at (x, z); a table is five boxes, and tables and boxes may carry a small thing."""
    turn = rng.uniform(0, np.pi)
    centre = np.array([spot[0], half[1], spot[1]], np.float32)
    if name != "table":
        things = [(Solid(_SHAPE_OF[name], centre, half, turn), name, _material(rng, *_OBJECT))]
    else:
        wood = _material(rng, ("planks", "plain", "marble"), (4.0, 10.0), 0.5)
        top = Solid(
            "cube",
            np.array([spot[0], 2 * half[1] - 0.04, spot[1]], np.float32),
            np.array([half[0], 0.04, half[2]], np.float32),
            turn,
        )
        leg = np.array([0.04, half[1] - 0.04, 0.04], np.float32)
        corners = [(x * (half[0] - 0.05), z * (half[2] - 0.05)) for x in (-1, 1) for z in (-1, 1)]
        feet = [top.to_world(np.array([[x], [0], [z]], np.float32))[:, 0] for x, z in corners]
        below = np.array([spot[0], leg[1], spot[1]], np.float32)
        things = [(top, name, wood), *((Solid("cube", below + foot, leg, turn), name, wood) for foot in feet)]
    if name in ("table", "box") and rng.random() < 0.5:
        upper = str(rng.choice(list(_SHAPE_OF)))
        small = (_half(rng, upper) * rng.uniform(0.4, 0.6)).astype(np.float32)
        small *= min(1.0, 0.8 * float(min(half[0], half[2])) / float(max(small[0], small[2])))
        over = np.array([spot[0], 2 * half[1] + small[1], spot[1]], np.float32)
        things.append((Solid(_SHAPE_OF[upper], over, small, turn), upper, _material(rng, *_OBJECT)))
    return things


def _half(rng: Generator, name: str) -> Floats:
    if name == "sphere":
        return np.full(3, rng.uniform(0.18, 0.45), np.float32)
    if name == "table":
        return rng.uniform([0.4, 0.25, 0.3], [0.75, 0.4, 0.5]).astype(np.float32)
    if name == "box":
        return rng.uniform([0.15, 0.15, 0.15], [0.45, 0.6, 0.45]).astype(np.float32)
    radius = rng.uniform(0.15, 0.38)
    return np.array([radius, rng.uniform(0.2, 0.65), radius], np.float32)


def _spot_in_view(rng: Generator, eye: Floats, camera: Floats, distance: tuple[float, float]) -> Floats:
    """A floor position (x, z) within 32 degrees of where the camera looks."""
    heading = np.arctan2(camera[2, 2], camera[0, 2]) + np.radians(rng.uniform(-32, 32))
    return (eye[[0, 2]] + rng.uniform(*distance) * np.array([np.cos(heading), np.sin(heading)])).astype(np.float32)


def _windows(rng: Generator, size: Floats) -> list[Panel]:
    """On each wall one window with even odds."""
    panels = []
    for face in (0, 1, 4, 5):
        if rng.random() < 0.5:
            continue
        axis, along = (0, 2) if face < 2 else (2, 0)
        half = rng.uniform([0.4, 0.4], [0.9, 0.65]).astype(np.float32)
        centre = np.zeros(3, np.float32)
        centre[axis] = size[axis] * (face % 2)
        centre[along] = rng.uniform(half[0] + 0.2, size[along] - half[0] - 0.2)
        centre[1] = rng.uniform(1.2, size[1] - half[1] - 0.2)
        axes = np.zeros((2, 3), np.float32)
        axes[0, along] = axes[1, 1] = 1
        sky = rng.uniform([0.5, 0.65, 0.8], 1.0) * rng.uniform(0.6, 1.0)
        colours = np.stack([sky, _colour(rng, 0.3)]).astype(np.float32)
        glass = Material("plain", colours, 1.0, np.zeros(3, np.float32))
        panels.append(Panel("window", face, centre, axes, half, glass))
    return panels


def _rugs(rng: Generator, size: Floats, eye: Floats, camera: Floats) -> list[Panel]:
    """With odds of three in five a rug where the camera looks; it may run under the walls."""
    if rng.random() < 0.4:
        return []
    x, z = np.clip(_spot_in_view(rng, eye, camera, (1.5, 4.0)), 0.3, size[[0, 2]] - np.float32(0.3))
    cos, sin = np.cos(turn := rng.uniform(0, np.pi)), np.sin(turn)
    axes = np.array([[cos, 0, sin], [-sin, 0, cos]], np.float32)
    half = rng.uniform([0.7, 0.5], [1.5, 1.0]).astype(np.float32)
    material = _material(rng, ("stripes", "checks", "marble"), (2.5, 6.0), 0.8)
    return [Panel("rug", FLOOR, np.array([x, 0, z], np.float32), axes, half, material)]


def _material(rng: Generator, patterns: tuple[str, ...], scale: tuple[float, float], saturation: float) -> Material:
    colours = np.stack([_colour(rng, saturation), _colour(rng, saturation)])
    if rng.random() < 0.5:
        colours[1] = colours[0] * rng.uniform(0.4, 0.8)
    gloss = float(rng.uniform(0.2, 0.8)) if rng.random() < 0.4 else 0.0
    offset = rng.uniform(0, 8, 3).astype(np.float32)
    return Material(str(rng.choice(patterns)), colours, rng.uniform(*scale), offset, gloss)


def _colour(rng: Generator, saturation: float) -> Floats:
    """A random linear RGB colour; saturation 0 is grey."""
    hue = rng.uniform(0, 1, 3)
    grey = rng.uniform(0.15, 0.9)
    mixed = grey + saturation * rng.uniform(0.5, 1.0) * (hue - hue.mean())
    return np.clip(mixed, 0.02, 1).astype(np.float32)


_SHAPE_OF = {"box": "cube", "sphere": "ball", "cylinder": "cylinder", "cone": "cone"}
_OBJECT = (("plain", "plain", "checks", "stripes", "marble"), (4.0, 10.0), 1.0)
