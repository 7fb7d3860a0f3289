"""The embedded data set: textured shapes on cluttered backgrounds, drawn on demand.

    scene = render_scene(seed=0, index=7, size=128)

One scene holds the truth of every task: a mask of the objects, a class map, a soft alpha with the
foreground and background that it blends, and a flat label map paired with the image. The objects
are one to three large closed shapes with a texture of their own; strokes, small shapes, specks and
low-contrast patches distract. Shapes and grounds draw colours and textures from the same sources,
so neither brightness nor colour gives a shape away. In a `familiar` scene, shapes of a class come
in colours near that of their class, as things of one kind often look alike: telling the classes
apart then takes minutes of training, not hours.

A scene is a function of (seed, index, size) only. Its composition lives in frame coordinates (x to
the right, y down, −1…1), so it is the same at every size. Pixels see only arithmetic that IEEE 754
rounds exactly (+ − × ÷, comparisons): vector width and thread count change no byte. There is no √,
floor or tensor[indices] either: torch splits those over threads from about 2,000 elements on, and
threads that wait for each other stall when the cores are busy.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

CLASS_NAMES = ("background", "disc", "triangle", "square", "star", "ring")
MIN_SIZE = 16

_CLASS_COLOURS = (
    (0, 0, 0),
    (220, 50, 47),
    (38, 139, 210),
    (240, 190, 30),
    (60, 170, 90),
    (160, 80, 200),
)
# A label map shows more than classes: the lower ground, strokes and small shapes. Its codes follow
# those of the classes; the upper ground is code 0.
_LOWER_GROUND, _STROKE, _SMALL_SHAPE = range(len(CLASS_NAMES), len(CLASS_NAMES) + 3)
_LABEL_COLOURS = (*_CLASS_COLOURS, (70, 70, 90), (170, 170, 170), (235, 225, 205))

# A shape covers at least this much everywhere: too little to show in alpha, enough to define the
# foreground where no shape is.
_COVER_FLOOR = 1e-4

T = TypeVar("T")


@dataclass(frozen=True)
class Scene:
    """One scene of S × S pixels; all tensors are uint8 on the CPU.

    `image` = (alpha · foreground + (255 − alpha) · background + 127) // 255, in integers.
    """

    image: Tensor  # [3, S, S] RGB
    mask: Tensor  # [1, S, S], 255 where alpha >= 128, else 0
    classes: Tensor  # [1, S, S], index into CLASS_NAMES of the shape on top; 0 off the mask
    alpha: Tensor  # [1, S, S], coverage by the objects
    foreground: Tensor  # [3, S, S] RGB, defined everywhere, also where alpha is 0
    background: Tensor  # [3, S, S] RGB, with all distractors
    labels: Tensor  # [3, S, S] RGB, flat: class_palette() on the mask, ground and clutter off it


def class_palette() -> Tensor:
    """The RGB colour of each class, for label maps and overlays: uint8 [len(CLASS_NAMES), 3]."""
    return torch.tensor(_CLASS_COLOURS, dtype=torch.uint8)


def render_scene(seed: int, index: int, size: int, familiar: bool = False) -> Scene:
    """Draw scene `index` of the data set `seed` at size × size pixels.

    A `familiar` scene differs in nothing but the colours of its shapes.
    The global random state is left alone. Raises ValueError for a size below MIN_SIZE.
    """
    if size < MIN_SIZE:
        raise ValueError(f"size {size}: a scene needs at least {MIN_SIZE} pixels a side")
    canvas = _Canvas(size)
    draw = _Draw(seed, index, "scene")
    background, codes, ground_colours = _draw_background(draw, canvas)
    foreground, cover, classes = _draw_shapes(draw, canvas, ground_colours, familiar)

    light = _light(draw, canvas)
    grain = _grain(_Draw(seed, index, "grain"), canvas)
    foreground = _to_bytes(foreground * light + grain)
    background = _to_bytes(background * light + grain)
    alpha = _to_bytes(cover)
    on_object = alpha >= 128
    classes = classes.masked_fill(~on_object, 0)
    return Scene(
        image=_composite(foreground, background, alpha),
        mask=on_object[None].to(torch.uint8) * 255,
        classes=classes[None],
        alpha=alpha[None],
        foreground=foreground,
        background=background,
        labels=_label_map(torch.where(on_object, classes, codes)),
    )


# --- the parts of a scene -------------------------------------------------------------------------


def _draw_background(draw: _Draw, canvas: _Canvas) -> tuple[Tensor, Tensor, Tensor]:
    """Two grounds, patches, clutter: RGB [3, S, S], label codes [S, S], ground colours [2, 3]."""
    pairs = [_colour_pair(draw) for _ in range(2)]
    upper, lower = (_texture(draw, canvas, pair) for pair in pairs)
    horizon, slope = draw.uniform(-0.7, 1.4), draw.uniform(-0.8, 0.8)
    x, y = canvas.bent(draw, draw.uniform(0.02, 0.3))
    below = _inside(slope * x - y + horizon, max(draw.uniform(-0.1, 0.3), canvas.edge))
    picture = _mix(upper, lower, below) * _patches(draw, canvas)
    codes = (below >= 0.5).to(torch.uint8) * _LOWER_GROUND
    _paint_strokes(draw, canvas, picture, codes)
    _paint_small_shapes(draw, canvas, picture, codes)
    return picture, codes, torch.stack([_mix(*pair, 0.5) for pair in pairs])


def _patches(draw: _Draw, canvas: _Canvas) -> Tensor:
    """Low-contrast distractors as a gain near 1: blotches, specks, ghosts of shapes; [S, S]."""
    blotches = ((canvas.octaves(draw, 3, 2) - 0.5) * 8).clamp(-1, 1)
    gain = 1 + draw.uniform(0, 0.12) * blotches
    lattice = draw.tensor(1, 81, 81) - 0.5
    specks = (lattice - 0.43).clamp(min=0) + (lattice + 0.43).clamp(max=0)
    gain = gain + canvas.stretched(draw.uniform(0, 7) * specks)[0]
    for _ in range(draw.integer(0, 2)):
        shape = _random_shape(draw, draw.uniform(0.25, 0.5))
        blur = max(draw.uniform(0, 0.2), canvas.edge)
        ghost = _inside(_distance(shape, canvas.x, canvas.y), blur)
        gain = gain + draw.uniform(-0.12, 0.12) * ghost
    return gain


def _paint_strokes(draw: _Draw, canvas: _Canvas, picture: Tensor, codes: Tensor) -> None:
    """Paint long, thin, bent lines on picture [3, S, S] and label codes [S, S], in place."""
    x, y = canvas.bent(draw, 0.3)
    covered = canvas.zeros()
    for _ in range(draw.integer(3, 7)):
        cos, sin = draw.direction()
        dx, dy = x - draw.uniform(-1, 1), y - draw.uniform(-1, 1)
        beyond = ((cos * dx + sin * dy).abs() - draw.uniform(0.15, 0.8)).clamp(min=0)
        across = cos * dy - sin * dx
        distance = _round(beyond, across, draw.uniform(0.006, 0.03))
        cover = _inside(distance, canvas.edge)
        picture += (draw.tensor(3, 1, 1) - picture) * cover
        covered = torch.maximum(covered, cover)
    codes.masked_fill_(covered >= 0.5, _STROKE)


def _paint_small_shapes(draw: _Draw, canvas: _Canvas, picture: Tensor, codes: Tensor) -> None:
    """Paint shapes too small to be objects, as _paint_strokes does."""
    for _ in range(draw.integer(4, 9)):
        shape = _random_shape(draw, draw.uniform(0.03, 0.1))
        rows, columns = canvas.window(shape)
        distance = _distance(shape, canvas.x[:, columns], canvas.y[rows])
        cover = _inside(distance, canvas.edge)
        window = picture[:, rows, columns]
        window += (draw.tensor(3, 1, 1) - window) * cover
        codes[rows, columns].masked_fill_(cover >= 0.5, _SMALL_SHAPE)


def _draw_shapes(
    draw: _Draw, canvas: _Canvas, ground_colours: Tensor, familiar: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The objects, back to front: RGB [3, S, S], coverage [S, S], classes uint8 [S, S].

    Operator "over" on premultiplied colours (Porter & Duff, SIGGRAPH 1984); their sum over the
    coverage is the foreground. Where shapes overlap, the class is that of the one that shows most.
    """
    premultiplied, total, strongest = canvas.zeros(3), canvas.zeros(), canvas.zeros()
    classes = total.to(torch.uint8)
    for shape in _draw_objects(draw):
        distance, cover = _object_cover(draw, canvas, shape)
        cover = cover.clamp(min=_COVER_FLOOR)
        depth = (1 + distance * (2 / shape.radius)).clamp(0, 1)
        colours = _visible_pair(draw, ground_colours)
        if familiar:
            own = class_palette()[shape.kind] / 255
            colours = _mix(colours[0], own, 0.75), _mix(colours[1], own, 0.75)
        texture = _texture(draw, canvas, colours)
        texture = texture * (1 + draw.uniform(-0.5, 0.5) * (depth * depth - 0.5))
        premultiplied = _mix(premultiplied, texture, cover)
        visible = 1 - cover
        total = total * visible + cover
        strongest = strongest * visible
        classes = classes.masked_fill(cover > strongest, shape.kind)
        strongest = torch.maximum(strongest, cover)
    return premultiplied / total, total, classes


