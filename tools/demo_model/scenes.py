"""Sampler of random training scenes."""

import random

from .world import Actor, Scene, held_out_scenes, one_shape_scenes


class SceneSampler:
    """Samples scenes, by default an eighth with two shapes, and never a held-out scene."""

    def __init__(self, seed: int, two_shapes: float = 0.125) -> None:
        """Samplers with the same seed return the same scenes."""
        self._random = random.Random(seed)
        self._two_shapes = two_shapes
        held_out = set(held_out_scenes())
        self._scenes = [scene for scene in one_shape_scenes() if scene not in held_out]

    def sample(self, count: int) -> list[Scene]:
        """Return `count` scenes."""
        return [self._pair() if self._random.random() < self._two_shapes else self._one() for _ in range(count)]

    def _one(self) -> Scene:
        return self._random.choice(self._scenes)

    def _pair(self) -> Scene:
        left, right = self._one(), self._one()
        while self._same_colour(left.actors[0], right.actors[0]):
            right = self._one()
        return Scene((left.actors[0], right.actors[0]), left.background)

    @staticmethod
    def _same_colour(left: Actor, right: Actor) -> bool:
        return left.colour == right.colour
