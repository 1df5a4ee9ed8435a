"""Depthwise convolution on NVIDIA GPUs: Pallas (Triton) kernels for both passes.

A depthwise convolution does 9 or 25 multiply-adds per number that it reads, so memory bounds it.
Each kernel reads its operands and writes its result once, and takes the unpadded input: the padding
value is what a masked load returns. Given `Affine`, a kernel quantizes its input when it loads it:
the codes are never in memory.

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
from profit_jax.kernels.affine import Affine
from profit_jax.kernels.padding import Margin, border_of, output_extent

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
  margin: Margin = 0,
  pad_value: float = 0.0,
  out_dtype: Any = None,
  codes: Affine | None = None,
) -> jax.Array:
  """Convolves each channel with its own filter; sums are float32.

  Interpreted where the current target is not a GPU. Where it has several devices, the batch is
  split over the mesh's axis `data`, and each device computes its part.

  Args:
    x: `[N, H, W, C]`, float32 or bfloat16.
    kernel: `[K, K, 1, C]`.
    stride: in both directions.
    margin: what is put around the images.
    pad_value: of the border.
    out_dtype: of the result; x's by default.
    codes: what the kernels read instead of x. Only the gradient uses x then, whose values must be
      these codes: XLA does not compute them. `codes` gets no gradient.

  Returns:
    `[N, (H + above + below - K) // stride + 1, (W + left + right - K) // stride + 1, C]`.

  Raises:
    ValueError: x or `codes.x` is not supported, see `supports`, or their shapes differ.
  """
  for array in (x,) if codes is None else (x, codes.x):
    if not supports(array):
      raise ValueError(
        f"The Triton kernels do not take {array.dtype}{list(array.shape)}. They take float32 and "
        "bfloat16, fewer than 2^31 elements per device, and a batch that divides over the devices."
      )
  if codes is not None and codes.x.shape != x.shape:
    raise ValueError(f"codes.x has shape {codes.x.shape}. It must have x's: {x.shape}.")
  where = target.current()
  mesh = where.mesh if where.mesh is not None and where.mesh.size > 1 else None
  layout = _Layout(where.platform != "gpu", mesh)
  dtypes = x.dtype, jnp.dtype(out_dtype or x.dtype)
  return _depthwise_conv(x, kernel, codes, stride, margin, float(pad_value), dtypes, layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6, 7))
def _depthwise_conv(x, kernel, codes, stride, margin, pad_value, dtypes, layout):
  def compute(x, kernel):
    return forward(
      x, kernel, stride, margin, pad_value, out_dtype=dtypes[1], interpret=layout.interpret
    )

  source = x if codes is None else codes
  return _per_device(compute, layout.mesh, (source, "s"), (kernel, "r"), result="s")


def _forward(x, kernel, codes, *static):
  source = x if codes is None else codes
  return _depthwise_conv(x, kernel, codes, *static), (source, kernel)


def _backward(stride, margin, pad_value, dtypes, layout, residuals, upstream):
  source, kernel = residuals
  size = kernel.shape[0]
  extent = _pixels_of(source).shape[1:3]

  def for_input(upstream, kernel):
    return input_gradient(
      upstream, kernel, extent, stride, margin, dtype=dtypes[0], interpret=layout.interpret
    )

  def for_kernel(x, upstream):
    gradient = filter_gradient(
      x, upstream, size, stride, margin, pad_value, interpret=layout.interpret
    )
    gradient = gradient if layout.mesh is None else lax.psum(gradient, "data")
    return gradient.astype(kernel.dtype)

  dx = _per_device(for_input, layout.mesh, (upstream, "s"), (kernel, "r"), result="s")
  dk = _per_device(for_kernel, layout.mesh, (source, "s"), (upstream, "s"), result="r")
  return dx, dk, None


_depthwise_conv.defvjp(_forward, _backward)


def _per_device(
  compute: Callable[..., jax.Array],
  mesh: Mesh | None,
  *operands: tuple[jax.Array | Affine, str],
  result: str,
) -> jax.Array:
  # XLA does not know how a Pallas call could be split; it would gather the operands first.
  arrays = [array for array, _ in operands]
  if mesh is None:
    return compute(*arrays)
  specs = {"s": PartitionSpec("data"), "r": PartitionSpec()}

  def spec(array, letter):
    if isinstance(array, Affine):
      return Affine(specs[letter], *[specs["r"]] * 5)
    return specs[letter]

  split = jax.shard_map(
    compute,
    mesh=mesh,
    in_specs=tuple(spec(*operand) for operand in operands),
    out_specs=specs[result],
    check_vma=False,
  )
  return split(*arrays)


def _pixels_of(x: jax.Array | Affine) -> jax.Array:
  return x.x if isinstance(x, Affine) else x


def _operands_of(x: jax.Array | Affine) -> list[jax.Array]:
  # What `_source` takes references to.
  return [x.x, *(each.astype(jnp.float32) for each in x[1:])] if isinstance(x, Affine) else [x]


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

  def code(self, value: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """`round(clip(value, low, high))` in float32, halves to even. NaN stays NaN."""
    if self.interpret:
      return jnp.round(jnp.clip(value, low, high))
    # Pallas lowers no rounding to Triton, and maximum and minimum to instructions that drop NaN.
    bounds = (jnp.broadcast_to(each, value.shape) for each in (low, high))
    out = jax.ShapeDtypeStruct(value.shape, value.dtype)
    return triton.elementwise_inline_asm(
      "max.NaN.f32 $0, $1, $2; min.NaN.f32 $0, $0, $3; cvt.rni.f32.f32 $0, $0;",
      args=(value, *bounds),
      constraints="=&f,f,f,f",
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


class _Quantized(_Pixels):
  """The codes of an array's elements, see `Affine`; `refs` are of its attributes."""

  def __init__(
    self, walk: _Walk, refs: tuple[Any, ...], shape: tuple[int, ...], stride: int, shift: int
  ):
    super().__init__(walk, refs[0], shape, stride, shift)
    mean, factor, bias = (walk.load(ref, walk.channel, walk.channels_inside) for ref in refs[1:4])
    self.mean = mean
    self.factor = factor
    self.bias = jnp.broadcast_to(bias, walk.zeros.shape)
    self.low = refs[4][0]
    self.high = refs[5][0]

  def load(self, row: jax.Array, count: int, other: float = 0.0, below: Any = True):
    """As of the array of codes, in float32: `other` is a code too."""
    inside = (row >= 0) & (row < self.height) & below
    codes = []
    for t in range(count):
      offset, mask = self.at(row, t, inside)
      centered = self.walk.load(self.ref, offset, mask).astype(jnp.float32) - self.mean
      scaled = self.walk.add_product(self.bias, centered, self.factor)
      codes.append(jnp.where(mask, self.walk.code(scaled, self.low, self.high), other))
    return codes