def _object_cover(draw: _Draw, canvas: _Canvas, shape: _Shape) -> tuple[Tensor, Tensor]:
    """Signed distance and coverage [S, S] of a shape with a crisp, soft, hairy or glassy finish."""
    x, y = canvas.bent(draw, 0.12 * shape.radius)
    distance = _distance(shape, x, y)
    finish = draw.choice(("crisp", "crisp", "soft", "hairy", "glassy"))
    if finish == "soft":
        blur = max(draw.uniform(0.15, 0.4) * shape.radius, canvas.edge)
        return distance, _smooth(_inside(distance, blur))
    if finish == "hairy":
        length = draw.uniform(0.1, 0.25) * shape.radius
        hair = _hair(draw, x - shape.x, y - shape.y, distance)
        return distance, _inside(distance - length * hair, max(0.05, canvas.edge))
    cover = _inside(distance, canvas.edge)
    if finish == "glassy":
        cover = cover * (draw.uniform(0.55, 0.7) + 0.25 * canvas.octaves(draw, 4, 2))
    return distance, cover


def _light(draw: _Draw, canvas: _Canvas) -> Tensor:
    """Brightness and a linear fall-off of the light over the frame, as a gain [S, S]."""
    (cos, sin), strength = draw.direction(), draw.uniform(0, 0.25)
    return draw.uniform(0.85, 1.15) * (1 + strength * (cos * canvas.x + sin * canvas.y))


