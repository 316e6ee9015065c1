"""The tiny world: one patterned shape on a plain background, 32 x 32 pixels.

Captions always name the shape and only sometimes a colour; pattern, size, position and brightness are never mentioned,
so nothing but an image prompt can carry them.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PATTERNS = ("solid", "horizontal", "vertical", "checked")
COLOURS = ("red", "orange", "lime", "green", "cyan", "blue", "purple", "pink")  # hues at multiples of 45 degrees
WORLD_SIZE = 64
"""Side of a scene in world units; positions and radii are in these."""
IMAGE_SIZE = 32
"""Side of a rendered picture in pixels."""
STRIPE_PERIOD = 12.0


@dataclass(frozen=True)
class Scenes:
    """The attributes of n scenes; every field has shape (n,)."""

    shape: Tensor
    pattern: Tensor
    shape_hue: Tensor
    """In turns, [0, 1)."""
    background_hue: Tensor
    """In turns, at least a sixth away from the shape's."""
    brightness: Tensor
    """Of the background, 0.35 to 0.95."""
    radius: Tensor
    x: Tensor
    y: Tensor
    template: Tensor
    """Which of the four captions describes the scene."""

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, rows: slice | Tensor) -> "Scenes":
        return Scenes(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def caption(self, i: int, template: int | None = None) -> str:
        """Name the shape, and one, the other, both or neither of the colours (0: the shape alone)."""
        shape = SHAPES[int(self.shape[i])]
        colour, background = colour_name(self.shape_hue[i]), colour_name(self.background_hue[i])
        return (
            f"a {shape}",
            f"a {colour} {shape}",
            f"a {shape} on a {background} background",
            f"a {colour} {shape} on a {background} background",
        )[int(self.template[i]) if template is None else template]

    def rich_caption(self, i: int) -> str:
        """Name every attribute: the stand-in for web alt-texts that the contrastive encoder is trained on."""
        size = ("small", "medium", "large")[int(self.radius[i] >= 17) + int(self.radius[i] > 20)]
        column = ("left", "centre", "right")[int(self.x[i] >= 27) + int(self.x[i] > 37)]
        row = ("upper", "middle", "lower")[int(self.y[i] >= 27) + int(self.y[i] > 37)]
        light = "dark" if self.brightness[i] < 0.65 else "light"
        return (
            f"a {size} {colour_name(self.shape_hue[i])} {PATTERNS[int(self.pattern[i])]} {SHAPES[int(self.shape[i])]} "
            f"on a {light} {colour_name(self.background_hue[i])} background at the {row} {column}"
        )


def colour_name(hue: Tensor) -> str:
    """The nearest of the eight named hues."""
    return COLOURS[round(float(hue) * len(COLOURS)) % len(COLOURS)]


def draw_scenes(n: int, seed: int) -> Scenes:
    """Draw ``n`` scenes; equal seeds give equal scenes."""
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> Tensor:
        return torch.rand(n, generator=generator)

    shape_hue, radius = uniform(), 14 + 9 * uniform()
    free = WORLD_SIZE - 2 - 2 * radius
    return Scenes(
        shape=torch.randint(0, len(SHAPES), (n,), generator=generator),
        pattern=torch.randint(0, len(PATTERNS), (n,), generator=generator),
        shape_hue=shape_hue,
        background_hue=(shape_hue + 1 / 6 + uniform() * 4 / 6) % 1.0,
        brightness=0.35 + 0.6 * uniform(),
        radius=radius,
        x=radius + 1 + uniform() * free,
        y=radius + 1 + uniform() * free,
        template=torch.multinomial(torch.tensor([0.35, 0.25, 0.15, 0.25]), n, replacement=True, generator=generator),
    )


def hsv_to_rgb(hue: Tensor, saturation: float, value: Tensor) -> Tensor:
    """Colours (n,) -> (n, 3), all in 0..1, hue in turns."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + hue[:, None] * 6) % 6
    return value[:, None] * (1 - saturation * torch.clamp(torch.minimum(k, 4 - k), 0, 1))


def render(scenes: Scenes) -> Tensor:
    """Antialiased pictures, (n, 3, 32, 32) in 0..1."""
    pixel = WORLD_SIZE / IMAGE_SIZE
    axis = (torch.arange(IMAGE_SIZE) + 0.5) * pixel
    x = (axis[None, None, :] - scenes.x[:, None, None]).expand(-1, IMAGE_SIZE, -1)
    y = (axis[None, :, None] - scenes.y[:, None, None]).expand(-1, -1, IMAGE_SIZE)
    rows = torch.arange(len(scenes))
    inside = torch.clamp(0.5 - _distances(x, y, scenes.radius[:, None, None])[rows, scenes.shape] / pixel, 0, 1)
    light = _patterns(x, y, pixel)[rows, scenes.pattern]
    colour = hsv_to_rgb(scenes.shape_hue, 0.9, torch.full((len(scenes),), 0.95))[:, :, None, None]
    background = hsv_to_rgb(scenes.background_hue, 0.6, scenes.brightness)[:, :, None, None]
    figure = torch.lerp(colour, 0.12 * colour + 0.88, light[:, None])
    return torch.lerp(background, figure, inside[:, None])


def _distances(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Signed distances (negative inside) to each of the shapes of radius r at the origin: (n, shapes, h, w)."""
    radial = torch.sqrt(x * x + y * y)
    square = torch.maximum(x.abs(), y.abs()) - 0.85 * r
    low = y - 0.15 * r
    slope, half = math.cos(math.pi / 6), 0.5
    sides = torch.maximum(slope * x - half * low, -slope * x - half * low) - 0.5 * r
    triangle = torch.maximum(low - 0.6 * r, sides)
    spokes = ((torch.atan2(x, -y) / (2 * math.pi) * 5) % 1.0 - 0.5).abs() * 2
    star = (radial - 1.08 * r * (0.42 + 0.58 * spokes**1.3)) * 0.7
    bars = (torch.maximum(a.abs() - r, b.abs() - 0.36 * r) for a, b in ((x, y), (y, x)))
    ring = (radial - 0.72 * r).abs() - 0.28 * r
    return torch.stack([radial - r, square, triangle, star, torch.minimum(*bars), ring], dim=1)


def _patterns(x: Tensor, y: Tensor, pixel: float) -> Tensor:
    """How much of each pixel is light, for each of the patterns: (n, patterns, h, w)."""

    def stripes(t: Tensor) -> Tensor:
        phase = ((t / STRIPE_PERIOD + 0.25) % 1.0 - 0.5).abs()
        return torch.clamp((0.25 - phase) * STRIPE_PERIOD / pixel + 0.5, 0, 1)

    rows, columns = stripes(y), stripes(x)
    checked = rows * columns + (1 - rows) * (1 - columns)
    return torch.stack([torch.zeros_like(rows), rows, columns, checked], dim=1)
