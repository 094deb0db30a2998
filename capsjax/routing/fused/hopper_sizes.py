"""How the sweeps of an NVIDIA Hopper GPU are divided among programs."""

import dataclasses
import math

# Examples per program: the rows of one warpgroup's matrix instruction.
TILE = 64
# A program has two warpgroups. Each has its own children, which are copied in three stages.
WARPGROUPS, STAGES = 2, 3
# Multiprocessors, and bytes of shared memory for a program that has one of them to itself.
_PROCESSORS, _SHARED = 132, 225 * 2**10
# Up to this many numbers per example, J·(D + 4), a thread's registers hold votes, sums and logits.
_MOST_NUMBERS = 224
_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Padded sizes and the division of children into groups.

    Attributes:
      batch: B, a multiple of the tile.
      in_features: K, a multiple of 8 as the matrix instruction requires.
      features: D, likewise.
      group: children per program.
      groups: number of groups.
    """

    batch: int
    in_features: int
    features: int
    group: int
    groups: int

    @classmethod
    def of(cls, poses: tuple[int, ...], weights: tuple[int, ...], tiles: int) -> "Sizes":
        """Divides the children of a sweep.

        Args:
          poses: shape ``[N, I, B, K]``.
          weights: shape ``[N, I, J, D, K]``.
          tiles: 1 for the query alone, 2 with the gradient of the sums.

        Raises:
          NotImplementedError: the votes of an example do not fit into registers, or the smallest
            group not into shared memory.
        """
        number, children, batch, _ = poses
        parents, features, in_features = weights[2:]
        batch, features, in_features = (_up(batch, TILE), _up(features, 8), _up(in_features, 8))
        columns = parents * features
        if parents * (features + 4) > _MOST_NUMBERS:
            raise NotImplementedError(
                f"J · (D + 4) of at most {_MOST_NUMBERS}, with D rounded up to a multiple of 8, got"
                f" J = {parents} and D = {features}"
            )
        unit = WARPGROUPS * STAGES
        bytes_of_unit = unit * (TILE + columns) * in_features * _BYTES
        most = (_SHARED - tiles * TILE * columns * _BYTES) // bytes_of_unit
        if most < 1:
            raise NotImplementedError(
                f"poses of fewer dimensions, as {unit} children with their weights must fit into"
                f" shared memory, got K = {in_features}"
            )
        # As many rounds of programs as needed, and equal shares.
        share = number * children * (batch // TILE) / (_PROCESSORS * unit)
        rounds = math.ceil(share / most)
        group = unit * min(most, math.ceil(share / rounds))
        return cls(batch, in_features, features, group, math.ceil(children / group))

    @property
    def children(self) -> int:
        """I, a multiple of the group."""
        return self.group * self.groups


def _up(size: int, multiple: int) -> int:
    return multiple * math.ceil(size / multiple)