def _grain(draw: _Draw, canvas: _Canvas) -> Tensor:
    """Sensor noise, uniform with zero mean, the same in all channels; [S, S]."""
    return draw.uniform(0.02, 0.12) * (draw.tensor(canvas.size, canvas.size) - 0.5)


# --- shapes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shape:
    kind: int  # index into CLASS_NAMES
    x: float
    y: float
    radius: float
    aspect: float
    cos: float
    sin: float


def _random_shape(draw: _Draw, radius: float) -> _Shape:
    """A shape of any kind, turned and squeezed, mostly inside the frame."""
    limit = 1 - 0.7 * radius
    return _Shape(
        draw.integer(1, len(CLASS_NAMES) - 1),
        draw.uniform(-limit, limit),
        draw.uniform(-limit, limit),
        radius,
        draw.uniform(0.7, 1),
        *draw.direction(),
    )


def _draw_objects(draw: _Draw) -> list[_Shape]:
    """One to three shapes, the smaller the more there are; each takes the freest of four places."""
    shapes: list[_Shape] = []
    count = draw.integer(1, 3)
    for _ in range(count):
        radius = draw.uniform(0.4, 0.75) / math.sqrt(count)
        places = [_random_shape(draw, radius) for _ in range(4)]
        shapes.append(max(places, key=lambda place: _clearance(place, shapes)))
    return shapes


