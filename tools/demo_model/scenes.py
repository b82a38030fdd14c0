"""Random scenes to train on."""

import random

from .world import Actor, Scene, held_out_scenes, one_shape_scenes


class SceneSampler:
    """Draws scenes, an eighth of them with two shapes, never one of the held-out scenes."""

    def __init__(self, seed: int, two_shapes: float = 0.125) -> None:
        """Two samplers of one seed draw the same scenes."""
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
        while self._alike(left.actors[0], right.actors[0]):
            right = self._one()
        return Scene((left.actors[0], right.actors[0]), left.background)

    @staticmethod
    def _alike(left: Actor, right: Actor) -> bool:
        return left.colour == right.colour
