"""What the verification of a file finds, and on which images."""

import dataclasses

import jax
import numpy as np
import pytest

from profit_jax.export import onnx_file, reference, verify
from profit_jax.export.net import IMAGE, Activation, Layer, Net, Quantizer, Sum, Value
from profit_jax.models import student_spec
from profit_jax.quant.bits import Bits
from tests.export.nets import (
  NORMALIZATION,
  changed,
  digits,
  every_operation,
  images,
  random_net,
  small_settings,
)
from tests.specs import init_variables
from tests.train.tiny import TinyNet

# XLA's default; the other tests compile without optimizations, to be faster.
OPTIMIZED = {"xla_backend_optimization_level": 3}


@pytest.fixture(scope="module")
def net():
  return every_operation(4, 4)


def runner_of(net, folder):
  """In onnxruntime, since it needs no compilation."""
  onnx_file.write(net, folder / "net.onnx")
  return onnx_file.open_file(folder / "net.onnx")


@pytest.fixture(scope="module")
def runner(net, tmp_path_factory):
  return runner_of(net, tmp_path_factory.mktemp("files"))


def test_a_wrong_number_in_one_channel_is_found_where_it_is(net, tmp_path):
  (layer,) = (layer for layer in net.layers if layer.name == "block01/depthwise_conv")
  bias = layer.bias.copy()
  bias[2] += 0.5
  wrong = runner_of(changed(net, layer.name, bias=bias), tmp_path)
  compared = verify.compare(net, [images()], verify.file_codes(wrong))
  assert not compared.at_ties
  assert not compared.exact
  assert [row.quantizer for row in compared.rows if row.apart] == ["block01/depthwise_quant"]


def test_codes_of_other_quantizers_are_refused(net, runner):
  logits, codes = runner.run(images(), with_codes=True)
  codes["head"] = codes.pop("head_quant")
  with pytest.raises(KeyError, match=r"head.*head_quant"):
    verify.compare(net, [images()], lambda _: (logits, codes))


def test_a_compiled_product_is_rounded_before_it_is_added_to():
  # XLA would join the two into one operation that rounds once, and ties would fall elsewhere.
  rng = np.random.default_rng(0)
  codes = np.float32(rng.integers(0, 16, (*images().shape[:3], 3)))
  kernel = rng.integers(-7, 8, (1, 1, 3, 3)).astype(np.int8)
  multiplier, bias = np.float32(rng.normal(size=(2, 3)))
  numbers = {"inverse": 1.0, "margin": 0.0, "low": 0, "high": 15, "bits": 4, "scale": 1.0}
  scale, offset = float(np.float32(0.137)), -0.375
  net = Net(
    "products",
    (
      Quantizer(name="quant", input=IMAGE, **numbers),
      Layer(name="conv", input="quant", kernel=kernel, multiplier=multiplier, bias=bias, bits=4),
      Activation(name="conv/hard_swish", input="conv", function="hard_swish"),
      Value(name="quant/value", input="quant", scale=scale, offset=offset),
      Sum(name="sum", input="conv/hard_swish", other="quant/value"),
    ),
    images().shape[1:],
    NORMALIZATION,
    4,
    4,
  )

  def run(image):
    pixels = []
    result = reference.run(net, image, quantize=lambda _, x: pixels.append(x) or codes)
    return pixels[0], result

  pixels, result = jax.jit(run, compiler_options=OPTIMIZED)(images())
  factor, summand = net.pixel_scale()
  np.testing.assert_array_equal(pixels, np.float32(images()) * factor + summand)
  x = np.float32(codes @ np.float32(kernel[0, 0])) * multiplier + bias
  swish = x * np.clip(x + np.float32(3), np.float32(0), np.float32(6)) * np.float32(1 / 6)
  value = codes * np.float32(scale) + np.float32(offset)
  np.testing.assert_array_equal(result, swish + value)


def test_the_first_images_are_compared_in_equal_parts(net, runner):
  source, codes = digits(), runner.run(images(), with_codes=True)[1]
  per_image = sum(array[0].size for array in codes.values())
  (few,) = verify.eval_images(net, source, 4, max_codes=10 * per_image - 1)
  np.testing.assert_array_equal(few, next(source.eval_batches(10))["image"])
  everything = np.concatenate(verify.eval_images(net, source, 232))
  np.testing.assert_array_equal(everything, next(source.eval_batches(450))["image"])
  # As codes of images of this size, 450 are too many for one part.
  parts = verify.eval_images(net._replace(image_shape=(64, 64, 3)), source, 232)
  assert len(parts) > 1
  assert len({len(part) for part in parts}) == 1
  np.testing.assert_array_equal(np.concatenate(parts), everything[: len(parts) * len(parts[0])])


def test_a_net_without_codes_is_compared_on_as_many_pixels(net):
  first = next(node for node in net.nodes if isinstance(node, Layer))
  floats = net._replace(nodes=(first,))
  pixels = np.prod(net.image_shape)
  (few,) = verify.eval_images(floats, digits(), 4, max_codes=10 * pixels)
  np.testing.assert_array_equal(few, next(digits().eval_batches(10))["image"])