def _clearance(shape: _Shape, others: list[_Shape]) -> float:
    """Distance to the nearest other shape over the sum of their radii; below 1 they may overlap."""
    return min(
        (
            math.hypot(shape.x - other.x, shape.y - other.y) / (shape.radius + other.radius)
            for other in others
        ),
        default=0,
    )


def _distance(shape: _Shape, x: Tensor, y: Tensor) -> Tensor:
    """Distance of (x, y) from the outline in frame units, to first order, negative inside."""
    dx, dy = x - shape.x, y - shape.y
    width, height = shape.radius, shape.radius * shape.aspect
    u = (shape.cos / width) * dx + (shape.sin / width) * dy
    v = (shape.cos / height) * dy - (shape.sin / height) * dx
    return _OUTLINES[CLASS_NAMES[shape.kind]](u, v) * height


def _round(u: Tensor, v: Tensor, radius: float) -> Tensor:
    """Distance of (u, v) from the circle around 0, to first order in the distance."""
    return (u * u + v * v) * (0.5 / radius) - 0.5 * radius


def _disc(u: Tensor, v: Tensor) -> Tensor:
    return _round(u, v, 1)


def _ring(u: Tensor, v: Tensor) -> Tensor:
    return _round(u, v, 0.8).abs() - 0.25


def _square(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u.abs(), v.abs()) - 0.85


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(math.sqrt(0.75) * u.abs() + 0.5 * v, -v) - 0.7


def _star(u: Tensor, v: Tensor) -> Tensor:
    """Five tips: mirrors fold the plane into half a tip, whose edge is a straight line."""
    for angle in (0.4 * math.pi, 0.2 * math.pi):  # of the mirror, from the v axis
        u = u.abs()
        beyond = (math.cos(angle) * u - math.sin(angle) * v).clamp(min=0)
        u = u - (2 * math.cos(angle)) * beyond
        v = v + (2 * math.sin(angle)) * beyond
    tip, notch = 1.3, 0.6  # radii of the edge's two ends
    run, rise = notch * math.sin(0.2 * math.pi), tip - notch * math.cos(0.2 * math.pi)
    length = math.hypot(run, rise)
    return (rise / length) * u + (run / length) * v - (run * tip / length)


_OUTER_RADIUS = 1.4  # of the farthest point of any outline, the triangle's corners
_OUTLINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": _disc,
    "triangle": _triangle,
    "square": _square,
    "star": _star,
    "ring": _ring,
}


def _hair(draw: _Draw, dx: Tensor, dy: Tensor, distance: Tensor) -> Tensor:
    """Length of the hairs around a shape, 0…1, by direction from its centre; [S, S].

    Directions are measured along the square |dx| + |dy| = 1, which needs no arc tangent.
    """
    count = 160
    along = dy / (dx.abs() + dy.abs() + 1e-6)
    turn = torch.where(dx >= 0, 1 + along, 3 - along) * (count / 4)
    turn = (turn + draw.uniform(-20, 20) * distance).abs()
    lengths = draw.tensor(count)
    here = turn.int().flatten() % count
    low = lengths.index_select(0, here).view_as(turn)
    high = lengths.roll(-1).index_select(0, here).view_as(turn)
    return _mix(low, high, turn.frac())


# --- textures -------------------------------------------------------------------------------------


def _colour_pair(draw: _Draw) -> tuple[Tensor, Tensor]:
    """Two RGB colours [3] in 0…1, the second at some distance from the first."""
    first, other = draw.tensor(2, 3)
    return first, _mix(first, other, draw.uniform(0.3, 1))


