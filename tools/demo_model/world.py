"""Vocabulary, scenes and captions of the demo model."""

import random
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Size:
    """Size of a video: frames (4 n + 1), height and width in px (multiples of 8).

    Shapes, positions and speeds are the same at every size, in units of 1/64 of the shorter side and of
    the video's duration.
    """

    num_frames: int = 17
    height: int = 64
    width: int = 64

    def __post_init__(self) -> None:
        """Reject sizes that the VAE or the pipeline would round."""
        if self.num_frames % 4 != 1 or self.height % 8 or self.width % 8:
            raise ValueError(f"frames must be 4 n + 1, height and width multiples of 8, got {self}")

    def __str__(self) -> str:
        """Return e.g. '17x64x64'."""
        return f"{self.num_frames}x{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: str) -> "Size":
        """Return the size of a text such as '17x64x64'."""
        return cls(*(int(part) for part in text.split("x")))

    @property
    def unit(self) -> float:
        """Length in px that all positions and radii are multiples of."""
        return min(self.height, self.width) / 64

    @property
    def pixels(self) -> int:
        """Pixels of all frames."""
        return self.num_frames * self.height * self.width


BASE_SIZE = Size()

SHAPES = ("circle", "square", "triangle", "star")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (1.00, 0.92, 0.15),
    "green": (0.10, 0.65, 0.20),
    "cyan": (0.05, 0.85, 0.85),
    "blue": (0.10, 0.25, 0.95),
    "purple": (0.60, 0.15, 0.80),
    "pink": (1.00, 0.45, 0.75),
}
# RGB of the top and the bottom row; shaded if they differ. No name is also the colour of a shape:
# with shared words the model confused the two.
BACKGROUNDS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "black": ((0.04, 0.04, 0.04), (0.04, 0.04, 0.04)),
    "grey": ((0.45, 0.45, 0.45), (0.45, 0.45, 0.45)),
    "sand": ((0.80, 0.70, 0.50), (0.80, 0.70, 0.50)),
    "sky": ((0.62, 0.78, 0.92), (0.92, 0.96, 1.00)),
    "dusk": ((0.08, 0.07, 0.22), (0.40, 0.24, 0.30)),
}
MOTIONS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "bouncing",
    "growing",
    "shrinking",
    "turning",
)
NUM_HELD_OUT = 48


@dataclass(frozen=True)
class Actor:
    """One shape with its colour and motion."""

    shape: str
    colour: str
    motion: str

    def __post_init__(self) -> None:
        """Reject words outside the vocabulary, and turning circles, whose motion isn't visible."""
        if self.shape not in SHAPES or self.colour not in COLOURS or self.motion not in MOTIONS:
            raise ValueError(f"each word must be in the vocabulary, got {self}")
        if self.shape == "circle" and self.motion == "turning":
            raise ValueError("a turning circle isn't visible; use another shape")


@dataclass(frozen=True)
class Scene:
    """One or two actors (the left one first) over a background."""

    actors: tuple[Actor, ...]
    background: str

    def caption(self) -> str:
        """Return e.g. 'a red circle moving right over a sand background'."""
        actors = " and ".join(f"a {a.colour} {a.shape} {a.motion}" for a in self.actors)
        return f"{actors} over a {self.background} background"


def parse_caption(caption: str) -> Scene:
    """Return the scene of a caption; raise ValueError if the caption doesn't have the expected form."""
    head, _, tail = caption.strip().partition(" over a ")
    background = tail.removesuffix(" background")
    actors = []
    for part in head.split(" and "):
        _, colour, shape, *motion = part.split(" ")
        actors.append(Actor(shape, colour, " ".join(motion)))
    scene = Scene(tuple(actors), background)
    if background not in BACKGROUNDS or scene.caption() != caption.strip():
        raise ValueError(f"a caption must have the form {scene.caption()!r}, got {caption!r}")
    return scene


def one_shape_scenes() -> tuple[Scene, ...]:
    """Return all 1,240 scenes with one actor: 4 x 8 x 8 x 5, without turning circles."""
    actors = (
        Actor(shape, colour, motion)
        for shape, colour, motion in product(SHAPES, COLOURS, MOTIONS)
        if (shape, motion) != ("circle", "turning")
    )
    return tuple(Scene((actor,), bg) for actor, bg in product(tuple(actors), BACKGROUNDS))


def held_out_scenes() -> tuple[Scene, ...]:
    """Return the 48 one-shape scenes excluded from training; all words occur about equally often."""
    rng = random.Random(2026)
    values = [SHAPES, tuple(COLOURS), MOTIONS, tuple(BACKGROUNDS)]
    chosen: dict[Scene, None] = {}
    while len(chosen) < NUM_HELD_OUT:
        columns = [[v[i % len(v)] for i in range(40)] for v in values]
        for column in columns:
            rng.shuffle(column)
        for shape, colour, motion, background in zip(*columns, strict=True):
            if (shape, motion) != ("circle", "turning") and len(chosen) < NUM_HELD_OUT:
                chosen[Scene((Actor(shape, colour, motion),), background)] = None
    return tuple(chosen)


def words() -> tuple[str, ...]:
    """Return all words of captions, sorted and unique."""
    captions = [scene.caption() for scene in one_shape_scenes()]
    return tuple(sorted({word for caption in captions for word in caption.split()} | {"and"}))
