"""Depthwise convolution on NVIDIA GPUs: Pallas (Triton) kernels for both passes.

A depthwise convolution does 9 or 25 multiply-adds per number that it reads, so memory bounds it.
Each kernel reads its operands and writes its result once, and takes the unpadded input: the padding
value is what a masked load returns.

A thread computes a strip of adjacent columns for a few channels and walks down the rows. An input
row is loaded once, each of its columns once per strip; what it adds to later output rows stays in
registers. On an H100, MobileNet-v2's kernels take at most 128 registers and spill none
(`benchmarks/depthwise_gpu.py` times them).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import Mesh, PartitionSpec

from profit_jax.kernels import target

_DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
# Offsets into an array are 32-bit integers.
_MAX_ELEMENTS = 2**31


class Tile(NamedTuple):
  """What one program computes; its threads share a multiprocessor.

  Attributes:
    columns: of a strip. Each thread has one strip.
    strips: neighbouring ones, of one image and then the next.
    lanes: channels.
    rows: that the program walks down.
    warps: of 32 threads. A thread has `strips * lanes / (32 * warps)` channels.
  """

  columns: int
  strips: int
  lanes: int
  rows: int
  warps: int


class _Layout(NamedTuple):
  """Where a call runs: interpreted or compiled, and over which devices the batch is split."""

  interpret: bool
  mesh: Mesh | None


def supports(x: jax.ShapeDtypeStruct | jax.Array) -> bool:
  """Whether `depthwise_conv` takes this `[N, H, W, C]`, for the current target."""
  mesh = target.current().mesh
  devices = 1 if mesh is None else mesh.size
  small = x.size // devices < _MAX_ELEMENTS
  return x.dtype in _DTYPES and small and x.shape[0] % devices == 0


def depthwise_conv(
  x: jax.Array,
  kernel: jax.Array,
  stride: int,
  margin: int = 0,
  pad_value: float = 0.0,
  out_dtype: Any = None,
) -> jax.Array:
  """Convolves each channel with its own filter; sums are float32.

  Interpreted where the current target is not a GPU. Where it has several devices, the batch is
  split over the mesh's axis `data`, and each device computes its part.

  Args:
    x: `[N, H, W, C]`, float32 or bfloat16.
    kernel: `[K, K, 1, C]`.
    stride: in both directions.
    margin: width of the border around the images, on every side.
    pad_value: of the border.
    out_dtype: of the result; x's by default.

  Returns:
    `[N, (H + 2 * margin - K) // stride + 1, (W + 2 * margin - K) // stride + 1, C]`.

  Raises:
    ValueError: x is not supported, see `supports`.
  """
  if not supports(x):
    raise ValueError(
      f"The Triton kernels do not take {x.dtype}{list(x.shape)}. They take float32 and bfloat16, "
      "fewer than 2^31 elements per device, and a batch that divides over the devices."
    )
  where = target.current()
  mesh = where.mesh if where.mesh is not None and where.mesh.size > 1 else None
  layout = _Layout(where.platform != "gpu", mesh)
  static = stride, margin, float(pad_value), jnp.dtype(out_dtype or x.dtype), layout
  return _depthwise_conv(x, kernel, *static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def _depthwise_conv(x, kernel, stride, margin, pad_value, out_dtype, layout):
  def compute(x, kernel):
    return forward(
      x, kernel, stride, margin, pad_value, out_dtype=out_dtype, interpret=layout.interpret
    )

  return _per_device(compute, layout.mesh, "sr", "s")(x, kernel)


def _forward(x, kernel, *static):
  return _depthwise_conv(x, kernel, *static), (x, kernel)


def _backward(stride, margin, pad_value, out_dtype, layout, residuals, upstream):
  del out_dtype
  x, kernel = residuals
  size = kernel.shape[0]

  def for_input(upstream, kernel):
    return input_gradient(
      upstream, kernel, x.shape[1:3], stride, margin, dtype=x.dtype, interpret=layout.interpret
    )

  def for_kernel(x, upstream):
    gradient = filter_gradient(
      x, upstream, size, stride, margin, pad_value, interpret=layout.interpret
    )
    gradient = gradient if layout.mesh is None else lax.psum(gradient, "data")
    return gradient.astype(kernel.dtype)

  dx = _per_device(for_input, layout.mesh, "sr", "s")(upstream, kernel)
  return dx, _per_device(for_kernel, layout.mesh, "ss", "r")(x, upstream)


_depthwise_conv.defvjp(_forward, _backward)


def _per_device(
  compute: Callable[..., jax.Array], mesh: Mesh | None, operands: str, result: str
) -> Callable[..., jax.Array]:
  # XLA does not know how a Pallas call could be split; it would gather the operands first.
  if mesh is None:
    return compute
  specs = {"s": PartitionSpec("data"), "r": PartitionSpec()}
  return jax.shard_map(
    compute,
    mesh=mesh,
    in_specs=tuple(specs[each] for each in operands),
    out_specs=specs[result],
    check_vma=False,
  )


def choose_tile(shape: tuple[int, int, int, int], size: int, stride: int) -> Tile:
  """The tile for a result of this shape, or for an x of it divided by the stride.

  Args:
    shape: `[N, H, W, C]` of the smaller of x and y.
    size: of the kernel.
    stride: of the convolution.
  """
  images, height, width, channels = shape
  # What stays in registers: the taps, and as many partial sums per column and channel.
  per_thread = 4 if size <= 3 else 2
  columns = 4 if stride == 1 else 2
  lanes = min((32, 16, 8), key=lambda lanes: -(-channels // lanes) * lanes)
  warps = 4
  blocks = images * -(-width // columns)
  while warps > 1 and blocks * lanes <= 16 * warps * per_thread:
    warps //= 2
  strips = 32 * warps * per_thread // lanes
  programs = -(-blocks // strips) * -(-channels // lanes)
  # Every segment of rows reads again what its neighbours read at its border.
  segments = max(1, min(-(-height // 14), -(-_PROGRAMS // programs)))
  return Tile(columns, strips, lanes, -(-height // segments), warps)


# An H100 has 132 multiprocessors, each with room for 4 programs of 4 warps and 128 registers.
_PROGRAMS = 3 * 4 * 132


class _Walk:
  """The programs that cover `[N, H, W, C]`, and one's place while its kernel is traced."""

  def __init__(self, shape: tuple[int, int, int, int], tile: Tile, interpret: bool):
    images, self.height, self.width, self.channels = shape
    self.tile = tile
    self.interpret = interpret
    self.blocks = pl.cdiv(self.width, tile.columns)
    self.strips = images * self.blocks
    self.across = pl.cdiv(self.channels, tile.lanes)
    self.segments = pl.cdiv(self.height, tile.rows)
    self.groups = pl.cdiv(self.strips, tile.strips)

  def call(self, kernel: Callable[..., None], out: jax.ShapeDtypeStruct, *operands: jax.Array):
    """The kernel's result, of flat arrays."""
    params = triton.CompilerParams(num_warps=self.tile.warps, num_stages=1)
    call = pl.pallas_call(
      kernel,
      grid=(self.across * self.segments * self.groups,),
      out_shape=jax.ShapeDtypeStruct((out.size,), out.dtype),
      compiler_params=None if self.interpret else params,
      interpret=self.interpret,
    )
    return call(*(operand.reshape(-1) for operand in operands)).reshape(out.shape)

  def start(self) -> None:
    """Finds the program's place. Programs of the same pixels run together: they share sectors."""
    program = pl.program_id(0)
    segment = lax.rem(lax.div(program, self.across), self.segments)
    group = lax.div(program, self.across * self.segments)
    self.part = group * self.segments + segment
    self.first = segment * self.tile.rows
    lane = lax.broadcasted_iota(jnp.int32, (1, self.tile.lanes), 1)
    self.channel = lax.rem(program, self.across) * self.tile.lanes + lane
    strip = group * self.tile.strips + lax.broadcasted_iota(jnp.int32, (self.tile.strips, 1), 0)
    self.image = lax.div(strip, self.blocks)
    self.column = lax.rem(strip, self.blocks) * self.tile.columns
    # None is a mask that would be true everywhere.
    self.channels_inside = None
    if self.channels % self.tile.lanes:
      self.channels_inside = self.channel < self.channels
    self.strips_inside = strip < self.strips if self.strips % self.tile.strips else None
    self.zeros = jnp.zeros((self.tile.strips, self.tile.lanes), jnp.float32)

  def taps(self, ref: Any, size: int, flip: bool = False) -> list[list[jax.Array]]:
    """The filters of the program's channels, `[1, lanes]` each."""
    rows = []
    for i in range(size):
      row = []
      for j in range(size):
        place = (size - 1 - i) * size + size - 1 - j if flip else i * size + j
        offset = place * self.channels + self.channel
        row.append(self.load(ref, offset, self.channels_inside).astype(jnp.float32))
      rows.append(row)
    return rows

  def load(self, ref: Any, offset: jax.Array, mask: jax.Array | None, other: float = 0.0):
    """Elements of a flat array; `other` where the mask is false."""
    if mask is None:
      return triton.load(ref.at[offset])
    return triton.load(ref.at[offset], mask=mask, other=jnp.asarray(other, ref.dtype))

  def add_product(self, total: jax.Array | None, value: jax.Array, factor: jax.Array):
    """`total + value * factor` in float32, each `[strips, lanes]` or `[1, lanes]`."""
    value, factor = (
      jnp.broadcast_to(each.astype(jnp.float32), self.zeros.shape) for each in (value, factor)
    )
    if total is None:
      return value * factor
    if self.interpret:
      return total + value * factor
    # XLA forbids Triton to fuse the two, which would then be most of the instructions.
    out = jax.ShapeDtypeStruct(total.shape, total.dtype)
    return triton.elementwise_inline_asm(
      "fma.rn.f32 $0, $1, $2, $3;",
      args=(value, factor, total),
      constraints="=f,f,f,f",
      pack=1,
      result_shape_dtypes=(out,),
    )[0]

  def store(self, ref: Any, offset: jax.Array, value: jax.Array, mask: jax.Array | None):
    """Writes to a flat array where the mask is true."""
    if self.interpret and mask is not None:
      # The interpreter writes what was there where the mask is false, and drops what is outside.
      offset = jnp.where(mask, offset, ref.shape[0])
    triton.store(ref.at[offset], value.astype(ref.dtype), mask=mask)