def _visible_pair(draw: _Draw, ground_colours: Tensor) -> tuple[Tensor, Tensor]:
    """Of three colour pairs the one whose mean is the farthest from the ground colours [2, 3]."""
    return max(
        [_colour_pair(draw) for _ in range(3)],
        key=lambda pair: (_mix(pair[0], pair[1], 0.5) - ground_colours).abs().amax(1).amin().item(),
    )


def _texture(draw: _Draw, canvas: _Canvas, colours: tuple[Tensor, Tensor]) -> Tensor:
    """Two colours mixed by a random pattern, with roughness on top: RGB [3, S, S]."""
    pattern = draw.choice((_stripes, _checks, _dots, _marble, _ramp))(draw, canvas)
    contrast = draw.uniform(1, 5)
    blend = (pattern * contrast + (0.5 - 0.5 * contrast)).clamp(0, 1)
    first, second = (colour[:, None, None] for colour in colours)
    strength = draw.uniform(0.1, 0.7)
    roughness = canvas.noise(draw, 20)[0] * strength + (1 - 0.5 * strength)
    return _mix(first, second, blend) * roughness


def _axes(draw: _Draw, canvas: _Canvas, frequency: float) -> tuple[Tensor, Tensor]:
    """Turned and bent coordinates with so many periods per unit; [S, S] each."""
    x, y = canvas.bent(draw, draw.uniform(0, 0.15))
    cos, sin = draw.direction(frequency)
    return cos * x + sin * y, cos * y - sin * x


def _stripes(draw: _Draw, canvas: _Canvas) -> Tensor:
    u, _ = _axes(draw, canvas, draw.uniform(2, 7))
    return _wave(u)


def _checks(draw: _Draw, canvas: _Canvas) -> Tensor:
    u, v = _axes(draw, canvas, draw.uniform(2, 7))
    return (2 * _wave(u) - 1) * (_wave(v) - 0.5) + 0.5


def _dots(draw: _Draw, canvas: _Canvas) -> Tensor:
    u, v = (_wave(axis) for axis in _axes(draw, canvas, draw.uniform(2, 7)))
    return u * u + v * v


def _marble(draw: _Draw, canvas: _Canvas) -> Tensor:
    return canvas.octaves(draw, draw.integer(3, 8), 4)


def _ramp(draw: _Draw, canvas: _Canvas) -> Tensor:
    cos, sin = draw.direction(draw.uniform(0.2, 0.7))
    return _wave(cos * canvas.x + sin * canvas.y + draw.uniform(0, 1))


# --- pixels ---------------------------------------------------------------------------------------


class _Draw:
    """A stream of random numbers, keyed by data set, scene and purpose, never by the size.

    Two streams a scene: the grain's draws depend on the size, the others must not. And torch's CPU
    generator keeps only 32 bits of its seed: scenes that share one stream hardly share the other.
    """

    def __init__(self, seed: int, index: int, purpose: str):
        key = hashlib.blake2b(f"{seed}/{index}/{purpose}".encode(), digest_size=8).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
        self._scalars: list[float] = []

    def tensor(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator, dtype=torch.float32)

    def uniform(self, low: float, high: float) -> float:
        if not self._scalars:  # in bulk: a call for each number would cost a quarter of the scene
            self._scalars = self.tensor(256).tolist()
        return low + (high - low) * self._scalars.pop()

    def integer(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self.uniform(0, 1) * (high - low + 1))

    def choice(self, options: Sequence[T]) -> T:
        return options[self.integer(0, len(options) - 1)]

    def direction(self, length: float = 1) -> tuple[float, float]:
        angle = self.uniform(0, 2 * math.pi)
        return length * math.cos(angle), length * math.sin(angle)


