"""Depthwise convolutions on a GPU: the time of each form of both passes. Needs JAX and NumPy only.

python benchmarks/depthwise_gpu.py [--seconds 100] [--batch 128]
python benchmarks/depthwise_gpu.py --tiny    # on a CPU: do all forms agree?

Layers are MobileNet-v2's at 224 pixels and one 5x5 of v3, most important first. The forms:

pallas    profit_jax.kernels.depthwise_triton; then with other tiles, as far as time allows
grouped   XLA's grouped convolution, which is cuDNN's, tuned
shifted   profit_jax.kernels.depthwise.sum_of_taps; the filter gradient is one stacked sum

float32 runs at JAX's default precision, which lets cuDNN use TF32. A figure is the median time of
one convolution of a program that does several, on different arrays, so that no cache holds them.
GB/s counts every operand and result once. The share is of what `x + 1` reaches in this run. `off`
is the largest difference to the first form that worked, over the largest value; `!` marks more than
rounding. Exit code: 0 if all agree, 1 if not, 2 without a GPU.
"""

import time

_BEGIN = time.monotonic()

import argparse
import concurrent.futures
import functools
import os
import pathlib
import statistics
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

# Of later versions of JAX, about Pallas's Triton backend.
warnings.simplefilter("ignore", DeprecationWarning)

import jax
import jax.numpy as jnp
from jax import lax

from profit_jax.kernels import depthwise_triton as triton_form
from profit_jax.kernels.depthwise import sum_of_taps

PASSES = ("forward", "input gradient", "filter gradient")


class Layer(NamedTuple):
  """A depthwise convolution; `count` is how often MobileNet-v2 has it."""

  pixels: int
  channels: int
  size: int
  stride: int
  count: int

  @property
  def margin(self) -> int:
    """Width of the border."""
    return (self.size - 1) // 2

  @property
  def result_pixels(self) -> int:
    """Rows and columns of the result."""
    return -(-self.pixels // self.stride)

  def shapes(self, batch: int) -> tuple[tuple[int, ...], ...]:
    """Of x, kernel and result."""
    return (
      (batch, self.pixels, self.pixels, self.channels),
      (self.size, self.size, 1, self.channels),
      (batch, self.result_pixels, self.result_pixels, self.channels),
    )

  def __str__(self) -> str:
    return (
      f"{self.pixels}x{self.pixels}x{self.channels} {self.size}x{self.size} stride {self.stride}"
    )


LAYERS = (
  Layer(56, 144, 3, 1, 1),
  Layer(112, 96, 3, 2, 1),
  Layer(112, 32, 3, 1, 1),
  Layer(14, 384, 3, 1, 4),
  Layer(28, 192, 3, 1, 2),
  Layer(28, 120, 5, 1, 0),
  Layer(7, 960, 3, 1, 3),
  Layer(56, 144, 3, 2, 1),
  Layer(14, 576, 3, 1, 2),
  Layer(28, 192, 3, 2, 1),
  Layer(14, 576, 3, 2, 1),
)
VARIED = LAYERS[:4] + LAYERS[5:6]
TINY = (Layer(7, 40, 3, 1, 1), Layer(10, 8, 3, 2, 1), Layer(9, 8, 5, 1, 1), Layer(8, 24, 5, 2, 1))
DTYPES = ("float32", "bfloat16")
# Inputs are exact in bfloat16 and TF32, so that only sums and bfloat16's results are rounded.
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-2}


def _pad(x: jax.Array, margin: int) -> jax.Array:
  around = [(0, 0, 0), (margin, margin, 0), (margin, margin, 0), (0, 0, 0)]
  return lax.pad(x, jnp.zeros((), x.dtype), around)


def grouped(layer: Layer, what: int) -> Callable[..., jax.Array]:
  """XLA's grouped convolution and its transposes."""

  def convolve(x, kernel):
    return lax.conv_general_dilated(
      x,
      kernel,
      (layer.stride, layer.stride),
      [(layer.margin, layer.margin)] * 2,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=layer.channels,
    )

  def for_input(upstream, kernel):
    x = jax.ShapeDtypeStruct(layer.shapes(upstream.shape[0])[0], upstream.dtype)
    return jax.linear_transpose(lambda x: convolve(x, kernel), x)(upstream)[0]

  def for_kernel(x, upstream):
    kernel = jax.ShapeDtypeStruct(layer.shapes(1)[1], x.dtype)
    return jax.linear_transpose(lambda kernel: convolve(x, kernel), kernel)(upstream)[0]

  return (convolve, for_input, for_kernel)[what]


