"""The Triton kernels, interpreted on a CPU, against XLA's grouped convolution in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from profit_jax.kernels import depthwise, depthwise_triton, target
from profit_jax.kernels.affine import Affine
from profit_jax.kernels.padding import border_of, output_extent

# Kernel, stride, height and width, channels, margin, pad_value.
CASES = {
  "3x3": (3, 1, (7, 9), 10, 1, 0.0),
  "3x3 of three row segments": (3, 1, (29, 5), 8, 1, -0.375),
  "3x3, stride 2": (3, 2, (8, 7), 40, 1, -0.375),
  "3x3, stride 2, two row segments": (3, 2, (31, 6), 3, 1, 0.0),
  "5x5": (5, 1, (6, 9), 8, 2, -0.375),
  "5x5, stride 2": (5, 2, (9, 8), 5, 2, 0.5),
  "a row and columns that no window reaches": (5, 2, (8, 12), 8, 0, 0.0),
  "TensorFlow's SAME, stride 2": (3, 2, (8, 7), 8, ((0, 1), (1, 1)), -0.375),
  "TensorFlow's SAME, 5x5, stride 2": (5, 2, (9, 8), 5, ((2, 2), (1, 2)), 0.0),
  "a border on one side": (3, 1, (4, 6), 8, ((0, 2), (1, 0)), 1.0),
  "a border wider than the kernel": (3, 1, (4, 5), 8, 4, 1.0),
  "a border wider than the kernel, stride 2": (3, 2, (5, 4), 8, 3, 1.0),
}


def _drawn(case, dtype=np.float32, images=2):
  size, stride, extent, channels, margin, _ = case
  rng = np.random.default_rng(size)
  height, width = output_extent(size, stride, margin, extent)
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
  rows, columns = border_of(margin)
  around = [(0, 0, 0), (*rows, 0), (*columns, 0), (0, 0, 0)]

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


# Few significant bits: float32 computes every sum and product exactly, in any order, with or
# without fused multiply-adds. Many of the values that are rounded are halves.
def _exact(case, source=np.float32, carrier=np.float32, images=2):
  """`Affine` of a case, its codes from float64, a kernel, and a gradient of the result."""
  _, _, extent, channels, _, _ = case
  rng = np.random.default_rng(0)
  x = rng.integers(-32, 32, (images, *extent, channels)) / 8
  mean = rng.integers(-8, 8, channels) / 8
  factor = rng.choice([0.5, 1.0, 2.0, -4.0], channels)
  bias = rng.integers(-4, 4, channels) / 2
  low, high = -2.0, 5.0
  values = np.round(np.clip((x - mean) * factor + bias, low, high))
  vectors = (jnp.asarray(each, jnp.float32) for each in (mean, factor, bias, low, high))
  codes = Affine(jnp.asarray(x, source), *vectors)
  _, kernel, upstream = (np.round(4 * each) / 4 for each in _drawn(case, images=images))
  return codes, *(jnp.asarray(each, carrier) for each in (values, kernel, upstream))


def _from_codes(case, out_dtype=None):
  _, stride, _, _, margin, pad_value = case

  def all_three(x, kernel, upstream, codes):
    def convolve(x, kernel):
      return depthwise_triton.depthwise_conv(x, kernel, stride, margin, pad_value, out_dtype, codes)

    return _all_three(convolve, x, kernel, upstream)

  return jax.jit(all_three)


@pytest.mark.parametrize("dtypes", [("float32",) * 2, ("bfloat16",) * 2, ("float32", "bfloat16")])
@pytest.mark.parametrize(
  "case", ["3x3 of three row segments", "3x3, stride 2", "5x5", "5x5, stride 2"]
)
def test_codes_are_computed_on_load(case, dtypes):
  case = CASES[case]
  source, carrier = dtypes
  codes, values, kernel, upstream = _exact(case, source, carrier)
  assert len(np.unique(values)) == 8
  unread = jnp.full_like(values, jnp.nan)
  results = _from_codes(case, jnp.float32)(unread, kernel, upstream, codes)
  assert [each.dtype for each in results] == [jnp.float32, carrier, carrier]
  for ours, plain in zip(results, _ours(case, jnp.float32)(values, kernel, upstream), strict=True):
    np.testing.assert_array_equal(ours, plain)


def test_codes_of_nan_are_nan():
  case = CASES["3x3"]
  codes, values, kernel, upstream = _exact(case)
  codes = codes._replace(x=codes.x.at[0, 0, 0, 0].set(jnp.nan))
  y, _, dk = _from_codes(case)(values, kernel, upstream, codes)
  assert np.isnan(y[0, 0, 0, 0])
  assert np.isnan(dk[..., 0]).any()
  assert np.isfinite(y[1:]).all()
  assert np.isfinite(dk[..., 1:]).all()


def test_codes_on_four_devices():
  case = CASES["3x3, stride 2"]
  codes, values, kernel, upstream = _exact(case, images=8)
  alone = _from_codes(case)(values, kernel, upstream, codes)
  mesh = Mesh(np.asarray(jax.devices()[:4]), ("data",))
  split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
  shardings = split, whole, split, Affine(split, *[whole] * 5)
  arguments = jax.device_put((values, kernel, upstream, codes), shardings)
  with target.tracing_for(target.Target("cpu", mesh=mesh)):
    compiled = _from_codes(case).lower(*arguments).compile()
  assert "all-gather" not in compiled.as_text()
  for split_result, result in zip(compiled(*arguments), alone, strict=True):
    np.testing.assert_array_equal(split_result, result)


@pytest.mark.parametrize("on_load", [True, False])
def test_xla_does_not_compute_the_codes_that_a_kernel_computes(on_load):
  codes, _, kernel, upstream = _exact(CASES["3x3"])

  def step(codes, kernel, upstream):
    def loss(kernel):
      x = jnp.sin(codes.x)  # any operation that a kernel does not have
      y = depthwise_triton.depthwise_conv(x, kernel, 1, 1, codes=codes if on_load else None)
      return jnp.sum(y * upstream)

    return loss(kernel), jax.grad(loss)(kernel)

  text = jax.jit(step).lower(codes, kernel, upstream).compile().as_text()
  assert ("sine(" in text) != on_load


def test_codes_get_no_gradient():
  codes, values, kernel, _ = _exact(CASES["3x3"])

  def total(codes):
    return depthwise_triton.depthwise_conv(values, kernel, 1, 1, codes=codes).sum()

  for gradient in jax.tree.leaves(jax.jit(jax.grad(total))(codes)):
    assert not gradient.any()


def test_codes_of_another_shape_are_refused():
  codes, values, kernel, _ = _exact(CASES["3x3"])
  with pytest.raises(ValueError, match=r"codes\.x has shape"):
    depthwise_triton.depthwise_conv(values[:1], kernel, 1, codes=codes)


def test_codes_that_the_kernels_do_not_take_are_refused():
  codes, values, kernel, _ = _exact(CASES["3x3"], source=jnp.float16)
  with pytest.raises(ValueError, match="float16"):
    depthwise_triton.depthwise_conv(values, kernel, 1, codes=codes)
