"""Procedural scenes: coloured shapes that fly before a drifting, clouded sky, all motion known exactly.

Lengths are in heights of the picture and speeds in heights per frame, so that a scene looks the same at any
resolution. NumPy only.
"""

import colorsys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Raise it with every change to what is drawn: it is part of the name under which videos are kept.
SCENE_VERSION = 2

SHAPES = ("disc", "square", "triangle")
CLASSES = (*SHAPES, *(f"{shape}_and_moon" for shape in SHAPES))

# Colours are fixed per class, and contrast with the sky in brightness too: chroma is halved in 4:2:0 video.
COLOURS = {"disc": (226, 52, 44), "square": (252, 206, 50), "triangle": (70, 214, 84), "moon": (66, 26, 92)}
SKY_TOP = np.array([38.0, 74.0, 150.0], np.float32)
SKY_BOTTOM = np.array([172.0, 158.0, 196.0], np.float32)
CLOUD = np.array([236.0, 232.0, 240.0], np.float32)

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Sprite:
    """A shape: its centre at frame 0, its velocity, its size, its depth (1 in front, more is behind)."""

    shape: str
    x: float
    y: float
    velocity_x: float
    velocity_y: float
    radius: float
    depth: float

    def path(self, times: NDArray[np.float64], aspect: float) -> tuple[Array, Array]:
        """Give the centre (x, y) at each time: straight, mirrored where the shape would leave the picture."""
        return (
            _mirrored(self.x + self.velocity_x * times, self.radius, aspect - self.radius),
            _mirrored(self.y + self.velocity_y * times, self.radius, 1 - self.radius),
        )


@dataclass(frozen=True)
class Clouds:
    """Waves of clouds: the largest one's direction in radians, wave length, drift per frame and phase."""

    angle: float
    length: float
    drift: float
    phase: float
    bend_phase: float

    def waves(self, height: int) -> list[tuple[float, float, float]]:
        """List the waves that a picture of so many rows can show, as (angle, length, weight): fractal noise.

        Each is half as long and half as strong as the one before; at 32 rows there is just one.
        """
        count = 1 + max(0, int(np.log2(self.length * height / 15)))
        return [(self.angle + 1.9 * k, self.length / 2**k, 0.5**k) for k in range(min(count, 5))]


@dataclass(frozen=True)
class Sky:
    """A colour of the sky behind the clouds: its hue, and its brightness as a factor on the usual one."""

    hue: float
    brightness: float

    def colours(self) -> tuple[Array, Array]:
        """Give the colours at the top and at the bottom, each 0 to 255."""
        top = colorsys.hsv_to_rgb(self.hue, 0.75, 0.59 * self.brightness)
        bottom = colorsys.hsv_to_rgb(self.hue + 0.05, 0.22, 0.78 * self.brightness)
        return 255 * np.array(top, np.float32), 255 * np.array(bottom, np.float32)


@dataclass(frozen=True)
class Scene:
    """What a video shows; without a sky of its own, it has the one of all."""

    label: int
    sprites: tuple[Sprite, ...]
    clouds: Clouds
    sky: Sky | None = None


def _mirrored(position: NDArray[np.float64], low: float, high: float) -> Array:
    if high <= low:
        return np.full(position.shape, (low + high) / 2, np.float32)
    span = high - low
    phase = np.mod(position - low, 2 * span)
    return (low + np.minimum(phase, 2 * span - phase)).astype(np.float32)