def shifted(layer: Layer, what: int) -> Callable[..., jax.Array]:
  """A sum of shifted products."""
  size, stride, margin = layer.size, layer.stride, layer.margin

  def convolve(x, kernel):
    return sum_of_taps(_pad(x, margin), kernel, stride)

  def for_input(upstream, kernel):
    reach = stride * (upstream.shape[1] - 1) + 1
    low = size - 1 - margin
    around = (low, layer.pixels + size - 1 - reach - low, stride - 1)
    zero = jnp.zeros((), upstream.dtype)
    spread = lax.pad(upstream, zero, [(0, 0, 0), around, around, (0, 0, 0)])
    return sum_of_taps(spread, kernel[::-1, ::-1], 1)

  def for_kernel(x, upstream):
    padded = _pad(x, margin).astype(jnp.float32)
    wide = upstream.astype(jnp.float32)
    reach = stride * (layer.result_pixels - 1) + 1
    products = [
      padded[:, i : i + reach : stride, j : j + reach : stride] * wide
      for i in range(size)
      for j in range(size)
    ]
    sums = jnp.sum(jnp.stack(products), axis=(1, 2, 3))
    return sums.reshape(size, size, 1, layer.channels).astype(x.dtype)

  return (convolve, for_input, for_kernel)[what]