class _Pixels:
  """The rows of an array `[N, H, W, C]`, seen from a program's strips.

  Column `t` of a strip is `stride * column + shift + t` of the array, `column` being its first.
  """

  def __init__(self, walk: _Walk, ref: Any, shape: tuple[int, ...], stride: int, shift: int):
    _, self.height, self.width, self.channels = shape
    self.walk = walk
    self.ref = ref
    self.stride = stride
    self.shift = shift
    self.column = walk.column * stride + shift
    pixel = walk.image * (self.height * self.width) + self.column
    self.base = pixel * self.channels + walk.channel

  def _mask(self, t: int) -> jax.Array | None:
    # Everything that does not depend on the row.
    last = (self.walk.blocks - 1) * self.walk.tile.columns * self.stride
    low, high = self.shift + t, last + self.shift + t
    masks = [self.walk.strips_inside, self.walk.channels_inside]
    masks.append(None if low >= 0 else self.column + t >= 0)
    masks.append(None if high < self.width else self.column + t < self.width)
    return _both(*masks)

  def at(self, row: jax.Array, t: int, row_inside: jax.Array | None):
    """Offset and mask of a column."""
    return self.base + (row * self.width + t) * self.channels, _both(self._mask(t), row_inside)

  def load(self, row: jax.Array, count: int, other: float = 0.0, below: Any = True):
    """The first `count` columns of a row, in the array's dtype.

    Args:
      row: of the array; may be outside.
      count: of columns.
      other: outside of the array.
      below: False: as if the row was outside.
    """
    inside = (row >= 0) & (row < self.height) & below
    return [self.walk.load(self.ref, *self.at(row, t, inside), other=other) for t in range(count)]

  def store(self, row: jax.Array, t: int, value: jax.Array, row_inside: jax.Array) -> None:
    """Writes a column of a row, if both are inside."""
    offset, mask = self.at(row, t, row_inside & (row < self.height))
    mask = jnp.broadcast_to(mask, value.shape)
    self.walk.store(self.ref, offset, value, mask)


