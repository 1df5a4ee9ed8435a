"""Biases and scales of a layer's integer kernel, chosen so that its codes are the exact ones.

A layer's codes are a staircase over its integer sum: code k begins at a smallest sum. The integer
kernel's staircase has its own beginnings, which its bias, an integer, moves. Rounding the bias to
the nearest integer puts some of them on the other side of a sum, so that some codes differ. But a
beginning between the same two sums gives the same codes, and all of them together leave an interval
for the bias, which nearly always holds an integer, or does after a slight change of the scale. For
4-bit codes that makes a layer's integer kernel equal to the code-domain net for every input.
"""

from typing import NamedTuple

import numpy as np

# How far the scale may be moved: by this part of a step between sums at the outermost beginning.
_REACH = 0.5
_TRIALS = 41
# Channels at once, times beginnings times trials.
_AT_ONCE = 64
# In the accumulator's units: a bias this far inside its interval is not improved further.
_ROOM = 1.0
# In the accumulator's units: beyond every bias.
_FAR = 2.0**40
# Relative error, with room, of the float32 multiplication by which a runtime requantizes.
_FLOAT32 = 2.0**-20


class ScaleAndBias(NamedTuple):
  """Of each channel: its result is `(sum + bias) * scale`.

  Attributes:
    scale: the value of 1 in the accumulator, on the target's grid, float64 `[F]`.
    bias: float64 `[F]`, whole numbers.
    exact: whether every sum gets its exact code, bool `[F]`.
  """

  scale: np.ndarray
  bias: np.ndarray
  exact: np.ndarray


def fitted(
  ends: np.ndarray, scale: np.ndarray, bias: np.ndarray, factor: float, largest: np.ndarray
) -> ScaleAndBias:
  """The scale and the bias whose staircase is the exact one where that is possible, and the nearest
  otherwise.

  Args:
    ends: between neighbouring codes, on the target's grid, float64 `[K]`.
    scale: the value of 1 in the accumulator, on the target's grid, positive, float64 `[F]`.
    bias: exact, in the accumulator's units, float64 `[F]`.
    factor: by which the accumulator's sums are multiples: kernel codes were multiplied by it.
    largest: absolute value of a sum, before it is multiplied, float64 `[F]`.

  Returns:
    The scale moves by half a step between sums at most, the bias is a whole number.
  """
  parts = [
    _fitted(ends, scale[some], bias[some], factor, largest[some])
    for some in np.split(np.arange(len(scale)), range(_AT_ONCE, len(scale), _AT_ONCE))
  ]
  return ScaleAndBias(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _fitted(
  ends: np.ndarray, scale: np.ndarray, bias: np.ndarray, factor: float, largest: np.ndarray
) -> ScaleAndBias:
  # Where the codes begin, in sums: [F, K]. `first` is the smallest sum with the next code.
  begins = (ends / scale[:, None] - bias[:, None]) / factor
  first = np.ceil(begins)
  reached = np.abs(begins) <= largest[:, None] + 1.0
  # Scales nearby, the unchanged one first: [F, T]. Of all, none is less than half of it.
  outermost = np.max(np.abs(first * factor + bias[:, None]), axis=1, where=reached, initial=factor)
  trials = np.linspace(-1.0, 1.0, _TRIALS)
  trials = trials[np.argsort(np.abs(trials), kind="stable")]
  scales = scale[:, None] * (1.0 + _REACH * factor / outermost[:, None] * trials)
  # The bias must lie between what begins each code one sum earlier, and where it does: [F, T].
  at = ends / scales[:, :, None] - factor * first[:, None, :]
  low = np.max(at, axis=2, where=reached[:, None], initial=-_FAR)
  high = np.min(at + factor, axis=2, where=reached[:, None], initial=_FAR)
  whole = np.where(high - low < _FAR, np.round((low + high) / 2.0), np.round(bias)[:, None])
  # How far inside; the end itself belongs to the next code, and float32 comes near it.
  inside = np.minimum(whole - low, high - whole)
  off = (whole[:, :, None] <= at) | (whole[:, :, None] >= at + factor)
  wrong = np.count_nonzero(off & reached[:, None], axis=2)
  # The trial with the fewest codes wrong; of those the first with room, or else with most.
  best = np.argmax(np.minimum(inside, _ROOM) - _FAR * wrong, axis=1)
  rows = np.arange(len(scale))
  exact = inside[rows, best] > _FLOAT32 * outermost
  return ScaleAndBias(scales[rows, best], whole[rows, best], exact)