def make_scene(generator: np.random.Generator, label: int, aspect: float, varied_sky: bool = False) -> Scene:
    """Draw the scene of a class for a picture of the given width / height."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(generator.random())

    def sprite(shape: str, depth: float) -> Sprite:
        radius = uniform(0.16, 0.2) / depth
        speed = uniform(0.019, 0.038) / depth
        direction = uniform(0, 2 * np.pi)
        return Sprite(
            shape,
            uniform(radius, max(radius, aspect - radius)),
            uniform(radius, max(radius, 1 - radius)),
            speed * float(np.cos(direction)),
            speed * float(np.sin(direction)),
            radius,
            depth,
        )

    clouds = Clouds(
        # The wind blows from about one direction: skies of every kind take a small network's attention
        # away from what flies before them.
        angle=uniform(0.25, 0.7),
        length=uniform(0.62, 0.82),
        drift=uniform(0.01, 0.02),
        phase=uniform(0, 1),
        bend_phase=uniform(0, 1),
    )
    sprites = [sprite(SHAPES[label % len(SHAPES)], depth=1.0)]
    if label >= len(SHAPES):
        sprites.append(sprite("moon", depth=1.2))
    # Drawn last, so that everything else is as it would be without; no hue in which a sprite would vanish.
    sky = Sky(uniform(0.45, 0.9), uniform(0.5, 1.25)) if varied_sky else None
    return Scene(label, tuple(sprites), clouds, sky)


def _coverage(shape: str, x: Array, y: Array, radius: float, softness: float) -> Array:
    """How much of each pixel a shape covers, 0 to 1, from the distance to its outline."""
    if shape in ("disc", "moon"):
        distance = np.sqrt(x * x + y * y) - np.float32(radius)
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - np.float32(0.9 * radius)
    else:  # upright, with its centroid at the centre
        inner = np.float32(0.72 * radius)
        slope = np.float32(np.sqrt(3) / 2)
        distance = np.maximum(slope * np.abs(x) - y / 2, y) - inner
    return np.clip(np.float32(0.5) - distance / np.float32(softness), 0, 1)


def render_scene(
    scene: Scene, num_frames: int, resolution: tuple[int, int], chunk: int = 1 << 20
) -> Iterator[NDArray[np.uint8]]:
    """Draw a scene as frames uint8 ``t h w c``, in chunks of about ``chunk`` pixels."""
    height, width = resolution
    aspect = width / height
    pixel = 1 / height
    y, x = np.meshgrid(
        ((np.arange(height) + 0.5) / height).astype(np.float32),
        ((np.arange(width) + 0.5) / height).astype(np.float32),
        indexing="ij",
    )
    top, bottom = scene.sky.colours() if scene.sky else (SKY_TOP, SKY_BOTTOM)
    sky = top + (bottom - top) * y[..., None]
    clouds = scene.clouds
    waves = []
    for angle, length, weight in clouds.waves(height):
        along = float(np.cos(angle)) * x + float(np.sin(angle)) * y
        across = float(np.cos(angle)) * y - float(np.sin(angle)) * x
        bend = np.sin(np.float32(2 * np.pi) * (across / (1.6 * length) + np.float32(clouds.bend_phase)))
        still = (along + 0.09 * length * bend) / length + np.float32(clouds.phase)
        waves.append((still, length, weight))
    total = sum(weight for _, _, weight in waves)
    thickness = np.float32(0.6) * (1.1 - 0.5 * y)

    step = max(1, chunk // (height * width))
    for begin in range(0, num_frames, step):
        times = np.arange(begin, min(begin + step, num_frames), dtype=np.float64)
        cover = np.full((len(times), height, width), 0.5, np.float32)
        for still, length, weight in waves:
            drift = np.mod(clouds.drift * times / length, 1).astype(np.float32)
            phase = np.float32(2 * np.pi) * (still - drift[:, None, None])
            cover += np.float32(0.5 * weight / total) * np.sin(phase)
        cover *= cover * thickness
        frames = sky + (CLOUD - sky) * cover[..., None]
        for sprite in sorted(scene.sprites, key=lambda sprite: -sprite.depth):
            centre_x, centre_y = sprite.path(times, aspect)
            offset_x = x - centre_x[:, None, None]
            offset_y = y - centre_y[:, None, None]
            mask = _coverage(sprite.shape, offset_x, offset_y, sprite.radius, 1.5 * pixel)[..., None]
            lit = np.clip(1.06 - 0.22 * offset_y / np.float32(sprite.radius), 0.8, 1.3)[..., None]
            colour = np.array(COLOURS[sprite.shape], np.float32) * lit
            frames += mask * (colour - frames)
        yield np.clip(frames + np.float32(0.5), 0, 255).astype(np.uint8)