def _both(*masks: jax.Array | None) -> jax.Array | None:
  given = [mask for mask in masks if mask is not None]
  return functools.reduce(jnp.logical_and, given) if given else None


def forward(
  x: jax.Array,
  kernel: jax.Array,
  stride: int,
  margin: int = 0,
  pad_value: float = 0.0,
  *,
  out_dtype: Any = None,
  interpret: bool = False,
  tile: Tile | None = None,
) -> jax.Array:
  """The convolution of one device; arguments and result as `depthwise_conv`'s."""
  size = kernel.shape[0]
  height, width = ((extent + 2 * margin - size) // stride + 1 for extent in x.shape[1:3])
  out = jax.ShapeDtypeStruct((x.shape[0], height, width, x.shape[3]), out_dtype or x.dtype)
  tile = tile or choose_tile(out.shape, size, stride)
  window = _Window(stride, margin, pad_value, flip=False)
  return _correlate(x, kernel, out, window, _Walk(out.shape, tile, interpret))


class _Window(NamedTuple):
  """How a kernel moves over x: steps, border, the border's value, and whether it is reversed."""

  stride: int
  margin: int
  pad_value: float
  flip: bool


def _correlate(x, kernel, out, window, walk):
  # A row of x adds to several rows of y, which stay in registers until they are complete.
  size, stride, columns = kernel.shape[0], window.stride, walk.tile.columns
  depth = pl.cdiv(size, stride)
  reach = (columns - 1) * stride + size

  def compute(x_ref, kernel_ref, y_ref):
    walk.start()
    taps = walk.taps(kernel_ref, size, window.flip)
    source = _Pixels(walk, x_ref, x.shape, stride, -window.margin)
    result = _Pixels(walk, y_ref, out.shape, 1, 0)

    def step(number, begun):
      group = walk.first + number
      rows = [
        source.load(group * stride + q - window.margin, reach, window.pad_value)
        for q in range(stride)
      ]
      # sums[d] is of row `group - d` of y.
      sums = [[None] * columns, *map(list, begun)]
      for d in range(depth):
        for q in range(min(stride, size - d * stride)):
          for p in range(columns):
            for j in range(size):
              sums[d][p] = walk.add_product(
                sums[d][p], rows[q][p * stride + j], taps[d * stride + q][j]
              )
      for p in range(columns):
        result.store(group - depth + 1, p, sums[-1][p], number >= depth - 1)
      return sums[:-1]

    begun = [[walk.zeros] * columns for _ in range(depth - 1)]
    lax.fori_loop(0, walk.tile.rows + depth - 1, step, begun)

  return walk.call(compute, out, x, kernel)


def input_gradient(
  upstream: jax.Array,
  kernel: jax.Array,
  extent: tuple[int, int],
  stride: int,
  margin: int = 0,
  *,
  dtype: Any = None,
  interpret: bool = False,
  tile: Tile | None = None,
) -> jax.Array:
  """The gradient of x: `[N, *extent, C]` in `dtype`, upstream's by default."""
  size = kernel.shape[0]
  images, _, _, channels = upstream.shape
  out = jax.ShapeDtypeStruct((images, *extent, channels), dtype or upstream.dtype)
  cells = images, *(pl.cdiv(each, stride) for each in extent), channels
  walk = _Walk(cells, tile or choose_tile(cells, size, stride), interpret)
  if stride == 1:
    window = _Window(1, size - 1 - margin, 0.0, flip=True)
    return _correlate(upstream, kernel, out, window, walk)
  return _spread(upstream, kernel, out, stride, margin, walk)


def _spread(upstream, kernel, out, stride, margin, walk):
  # A cell is stride by stride pixels of dx. Pixel (u, v) of cell (R, C) has a term of
  # upstream[R + a, C + e] for each tap (u + margin - stride * a, v + margin - stride * e).
  size, columns = kernel.shape[0], walk.tile.columns
  lowest = -((size - 1 - margin) // stride)
  highest = (stride - 1 + margin) // stride
  reach = columns + highest - lowest

  def compute(upstream_ref, kernel_ref, dx_ref):
    walk.start()
    taps = walk.taps(kernel_ref, size)
    source = _Pixels(walk, upstream_ref, upstream.shape, 1, lowest)
    result = _Pixels(walk, dx_ref, out.shape, stride, 0)

    def pixel(rows, u, v, p):
      total = None
      for a in range(lowest, highest + 1):
        for e in range(lowest, highest + 1):
          i, j = u + margin - stride * a, v + margin - stride * e
          if 0 <= i < size and 0 <= j < size:
            total = walk.add_product(total, rows[a - lowest][p + e - lowest], taps[i][j])
      return walk.zeros if total is None else total

    def step(number, above):
      cell = walk.first + number
      rows = [*above, source.load(cell + highest, reach)]
      for u in range(stride):
        for p in range(columns):
          for v in range(stride):
            total = pixel(rows, u, v, p)
            result.store(cell * stride + u, p * stride + v, total, cell < walk.height)
      return rows[1:]

    above = [source.load(walk.first + a, reach) for a in range(lowest, highest)]
    lax.fori_loop(0, walk.tile.rows, step, above)

  return walk.call(compute, out, upstream, kernel)


def filter_gradient(
  x: jax.Array,
  upstream: jax.Array,
  size: int,
  stride: int,
  margin: int = 0,
  pad_value: float = 0.0,
  *,
  interpret: bool = False,
  tile: Tile | None = None,
) -> jax.Array:
  """The gradient of the kernel: `[size, size, 1, C]`, float32."""
  channels = x.shape[3]
  walk = _Walk(upstream.shape, tile or choose_tile(upstream.shape, size, stride), interpret)
  columns, rows_walked = walk.tile.columns, walk.tile.rows
  depth = pl.cdiv(size, stride)
  reach = (columns - 1) * stride + size
  taps = size * size
  out = jax.ShapeDtypeStruct((walk.groups * walk.segments, taps, channels), jnp.float32)

  def compute(x_ref, upstream_ref, sums_ref):
    walk.start()
    source = _Pixels(walk, x_ref, x.shape, stride, -margin)
    gradient = _Pixels(walk, upstream_ref, upstream.shape, 1, 0)

    def step(number, carry):
      sums, above = list(carry[0]), carry[1]
      group = walk.first + number
      # recent[d] is row `group - d` of the gradient.
      new = gradient.load(group, columns, below=number < rows_walked)
      recent = [[value.astype(jnp.float32) for value in new], *above]
      rows = [source.load(group * stride + q - margin, reach, pad_value) for q in range(stride)]
      for q in range(stride):
        for p in range(columns):
          for j in range(size):
            value = rows[q][p * stride + j]
            for d in range(pl.cdiv(size - q, stride)):
              tap = (d * stride + q) * size + j
              sums[tap] = walk.add_product(sums[tap], value, recent[d][p])
      return sums, recent[:-1]

    start = [walk.zeros] * taps, [[walk.zeros] * columns for _ in range(depth - 1)]
    sums, _ = lax.fori_loop(0, rows_walked + depth - 1, step, start)
    for tap, total in enumerate(sums):
      offset = (walk.part * taps + tap) * channels + walk.channel
      value = jnp.sum(total, axis=0, keepdims=True)
      walk.store(sums_ref, offset, value, walk.channels_inside)

  return jnp.sum(walk.call(compute, out, x, upstream), axis=0).reshape(size, size, 1, channels)
