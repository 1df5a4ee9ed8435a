"""The Triton kernels, interpreted on a CPU, against XLA's grouped convolution in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from profit_jax import depthwise
from profit_jax.kernels import depthwise_triton, target

# Kernel, stride, height and width, channels, margin, pad_value.
CASES = {
  "3x3": (3, 1, (7, 9), 10, 1, 0.0),
  "3x3 of three row segments": (3, 1, (29, 5), 8, 1, -0.375),
  "3x3, stride 2": (3, 2, (8, 7), 40, 1, -0.375),
  "3x3, stride 2, two row segments": (3, 2, (31, 6), 3, 1, 0.0),
  "5x5": (5, 1, (6, 9), 8, 2, -0.375),
  "5x5, stride 2": (5, 2, (9, 8), 5, 2, 0.5),
  "a row and columns that no window reaches": (5, 2, (8, 12), 8, 0, 0.0),
  "a border wider than the kernel": (3, 1, (4, 5), 8, 4, 1.0),
  "a border wider than the kernel, stride 2": (3, 2, (5, 4), 8, 3, 1.0),
}


def _drawn(case, dtype=np.float32, images=2):
  size, stride, extent, channels, margin, _ = case
  rng = np.random.default_rng(size)
  height, width = ((each + 2 * margin - size) // stride + 1 for each in extent)
  shapes = (
    (images, *extent, channels),
    (size, size, 1, channels),
    (images, height, width, channels),
  )
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def _all_three(convolve, x, kernel, upstream):
  """The result and both gradients."""
  y, vjp = jax.vjp(convolve, x, kernel)
  return y, *vjp(upstream.astype(y.dtype))


def _ours(case, out_dtype=None):
  _, stride, _, _, margin, pad_value = case

  def convolve(x, kernel):
    return depthwise_triton.depthwise_conv(x, kernel, stride, margin, pad_value, out_dtype)

  return jax.jit(functools.partial(_all_three, convolve))


def _expected(case, *arrays):
  _, stride, _, _, margin, pad_value = case
  around = [(0, 0, 0), (margin, margin, 0), (margin, margin, 0), (0, 0, 0)]

  def convolve(x, kernel):
    padded = jax.lax.pad(x, jnp.asarray(pad_value, x.dtype), around)
    return depthwise.grouped(padded, kernel, stride)

  with jax.enable_x64(True):
    wide = [jnp.asarray(np.asarray(array, np.float64)) for array in arrays]
    return [np.asarray(each) for each in jax.jit(functools.partial(_all_three, convolve))(*wide)]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_result_and_gradients(case):
  arrays = _drawn(case)
  for ours, expected in zip(_ours(case)(*arrays), _expected(case, *arrays), strict=True):
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("out_dtype", [None, jnp.float32])
def test_bfloat16_is_summed_in_float32(out_dtype):
  case = CASES["3x3, stride 2"]
  arrays = _drawn(case, jnp.bfloat16)
  results = _ours(case, out_dtype)(*arrays)
  assert [each.dtype for each in results] == [out_dtype or jnp.bfloat16, *[jnp.bfloat16] * 2]
  for ours, expected in zip(results, _expected(case, *arrays), strict=True):
    # bfloat16 has 8 significant bits: rounding once is off by at most 2^-8.
    rounding = 2**-8 if ours.dtype == jnp.bfloat16 else 1e-6
    near = 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(ours.astype(jnp.float32), expected, rtol=rounding, atol=near)


def test_four_devices_compute_what_one_computes():
  case = CASES["3x3, stride 2"]
  arrays = _drawn(case, images=8)
  alone = _ours(case)(*arrays)
  mesh = Mesh(np.asarray(jax.devices()[:4]), ("data",))
  split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
  x, kernel, upstream = map(jax.device_put, arrays, (split, whole, split))
  with target.tracing_for(target.Target("cpu", mesh=mesh)):
    compiled = _ours(case).lower(x, kernel, upstream).compile()
  assert "all-gather" not in compiled.as_text()
  y, dx, dk = compiled(x, kernel, upstream)
  np.testing.assert_array_equal(y, alone[0])
  np.testing.assert_array_equal(dx, alone[1])
  np.testing.assert_allclose(dk, alone[2], rtol=1e-6, atol=1e-6 * np.abs(alone[2]).max())


def test_what_the_kernels_do_not_take_is_refused():
  with jax.enable_x64(True), pytest.raises(ValueError, match="float32 and bfloat16"):
    depthwise_triton.depthwise_conv(jnp.ones((1, 4, 4, 1), np.float64), jnp.ones((3, 3, 1, 1)), 1)


@pytest.mark.parametrize(
  ("kernels", "dtype", "images", "triton"),
  [
    ("tuned", jnp.float32, 8, True),
    ("tuned", jnp.bfloat16, 8, True),
    ("xla", jnp.float32, 8, False),
    ("tuned", jnp.float16, 8, False),
    ("tuned", jnp.float32, 6, False),  # does not divide over the devices
  ],
)
def test_gpus_use_them_where_they_can(kernels, dtype, images, triton):
  mesh = Mesh(np.asarray(jax.devices()[:4]), ("data",))
  x = jax.ShapeDtypeStruct((images, 8, 8, 4), dtype)
  kernel = jax.ShapeDtypeStruct((3, 3, 1, 4), dtype)
  with target.tracing_for(target.Target("gpu", kernels, mesh)):
    traced = jax.jit(lambda x, kernel: depthwise.depthwise_conv(x, kernel, 1, 1)).trace(x, kernel)
  assert ("pallas_call" in str(traced.jaxpr)) == triton