def _source(
  walk: _Walk, refs: tuple[Any, ...], shape: tuple[int, ...], stride: int, shift: int
) -> _Pixels:
  """An array's elements, or the codes that the kernel computes of them."""
  if len(refs) == 1:
    return _Pixels(walk, refs[0], shape, stride, shift)
  return _Quantized(walk, refs, shape, stride, shift)


def _both(*masks: jax.Array | None) -> jax.Array | None:
  given = [mask for mask in masks if mask is not None]
  return functools.reduce(jnp.logical_and, given) if given else None


def forward(
  x: jax.Array | Affine,
  kernel: jax.Array,
  stride: int,
  margin: Margin = 0,
  pad_value: float = 0.0,
  *,
  out_dtype: Any = None,
  interpret: bool = False,
  tile: Tile | None = None,
) -> jax.Array:
  """The convolution of one device; arguments and result as `depthwise_conv`'s."""
  size = kernel.shape[0]
  pixels = _pixels_of(x)
  height, width = output_extent(size, stride, margin, pixels.shape[1:3])
  shape = pixels.shape[0], height, width, pixels.shape[3]
  out = jax.ShapeDtypeStruct(shape, out_dtype or pixels.dtype)
  tile = tile or choose_tile(out.shape, size, stride)
  window = _Window(stride, _first(margin), pad_value, flip=False)
  return _correlate(x, kernel, out, window, _Walk(out.shape, tile, interpret))


class _Window(NamedTuple):
  """How a kernel moves over x: steps, rows above and columns left, the border's value, and whether
  it is reversed.
  """

  stride: int
  first: tuple[int, int]
  pad_value: float
  flip: bool


