"""How many rows and columns a convolution puts around its input."""

from typing import Literal

# Rows above and below, columns left and right.
Border = tuple[tuple[int, int], tuple[int, int]]
# The same number on every side, or a border.
Margin = int | Border
Padding = Literal["torch", "same"]


def margin_of(padding: Padding, size: int, stride: int, extent: tuple[int, int]) -> Margin:
  """What a convolution puts around its input.

  Args:
    padding: `torch`: `(size - 1) / 2` on every side. `same`: TensorFlow's SAME, which gives
      `ceil(extent / stride)` pixels. At a stride above 1 it depends on the extent; where rows or
      columns cannot be halved, there is one more below or right.
    size: of the kernel, odd.
    stride: in both directions.
    extent: height and width of the input.

  Returns:
    One number where all sides are equal.
  """
  if padding == "torch":
    return (size - 1) // 2
  rows, columns = (_same(size, stride, pixels) for pixels in extent)
  return rows[0] if {*rows, *columns} == {rows[0]} else (rows, columns)


def _same(size: int, stride: int, pixels: int) -> tuple[int, int]:
  total = max(0, (-(-pixels // stride) - 1) * stride + size - pixels)
  return total // 2, total - total // 2


def border_of(margin: Margin) -> Border:
  """A margin as a border."""
  return ((margin, margin), (margin, margin)) if isinstance(margin, int) else margin


def output_extent(
  size: int, stride: int, margin: Margin, extent: tuple[int, int]
) -> tuple[int, int]:
  """Height and width of a convolution's output; arguments as `margin_of`'s."""
  height, width = (
    (pixels + sum(around) - size) // stride + 1
    for pixels, around in zip(extent, border_of(margin), strict=True)
  )
  return height, width