class Changed:
  """A runner that is wrong where codes are asked for."""

  def __init__(self, runner, logits_factor=1.0, codes_summand=0):
    self._runner, self._factor, self._summand = runner, logits_factor, codes_summand

  def run(self, image, with_codes=False):
    logits, codes = self._runner.run(image, with_codes)
    factor = self._factor if with_codes else 1.0
    return logits * factor, {name: array + self._summand for name, array in codes.items()}


def test_a_file_is_what_was_trained_or_why_it_is_not(net, runner):
  settings = small_settings("mobilenet_v1")

  def check(runner, top1):
    trained = verify.TrainedModel(
      settings, 1.0, 1347, digits(), None, None, None, 4, 4, None, [], "raw", None, top1
    )
    return verify.check_file(net, [images()], runner, trained)

  other = check(runner, 100.0)
  assert (other.trained_correct, other.examples) == (450, 450)
  assert other.correct < 450
  assert "top-1" in other.problem
  same = check(runner, 100.0 * other.correct / 450)
  assert same.problem is None
  assert same.comparison.exact
  assert same.comparison.images == len(images())
  assert same.correct == same.trained_correct == other.correct
  wrong = check(Changed(runner, codes_summand=1), 100.0)
  assert "codes differ" in wrong.problem
  assert not wrong.comparison.exact
  watched = check(Changed(runner, logits_factor=1.01), 100.0)
  assert "logits" in watched.problem
  assert watched.comparison is None


class Mirrored:
  """A runner of the reference in which one quantizer's codes are the highest less what they are."""

  def __init__(self, net, name):
    @jax.jit
    def run(image):
      found = {}

      def quantize(node, x):
        codes = reference.codes(node, x)
        found[node.name] = node.high - codes if node.name == name else codes
        return found[node.name]

      return reference.run(net, image, quantize=quantize), found

    self._run = run

  def run(self, image, with_codes=False):
    logits, codes = jax.device_get(self._run(image))
    return logits, codes if with_codes else {}


def test_images_of_another_class_are_explained_by_ties_or_not_at_all(monkeypatch):
  settings, variables, net = random_net("mobilenet_v1", 4, 4)
  spec = student_spec(settings, 10)
  trained = verify.TrainedModel(
    settings, 1.0, 1347, digits(), spec, variables, NORMALIZATION, 4, 4, None, [], "raw", None, 0.0
  )
  exact, mirrored = Mirrored(net, ""), Mirrored(net, net.quantizers[-1].name)

  def check(runner):
    return verify.check_file(net, [images()], runner, trained)

  correct = check(exact).correct
  # One image of 450 is more than ties may explain.
  trained = dataclasses.replace(trained, top1=100.0 * (correct + 1) / 450)
  assert "top-1" in check(exact).problem
  monkeypatch.setattr(verify, "_TOP1_AT_TIES", 1.0)
  assert (check(exact).problem, check(exact).at_ties) == (None, 0)
  # Other codes are no ties.
  trained = dataclasses.replace(trained, top1=100.0)
  monkeypatch.setattr(verify.Comparison, "exact", True)
  assert "top-1" in check(mirrored).problem
  # If they were, all images of another class would be explained.
  monkeypatch.setattr(verify, "_TIE", 1e6)
  found = check(mirrored)
  assert (found.problem, found.at_ties) == (None, 450)


def test_another_accuracy_is_not_equal():
  assert verify.top1_equal(440, 440, 450)
  assert not verify.top1_equal(439, 440, 450)
  assert verify.top1_equal(35_001, 35_003, 50_000)  # 70.00 and 70.01 %: two images of 50,000
  assert not verify.top1_equal(35_000, 35_003, 50_000)


def test_a_float_fed_quantizer_reads_more_than_one_sum(net):
  fed = net.float_fed()
  reads = {quantizer.name: quantizer.input for quantizer in net.quantizers}
  assert IMAGE not in reads.values()
  assert "block00/input_quant" in fed  # the image's convolution
  assert "block00/squeeze_excite/input_quant" in fed  # a mean
  assert "block00/depthwise_quant" in fed  # a product
  assert "block02/input_quant" in fed  # a shortcut
  assert not fed & {"block01/expand_quant", "block01/depthwise_quant", "pre_classifier_quant"}


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_the_trained_model_is_run_at_the_highest_precision(monkeypatch, platform):
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  model, bits = TinyNet(), Bits(4, None)  # no product of codes with codes
  variables = init_variables(model, jax.random.key(0), 16)
  program = verify._trained_values.__wrapped__
  jaxpr = jax.make_jaxpr(program, static_argnums=(0, 1))(
    model, NORMALIZATION, variables, np.zeros((1, 16, 16, 3), np.uint8), bits
  )
  text = str(jaxpr)
  assert text.count("Precision.HIGHEST") >= 4
  assert "Precision.DEFAULT" not in text
  assert "pallas_call" not in text