def pallas(
  layer: Layer, what: int, interpret: bool = False, vary: Callable[..., Any] | None = None
) -> Callable[..., jax.Array]:
  """The Triton kernels; `vary` gives another tile for the chosen one."""
  options = {"interpret": interpret}
  stride, margin = layer.stride, layer.margin

  def tiled(images, pixels):
    if vary is None:
      return options
    shape = images, pixels, pixels, layer.channels
    return {**options, "tile": vary(triton_form.choose_tile(shape, layer.size, stride))}

  def convolve(x, kernel):
    more = tiled(x.shape[0], layer.result_pixels)
    return triton_form.forward(x, kernel, stride, margin, **more)

  def for_input(upstream, kernel):
    extent = layer.pixels, layer.pixels
    more = tiled(upstream.shape[0], -(-layer.pixels // stride))
    return triton_form.input_gradient(upstream, kernel, extent, stride, margin, **more)

  def for_kernel(x, upstream):
    more = tiled(x.shape[0], layer.result_pixels)
    gradient = triton_form.filter_gradient(x, upstream, layer.size, stride, margin, **more)
    return gradient.astype(x.dtype)

  return (convolve, for_input, for_kernel)[what]


def _warps(tile, warps):
  return tile._replace(warps=warps, strips=max(1, tile.strips * warps // tile.warps))


VARIATIONS: dict[str, Callable[..., Any]] = {
  "columns * 2": lambda tile: tile._replace(columns=tile.columns * 2),
  "columns / 2": lambda tile: tile._replace(columns=tile.columns // 2),
  "rows * 2": lambda tile: tile._replace(rows=tile.rows * 2),
  "rows / 2": lambda tile: tile._replace(rows=-(-tile.rows // 2)),
  "channels * 2": lambda tile: tile._replace(strips=tile.strips * 2),
  "channels * 2, columns / 2": lambda tile: tile._replace(
    strips=tile.strips * 2, columns=tile.columns // 2
  ),
  "lanes 32": lambda tile: tile._replace(lanes=32, strips=max(1, tile.strips * tile.lanes // 32)),
  "warps 2": lambda tile: _warps(tile, 2),
  "warps 8": lambda tile: _warps(tile, 8),
}


class Group(NamedTuple):
  """A layer in one dtype: what is timed side by side."""

  layer: Layer
  dtype: str
  forms: tuple[str, ...]

  @property
  def arrays(self) -> tuple[Layer, str]:
    """What its arrays and programs depend on."""
    return self.layer, self.dtype

  def __str__(self) -> str:
    return f"{self.layer}, {self.dtype}{'' if 'grouped' in self.forms else ', other tiles'}"


class Bench:
  """The programs and figures of one run."""

  def __init__(self, options: argparse.Namespace):
    self.batch = 2 if options.tiny else options.batch
    self.tiny = options.tiny
    self.deadline = _BEGIN + (options.seconds or (900 if options.tiny else 100))
    self.wrong = 0
    self.copy_speed = float("nan")
    self.totals: dict[tuple[str, str], list[float]] = {}
    self.groups: list[Group] = []
    self.timed: set[Group] = set()
    layers = TINY if options.tiny else LAYERS
    for layer in layers:
      for dtype in DTYPES:
        self.groups.append(Group(layer, dtype, ("grouped", "shifted", "pallas")))
    for layer in () if options.tiny else VARIED:
      for dtype in DTYPES:
        names = (name for name in VARIATIONS if name != "lanes 32" or layer.channels % 32)
        self.groups.append(Group(layer, dtype, ("pallas", *names)))

  def left(self) -> float:
    """Seconds until the run must end."""
    return self.deadline - time.monotonic()

  def bytes_of(self, group: Group) -> int:
    """What a pass reads and writes at least, without kernels."""
    x, _, y = group.layer.shapes(self.batch)
    numbers = x[0] * x[1] * x[2] * x[3] + y[0] * y[1] * y[2] * y[3]
    return numbers * jnp.dtype(group.dtype).itemsize

  def copies(self, group: Group) -> int:
    """How many convolutions a program does, to reach about 1.5 GB."""
    return 1 if self.tiny else max(2, min(8, int(1.5e9 / self.bytes_of(group))))

  def function(self, group: Group, form: str, what: int) -> Callable[..., jax.Array]:
    """One pass of one form."""
    if form == "grouped":
      return grouped(group.layer, what)
    if form == "shifted":
      return shifted(group.layer, what)
    return pallas(group.layer, what, self.tiny, VARIATIONS.get(form))

  def arguments(self, group: Group, what: int, xs: Any, kernel: Any, ys: Any) -> list[tuple]:
    """Of each convolution of a program."""
    pairs = ((x, kernel) for x in xs), ((y, kernel) for y in ys), zip(xs, ys, strict=True)
    return list(pairs[what])

  def shapes(self, group: Group) -> tuple[list, Any, list]:
    """Of all xs, the kernel and all upstreams."""
    dtype = jnp.dtype(group.dtype)
    x, kernel, y = (jax.ShapeDtypeStruct(each, dtype) for each in group.layer.shapes(self.batch))
    copies = self.copies(group)
    return [x] * copies, kernel, [y] * copies

  def compile_data(self, group: Group) -> Callable[[], Any]:
    """A program that gives the arrays of `shapes`."""
    return jax.jit(functools.partial(_drawn, self.shapes(group))).lower().compile()

  def compile_form(self, group: Group, form: str, what: int) -> Callable[..., Any]:
    """A program of several convolutions, one after the other."""
    one = jax.jit(self.function(group, form, what))

    def several(all_arguments):
      results = []
      for arguments in all_arguments:
        if results:
          # Else XLA might join independent ones.
          results[-1], arguments = lax.optimization_barrier((results[-1], arguments))
        results.append(one(*arguments))
      return results

    arguments = self.arguments(group, what, *self.shapes(group))
    return jax.jit(several).lower(arguments).compile()

  def compile_difference(self, group: Group, what: int) -> Callable[..., Any]:
    """A program that compares two results of a pass."""
    y, x, kernel = (self.shapes(group)[place] for place in (2, 0, 1))
    shape = (y[0], x[0], kernel)[what]
    return jax.jit(_difference).lower(shape, shape).compile()

  def compile_all(self) -> dict[Any, concurrent.futures.Future]:
    """Everything, in the order of importance; what is not ready in time is left out."""
    workers = max(2, min(14, os.cpu_count() or 2))
    # Tuning cuDNN takes turns on the GPU; the other programs do not wait for it.
    tuning = concurrent.futures.ThreadPoolExecutor(max(1, workers // 3))
    pool = concurrent.futures.ThreadPoolExecutor(max(1, workers - workers // 3))
    jobs: dict[Any, concurrent.futures.Future] = {}
    for group in self.groups:
      data = group.arrays, "data"
      if data not in jobs:
        jobs[data] = pool.submit(self.compile_data, group)
      for what in range(len(PASSES)):
        difference = group.arrays, "difference", what
        if difference not in jobs:
          jobs[difference] = pool.submit(self.compile_difference, group, what)
        for form in group.forms:
          if (group.arrays, form, what) not in jobs:
            chosen = tuning if form == "grouped" else pool
            job = chosen.submit(self.compile_form, group, form, what)
            jobs[group.arrays, form, what] = job
    # Half of the time is for measuring. A compilation beside it would disturb it.
    concurrent.futures.wait(jobs.values(), timeout=max(5.0, 0.5 * self.left()))
    for each in (tuning, pool):
      each.shutdown(wait=False, cancel_futures=True)
    running = [job for job in jobs.values() if job.running()]
    concurrent.futures.wait(running, timeout=max(1.0, 0.2 * self.left()))
    done = sum(job.done() and not job.cancelled() for job in jobs.values())
    _say(f"{done} of {len(jobs)} programs compiled, {self.left():.0f} s left")
    return jobs

  def measure_copy(self) -> None:
    """The speed of `x + 1` on arrays that no cache holds."""
    size = 2**10 if self.tiny else 2**27
    arrays = [jnp.full((size,), float(value)) for value in range(3)]
    program = jax.jit(lambda arrays: [array + 1 for array in arrays]).lower(arrays).compile()
    self.copy_speed = 8 * size * len(arrays) / self.time(program, arrays)
    _say(f"copy {self.copy_speed / 1e9:.0f} GB/s")

  def time(self, program: Callable[..., Any], *arguments: Any) -> float:
    """Median seconds of a call, of turns of several calls."""

    def turn(calls):
      start = time.perf_counter()
      for _ in range(calls):
        results = program(*arguments)
      jax.block_until_ready(results)
      return (time.perf_counter() - start) / calls

    turn(1)
    once = turn(1)
    calls = max(1, min(10, int(5e-3 / once)))
    turns = 1 if self.tiny else max(3, min(15, int(0.15 / (calls * once))))
    return statistics.median(turn(calls) for _ in range(turns))

  def run_group(self, group: Group, jobs: dict[Any, concurrent.futures.Future]) -> None:
    """Times a group's forms and prints a line for each."""
    try:
      arrays = _made(jobs[group.arrays, "data"])()
      jax.block_until_ready(arrays)
    except Exception as error:
      _say(f"{group}: no data: {_short(error)}")
      return
    best = self.bytes_of(group) / self.copy_speed
    _say(f"\n{group}; at the copy's speed {best * 1e6:.1f} us")
    for what, name in enumerate(PASSES):
      arguments = self.arguments(group, what, *arrays)
      first = None
      for form in group.forms:
        if self.left() < 3:
          return
        try:
          figures, first = self.run_form(group, form, what, arguments, first, jobs)
        except Exception as error:
          figures = _short(error)
          late = isinstance(error, _NotCompiledError)
          self.wrong += self.tiny or ("grouped" in group.forms and not late)
        _say(f"  {name:16}{form:28}{figures}")
    self.timed.add(group)

  def run_form(self, group, form, what, arguments, first, jobs) -> tuple[str, Any]:
    """The line of figures of a form, and the result that others are compared with."""
    program = _made(jobs[group.arrays, form, what])
    result = program(arguments)[0]
    mark = ""
    if first is not None:
      off = float(_made(jobs[group.arrays, "difference", what])(result, first))
      agrees = off <= TOLERANCES[group.dtype]
      self.wrong += not agrees
      mark = f"  off {off:.0e}{'' if agrees else ' !'}"
    else:
      first = result
    seconds = self.time(program, arguments) / len(arguments)
    speed = self.bytes_of(group) / seconds
    if "grouped" in group.forms:
      totals = self.totals.setdefault((group.dtype, form), [0.0] * len(PASSES))
      totals[what] += group.layer.count * seconds
    figures = f"{seconds * 1e6:9.1f} us {speed / 1e9:6.0f} GB/s {speed / self.copy_speed:5.0%}"
    return figures + mark, first

  def finish(self) -> int:
    """Prints sums and what was left out; the exit code."""
    done = [group for group in self.groups if group in self.timed and "grouped" in group.forms]
    for dtype in DTYPES:
      count = sum(group.layer.count for group in done if group.dtype == dtype)
      _say(f"\nMobileNet-v2, {dtype}, {count} of 17 layers, ms: {', '.join(PASSES)}, sum")
      for (kind, form), totals in self.totals.items():
        if kind == dtype:
          _say(f"  {form:10}" + "".join(f"{1e3 * each:9.3f}" for each in (*totals, sum(totals))))
    for group in self.groups:
      if group not in self.timed:
        _say(f"no time for: {group}")
    if self.wrong:
      _say(f"{self.wrong} forms failed or differ")
    return int(
      self.wrong > 0 or not self.timed or (self.tiny and len(self.timed) < len(self.groups))
    )


class _NotCompiledError(Exception):
  """A program was not ready in time."""


def _made(job: concurrent.futures.Future) -> Any:
  if job.cancelled() or not job.done():
    raise _NotCompiledError("not compiled in time")
  return job.result()


def _drawn(shapes: Any) -> Any:
  # Multiples of 1/128 in [-1, 1), from a hash of the place.
  leaves, structure = jax.tree.flatten(shapes)
  drawn = []
  for number, leaf in enumerate(leaves):
    place = lax.iota(jnp.uint32, leaf.size) + jnp.uint32(number * 7_919 + 1)
    hashed = place * jnp.uint32(2_654_435_761)
    hashed = (hashed ^ (hashed >> 15)) * jnp.uint32(2_246_822_519)
    codes = ((hashed >> 13) & 255).astype(jnp.int32) - 128
    drawn.append((codes.astype(jnp.float32) / 128).astype(leaf.dtype).reshape(leaf.shape))
  return jax.tree.unflatten(structure, drawn)


def _difference(result: jax.Array, first: jax.Array) -> jax.Array:
  first = first.astype(jnp.float32)
  largest = jnp.max(jnp.abs(first))
  # NaN must not pass as equal.
  return jnp.max(jnp.abs(result.astype(jnp.float32) - first)) / largest


def _short(error: Exception) -> str:
  return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _say(line: str) -> None:
  print(line, flush=True)


def _end_at_the_limit(bench: Bench) -> None:
  # Whatever hangs: a compilation, an autotuning, a kernel.
  def end():
    code = 1
    try:
      _say("\nOut of time.")
      code = bench.finish()
    finally:
      sys.stdout.flush()
      os._exit(code)

  timer = threading.Timer(max(1.0, bench.left() - 1), end)
  timer.daemon = True
  timer.start()


def main() -> None:
  """Compiles everything, then times it."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--seconds", type=float, help="for everything, a hard limit; 100 by default")
  parser.add_argument("--batch", type=int, default=128)
  parser.add_argument("--tiny", action="store_true", help="on a CPU, interpreted, small shapes")
  options = parser.parse_args()
  if options.tiny:
    jax.config.update("jax_platforms", "cpu")
  device = jax.devices()[0]
  if not options.tiny and device.platform not in ("gpu", "cuda"):
    print(f"No GPU: JAX runs on {device.platform}. --tiny checks the forms on a CPU.")
    sys.exit(2)
  bench = Bench(options)
  _end_at_the_limit(bench)
  _say(f"{device.device_kind}, jax {jax.__version__}, batch {bench.batch}")
  bench.measure_copy()
  jobs = bench.compile_all()
  for group in bench.groups:
    if bench.left() < 4:
      break
    bench.run_group(group, jobs)
  code = bench.finish()
  sys.stdout.flush()
  os._exit(code)  # threads may still compile


if __name__ == "__main__":
  main()