def _correlate(x, kernel, out, window, walk):
  # A row of x adds to several rows of y, which stay in registers until they are complete.
  size, stride, columns = kernel.shape[0], window.stride, walk.tile.columns
  depth = pl.cdiv(size, stride)
  reach = (columns - 1) * stride + size

  def compute(*refs):
    *x_refs, kernel_ref, y_ref = refs
    walk.start()
    taps = walk.taps(kernel_ref, size, window.flip)
    above, left = window.first
    source = _source(walk, x_refs, _pixels_of(x).shape, stride, -left)
    result = _Pixels(walk, y_ref, out.shape, 1, 0)

    def step(number, begun):
      group = walk.first + number
      rows = [
        source.load(group * stride + q - above, reach, window.pad_value) for q in range(stride)
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

  return walk.call(compute, out, *_operands_of(x), kernel)


def input_gradient(
  upstream: jax.Array,
  kernel: jax.Array,
  extent: tuple[int, int],
  stride: int,
  margin: Margin = 0,
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
  first = _first(margin)
  if stride == 1:
    before = size - 1 - first[0], size - 1 - first[1]
    return _correlate(upstream, kernel, out, _Window(1, before, 0.0, flip=True), walk)
  return _spread(upstream, kernel, out, stride, first, walk)


def _first(margin: Margin) -> tuple[int, int]:
  """Rows above and columns left: what follows the images is masked anyway."""
  (above, _), (left, _) = border_of(margin)
  return above, left


def _spread(upstream, kernel, out, stride, first, walk):
  # A cell is stride by stride pixels of dx. Pixel (u, v) of cell (R, C) has a term of
  # upstream[R + a, C + e] for each tap (u + above - stride * a, v + left - stride * e).
  size, columns = kernel.shape[0], walk.tile.columns
  above, left = first
  (top, bottom), (start, end) = (
    (-((size - 1 - each) // stride), (stride - 1 + each) // stride) for each in first
  )
  reach = columns + end - start

  def compute(upstream_ref, kernel_ref, dx_ref):
    walk.start()
    taps = walk.taps(kernel_ref, size)
    source = _Pixels(walk, upstream_ref, upstream.shape, 1, start)
    result = _Pixels(walk, dx_ref, out.shape, stride, 0)

    def pixel(rows, u, v, p):
      total = None
      for a in range(top, bottom + 1):
        for e in range(start, end + 1):
          i, j = u + above - stride * a, v + left - stride * e
          if 0 <= i < size and 0 <= j < size:
            total = walk.add_product(total, rows[a - top][p + e - start], taps[i][j])
      return walk.zeros if total is None else total

    def step(number, earlier):
      cell = walk.first + number
      rows = [*earlier, source.load(cell + bottom, reach)]
      for u in range(stride):
        for p in range(columns):
          for v in range(stride):
            total = pixel(rows, u, v, p)
            result.store(cell * stride + u, p * stride + v, total, cell < walk.height)
      return rows[1:]

    earlier = [source.load(walk.first + a, reach) for a in range(top, bottom)]
    lax.fori_loop(0, walk.tile.rows, step, earlier)

  return walk.call(compute, out, upstream, kernel)


def _filter_tile(x, shape, size, stride):
  tile = choose_tile(shape, size, stride)
  if isinstance(x, Affine) and stride > 1 and tile.warps > 1:
    # With 4 warps, the kernel of [128, 28, 28, 192] spills on an H100; with 2, none does.
    return tile._replace(strips=tile.strips // 2, warps=tile.warps // 2)
  return tile


def filter_gradient(
  x: jax.Array | Affine,
  upstream: jax.Array,
  size: int,
  stride: int,
  margin: Margin = 0,
  pad_value: float = 0.0,
  *,
  interpret: bool = False,
  tile: Tile | None = None,
) -> jax.Array:
  """The gradient of the kernel: `[size, size, 1, C]`, float32."""
  channels, (first_row, first_column) = upstream.shape[3], _first(margin)
  tile = tile or _filter_tile(x, upstream.shape, size, stride)
  walk = _Walk(upstream.shape, tile, interpret)
  columns, rows_walked = walk.tile.columns, walk.tile.rows
  depth = pl.cdiv(size, stride)
  reach = (columns - 1) * stride + size
  taps = size * size
  out = jax.ShapeDtypeStruct((walk.groups * walk.segments, taps, channels), jnp.float32)

  def compute(*refs):
    *x_refs, upstream_ref, sums_ref = refs
    walk.start()
    source = _source(walk, x_refs, _pixels_of(x).shape, stride, -first_column)
    gradient = _Pixels(walk, upstream_ref, upstream.shape, 1, 0)

    def step(number, carry):
      sums, above = list(carry[0]), carry[1]
      group = walk.first + number
      # recent[d] is row `group - d` of the gradient.
      new = gradient.load(group, columns, below=number < rows_walked)
      recent = [[value.astype(jnp.float32) for value in new], *above]
      rows = [source.load(group * stride + q - first_row, reach, pad_value) for q in range(stride)]
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

  parts = walk.call(compute, out, *_operands_of(x), upstream)
  return jnp.sum(parts, axis=0).reshape(size, size, 1, channels)