class _Canvas:
    """The pixel grid in frame coordinates, and smooth noise on it."""

    def __init__(self, size: int):
        self.size = size
        self.edge = 1.5 * (2 / size)  # width over which an outline is anti-aliased: 1.5 pixels
        axis = (torch.arange(size, dtype=torch.float32) + 0.5) * (2 / size) - 1
        self.x, self.y = axis[None], axis[:, None]  # they broadcast to [S, S]

    def window(self, shape: _Shape) -> tuple[slice, slice]:
        """The rows and columns that a shape can touch."""
        radius = _OUTER_RADIUS * shape.radius + self.edge

        def span(centre: float) -> slice:
            start = max(0, math.floor((centre - radius + 1) / 2 * self.size))
            return slice(start, math.ceil((centre + radius + 1) / 2 * self.size))

        return span(shape.y), span(shape.x)

    def zeros(self, *channels: int) -> Tensor:
        return torch.zeros(*channels, self.size, self.size, dtype=torch.float32)

    def noise(self, draw: _Draw, cells: int, count: int = 1) -> Tensor:
        """`count` fields of value noise in 0…1 with `cells` lattice cells a side; [count, S, S]."""
        return self.stretched(draw.tensor(count, cells + 1, cells + 1))

    def stretched(self, lattices: Tensor) -> Tensor:
        """Square lattices [count, N, N] that span the frame, interpolated to its pixels."""
        return _stretch(_stretch(lattices, 2, self.size), 1, self.size)

    def octaves(self, draw: _Draw, cells: int, count: int) -> Tensor:
        """`count` octaves of value noise, each half as strong as the one before; 0…1, [S, S]."""
        total = self.noise(draw, cells)[0]
        for octave in range(1, count):
            total = total + self.noise(draw, cells << octave)[0] * 0.5**octave
        return total * (1 / (2 - 0.5 ** (count - 1)))

    def bent(self, draw: _Draw, amount: float) -> tuple[Tensor, Tensor]:
        """The coordinates x and y, each displaced smoothly by at most `amount`; [S, S]."""
        dx, dy = self.noise(draw, 5, 2) * (2 * amount) - amount
        return self.x + dx, self.y + dy


def _stretch(lattice: Tensor, dim: int, size: int) -> Tensor:
    """Interpolate `lattice` along dim (1 or 2 of 3) to `size` pixel centres, by smoothstep."""
    cell, following, t = _lattice_cells(lattice.shape[dim] - 1, size)
    weight = t if dim == 2 else t[:, None]
    return _mix(lattice.index_select(dim, cell), lattice.index_select(dim, following), weight)


@lru_cache(maxsize=64)
def _lattice_cells(cells: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each pixel centre on an axis: the lattice points around it, int64, and the blend; [S]."""
    position = (torch.arange(size, dtype=torch.float32) + 0.5) * (cells / size)
    cell = position.long()
    return cell, cell + 1, _smooth(position - cell)


def _mix(a: Tensor, b: Tensor, t: Tensor | float) -> Tensor:
    return a + (b - a) * t


def _smooth(t: Tensor) -> Tensor:
    return t * t * (3 - 2 * t)


def _wave(t: Tensor) -> Tensor:
    """A triangle wave of period 1, in 0…1."""
    return (2 * t.abs().frac() - 1).abs()


def _inside(distance: Tensor, width: float) -> Tensor:
    """Coverage at a signed distance from an outline, falling from 1 to 0 over `width`."""
    return (distance * (-1 / width) + 0.5).clamp(0, 1)


def _to_bytes(values: Tensor) -> Tensor:
    return (values * 255 + 0.5).clamp(0, 255).to(torch.uint8)


def _composite(foreground: Tensor, background: Tensor, alpha: Tensor) -> Tensor:
    """The formula of Scene; in floats, which hold these whole numbers exactly and divide faster."""
    foreground, background, alpha = (t.float() for t in (foreground, background, alpha))
    total = alpha * (foreground - background) + 255 * background + 127
    return (total / 255).to(torch.uint8)


def _label_map(codes: Tensor) -> Tensor:
    """Label codes [S, S] as RGB [3, S, S]."""
    colours = torch.tensor(_LABEL_COLOURS, dtype=torch.uint8).T
    return colours.gather(1, codes.flatten().long().expand(3, -1)).view(3, *codes.shape)
