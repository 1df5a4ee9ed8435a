"""The library: own models and batches, resumed to the bit; and what users get wrong."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

import profit_jax as pj
from profit_jax.cli import app, compare, predict, to_torch
from profit_jax.nn.spec import describe
from profit_jax.train.interrupt import Stopped
from tests.export import own_models
from tests.train.processes import config

STEPS, ROWS = 4, 8


class Net(nn.Module):
  """One channel, a plain layer, no norm behind one convolution, a head without bias."""

  @nn.compact
  def __call__(self, x, bits=pj.Bits(), train=False):
    x = pj.QuantAct("symmetric", name="in_quant")(x, bits)
    x = pj.QuantConv(4, 5, stride=2, name="conv")(x, bits)
    x = pj.QuantAct("unsigned", name="quant")(pj.BatchNorm(name="norm")(x, train, "relu"), bits)
    x = nn.relu(pj.QuantConv(4, 3, depthwise=True, name="depthwise")(x, bits))
    x = nn.LayerNorm(name="plain_norm")(nn.Dense(6, name="plain")(jnp.mean(x, (1, 2))))
    x = pj.QuantAct("symmetric", name="head_quant")(x, bits)
    return pj.QuantDense(3, use_bias=False, name="head")(x, bits)


def batch(seed, rows=ROWS, size=8, channels=1):
  rng = np.random.default_rng(seed)
  label = rng.integers(0, 3, rows)
  image = rng.normal(size=(rows, size, size, channels)) + label[:, None, None, None]
  return {"image": np.float32(image), "label": label}


def train(epoch, first_step):
  return (batch((epoch, step)) for step in range(first_step, STEPS))


EVAL = [batch(100), batch(101, rows=5)]
DATA = pj.Data(train=train, eval=EVAL, steps_per_epoch=STEPS)
SCHEDULE = pj.profit_schedule(
  weight_bits=(4,),
  act_bits=(8,),
  full_precision_epochs=2,
  finetune_epochs=1,
  bn_epochs=0,
  sampling_epochs=1,
  freeze_fractions=(0.5,),
  learning_rate=0.05,
)
OPTIONS = pj.Options(train=pj.TrainSettings(ema_rate=0.5))


class Seen(pj.Observer):
  """Collects what it is told; stops the run at a step of a phase."""

  def __init__(self, stop_at=None):
    self.epochs, self.losses, self.params = [], [], []
    self._stop_at, self._steps = stop_at, 0

  def epoch_done(self, report):
    self.epochs.append((report.phase.name, report.evaluation["top1"]))
    self.losses.append(report.train)
    self.params.append(report.params)

  def stop_point(self, number):
    self._steps += 1
    if self._steps == self._stop_at:
      import signal

      raise Stopped(signal.SIGTERM)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  seen = Seen()
  trainer = pj.Trainer(
    Net(), SCHEDULE, tmp_path_factory.mktemp("whole"), callbacks=[seen], options=OPTIONS
  )
  return trainer.fit(DATA), seen


def test_an_own_model_learns_and_says_what_it_ended_with(whole):
  result, seen = whole
  assert [name for name, _ in seen.epochs] == ["fp", "fp", "a8 ft", "w4a8 sampling", "w4a8 ft1"]
  assert result.bits == result.spec.bits.at(4, 8)
  assert len(result.phases) == len(SCHEDULE)
  # Of two convolutions one was frozen.
  assert len(result.phases[-1].frozen) == 1
  assert set(result.phases[-1].frozen) <= {"conv", "depthwise"}
  # The result is what the model computes of its variables: each example counts once.
  correct = total = 0
  for each in EVAL:
    logits = Net().apply(result.variables, each["image"], result.bits)
    correct += np.sum(np.argmax(logits, 1) == each["label"])
    total += len(each["label"])
  assert total == 13
  np.testing.assert_allclose(result.top1, 100 * correct / total, rtol=1e-6)


def test_a_stopped_run_resumes_to_the_bit(whole, tmp_path):
  result, _ = whole
  for stop_at in (3, 9):
    with pytest.raises(pj.Stopped, match="everything is saved"):
      pj.Trainer(Net(), SCHEDULE, tmp_path, callbacks=[Seen(stop_at)], options=OPTIONS).fit(DATA)
  again = pj.Trainer(Net(), SCHEDULE, tmp_path, options=OPTIONS).fit(DATA)
  jax.tree.map(np.testing.assert_array_equal, again.variables, result.variables)
  assert [dataclasses.replace(e, loss=0) for e in again.epochs] == [
    dataclasses.replace(e, loss=0) for e in result.epochs
  ]


def test_a_directory_of_another_schedule_is_refused(whole):
  other = pj.profit_schedule(weight_bits=(3,), act_bits=(8,), finetune_epochs=1)
  with pytest.raises(pj.ConfigError, match="another run"):
    pj.Trainer(Net(), other, whole[0].workdir, options=OPTIONS).fit(DATA)


def test_weights_are_read_from_the_runs_directory(whole):
  result, _ = whole
  back = pj.load_weights(result.workdir, Net(), (8, 8, 1))
  jax.tree.map(np.testing.assert_array_equal, back, result.variables)


def test_runs_are_compared_with_each_other(whole, capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "200")
  workdir = str(whole[0].workdir)
  assert compare.main([workdir, workdir]) == 0
  printed = capsys.readouterr().out
  for text in ("Net", "8x8x1 float32", "w4a8", f"{whole[0].top1:.2f} %", "settings are the same"):
    assert text in printed


@pytest.mark.parametrize(
  "command",
  [
    lambda run: app.main(None, run, "eval"),
    lambda run: app.main(None, run, "export"),
    lambda run: app.main(config(), run, "train"),
    lambda run: app.main(config(), f"{run}_new", "train", fork_from=run),
    lambda run: to_torch.write(run, "net.safetensors", None),
  ],
  ids=["eval", "export", "train", "fork", "to-torch"],
)
def test_commands_that_need_a_configured_run_say_what_to_do(whole, tiny, command):
  with pytest.raises(pj.ConfigError, match=r"is a run of the library.*Trainer\.fit"):
    command(str(whole[0].workdir))


def fit(tmp_path, model=None, data=None, schedule=SCHEDULE, **more):
  trainer = pj.Trainer(model or Net(), schedule, tmp_path / "run", options=OPTIONS, **more)
  return trainer.fit(data or DATA)


def of_batches(*batches, steps=None):
  return pj.Data(train=list(batches), eval=EVAL, steps_per_epoch=steps or len(batches))


class NeverQuantizes(nn.Module):
  @nn.compact
  def __call__(self, x, bits=pj.Bits(), train=False):
    return nn.Dense(3)(jnp.mean(x, (1, 2)))


class OnlyWeights(nn.Module):
  @nn.compact
  def __call__(self, x, bits=pj.Bits(), train=False):
    return pj.QuantDense(3)(jnp.mean(x, (1, 2)), bits)


class TwoOutputs(nn.Module):
  @nn.compact
  def __call__(self, x, bits=pj.Bits(), train=False):
    y = pj.QuantDense(3)(jnp.mean(x, (1, 2)), bits)
    return y, y


class TwoInputs(nn.Module):
  @nn.compact
  def __call__(self, x, y, bits, train):
    return x + y


class CalledTwice(nn.Module):
  @nn.compact
  def __call__(self, x, bits=pj.Bits(), train=False):
    dense = pj.QuantDense(3, name="dense")
    return dense(dense(jnp.mean(x, (1, 2)) * jnp.ones(3), bits), bits)


class WithoutBits(nn.Module):
  @nn.compact
  def __call__(self, x, bits=pj.Bits(), train=False):
    x = pj.QuantAct("symmetric", name="quant")(jnp.mean(x, (1, 2)), bits)
    return pj.QuantDense(3, name="dense")(x)


class WithList(WithoutBits):
  widths: Any = ()


class Wrong(nn.Module):
  kind: str = "unsigned"
  activation: str = "relu"
  size: int = 3

  @nn.compact
  def __call__(self, x, bits=pj.Bits(), train=False):
    x = pj.QuantConv(4, self.size, name="conv")(x, bits)
    x = pj.BatchNorm(name="norm")(x, train, self.activation)
    x = pj.QuantAct(self.kind, name="quant")(x, bits)
    return pj.QuantDense(3, name="head")(jnp.mean(x, (1, 2)), bits)


class Odd(nn.Module):
  """A model that does something that it must not do."""

  what: str

  @nn.compact
  def __call__(self, x, bits=pj.Bits(), train=False):
    x = pj.QuantAct("symmetric", name="quant")(jnp.mean(x, (1, 2)), bits).value()
    if self.what == "branch" and jnp.sum(x) > 0:
      x = -x
    if self.what == "noise" and train:
      x = x + jax.random.normal(self.make_rng("noise"), x.shape)
    if self.what == "only_in_training" and train:
      x = nn.Dense(1, name="auxiliary")(x)
    if self.what == "counter":
      self.param("counter", lambda _: jnp.zeros((), jnp.int32))
    if self.what == "slash":
      x = nn.Dense(3, name="a/b")(x)
    if self.what == "vmap":
      several = nn.vmap(
        pj.QuantDense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(0, None)
      )
      return several(3, name="head")(x[None], bits)[0]
    x = pj.QuantDense(3, name="head")(x, bits)
    if self.what == "batch_of_one":
      return x.reshape(1, -1)
    return jnp.argsort(x) if self.what == "integers" else x


class OfNnx(flax.nnx.Module):
  pass


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"model": NeverQuantizes()}, "never quantizes its weights.*QuantConv"),
    ({"model": OnlyWeights()}, "never quantizes its activations.*QuantAct"),
    ({"model": TwoOutputs()}, r"returns 2 arrays .*one array \[N, classes\]"),
    ({"model": TwoInputs()}, r"model\(x, bits, train\)"),
    ({"model": Odd("branch")}, "branches on values of an array"),
    ({"model": Odd("noise")}, "needs a random key.*noise"),
    ({"model": Odd("only_in_training")}, "in training that it does not call in evaluation"),
    ({"model": Odd("batch_of_one")}, r"\(1, 6\) for two images in training.*\(2, 3\)"),
    ({"model": Odd("integers")}, "returns int32"),
    ({"model": Odd("vmap")}, "inside nn.scan or nn.vmap"),
    ({"model": Odd("counter")}, "parameter counter is int32"),
    ({"model": Odd("slash")}, "must not contain '/'"),
    ({"quantizer": pj.LSQ}, "quantizer has LSQ where a Quantizer belongs"),
    ({"teacher": Net()}, r"teacher=\(model, variables\)"),
    ({"optimizer": optax.sgd(0.1)}, "optimizer must be a function"),
    ({"data": [batch(0)]}, r"given a list: .* Data\("),
    ({"data": of_batches(batch(0, rows=6))}, "has 6 examples: it must have a multiple of 4"),
    ({"data": pj.Data(train=lambda *_: 3, eval=EVAL, steps_per_epoch=1)}, "returned a int"),
    ({"model": CalledTwice()}, "dense is called twice"),
    ({"model": WithoutBits()}, "The layer dense is called without bits"),
    ({"model": WithList(widths=[4, 4])}, "widths cannot be hashed.*tuples"),
    ({"model": Wrong(kind="relu")}, "quant has kind = 'relu': it must be 'symmetric'"),
    ({"model": Wrong(activation="silu")}, "norm has activation = 'silu'.*'relu6'"),
    ({"model": Wrong(size=4)}, "conv has kernel_size = 4: it must be odd"),
    ({"loss": lambda logits, labels: jnp.mean(logits)}, r"loss gives an array of the shape \(\)"),
    (
      {"data": of_batches({**batch(0), "image": np.zeros((8, 8, 8, 1), int)}, steps=1)},
      "int64 images",
    ),
    ({"data": pj.Data(train=train, eval=[], steps_per_epoch=4)}, "Data.eval has no example"),
    (
      {"data": pj.Data(train=lambda: None, eval=EVAL, steps_per_epoch=4)},
      "train.epoch, first_step",
    ),
    ({"teacher": (Net(), {"params": {}})}, "teacher lacks batch_stats/norm/mean.*all variables"),
    ({"model": OfNnx()}, r"OfNnx .* flax.nnx.*bridge.to_linen\(OfNnx, .*ToLinen"),
    ({"model": Net}, r"Give Net\(\), not Net"),
    ({"data": of_batches(batch(0), batch(1, size=9))}, r"shape \(8, 9, 9, 1\).*\[N, 8, 8, 1\]"),
    ({"data": of_batches(batch(0), batch(1, rows=9))}, "N at most 8"),
    (
      {"data": of_batches({**batch(0), "label": np.arange(8)}, steps=1)},
      "labels from 0 to 7.*0 to 2",
    ),
    (
      {"data": of_batches({**batch(0), "label": np.zeros(8)}, steps=1)},
      "labels of the type float64",
    ),
    (
      {"data": of_batches({**batch(0), "image": np.full((8, 8, 8, 1), np.nan)}, steps=1)},
      "NaN or infinity",
    ),
    ({"data": of_batches(batch(0), steps=3)}, "ended after 1 of 3 batches in epoch 0"),
    ({"data": of_batches((1, 2), steps=1)}, "must be a dictionary with image"),
    ({"data": of_batches({"images": 1}, steps=1)}, r"\['images'\].*image"),
    ({"schedule": ()}, "no phase"),
    ({"schedule": pj.profit_schedule(teacher=True)}, "phases with a teacher"),
    (
      {"variables": {"params": {"conv": {"kernel": np.zeros(3)}, "absent": np.zeros(1)}}},
      r"params/absent is not in the model; params/conv/kernel has the shape \(3,\), not \(5, 5",
    ),
  ],
)
def test_what_cannot_be_trained_is_one_clear_error(tmp_path, given, message):
  with pytest.raises(pj.ConfigError, match=message):
    fit(tmp_path, **given)


class Plain(nn.Module):
  """Without quantized convolutions and our norms; plain layers, one in bfloat16, and parameters at
  the root whose names are those of optimizer groups and of quantizers' scalars.
  """

  @nn.compact
  def __call__(self, x, bits=pj.Bits(), train=False):
    x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="conv")(x))
    low = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    x = nn.Dense(8, name="low", **low)(x.reshape(len(x), -1)).astype(x.dtype)
    for name in ("norm", "quant", "weight", "frozen", "quant_a"):
      x = x @ self.param(name, nn.initializers.orthogonal(), (8, 8))
    x = pj.QuantAct("symmetric", name="dense_quant")(nn.LayerNorm(name="layer_norm")(x), bits)
    x = nn.relu(pj.QuantDense(8, name="dense")(x, bits))
    x = x * self.param("gain", nn.initializers.ones, (8,))
    return pj.QuantDense(3, name="head")(pj.QuantAct("unsigned", name="act")(x, bits), bits)


def test_plain_layers_and_own_parameters_train(tmp_path):
  options = pj.Options(train=pj.TrainSettings(ema_rate=0.0))
  first = describe(Plain(), (8, 8, 1)).init(jax.random.key(0))
  result = pj.Trainer(Plain(), SCHEDULE, tmp_path, options=options).fit(DATA)
  assert result.weights == "raw"
  assert [phase.frozen for phase in result.phases] == [[]] * len(SCHEDULE)
  before, after = (
    traverse_util.flatten_dict(v["params"], sep="/") for v in (first, result.variables)
  )
  assert not [name for name, value in before.items() if np.array_equal(after[name], value)]
  assert after["low/bias"].dtype == jnp.bfloat16
  # They are not quantized, and no file holds them.
  with pytest.raises(pj.ConfigError, match=r"test_trainer.py:\d+.*nn.Conv.*QuantConv"):
    pj.export(result, tmp_path / "net.onnx", DATA.eval)


@pytest.mark.parametrize(
  ("rule", "expected", "frozen"),
  [
    (("he.d", 8, "float"), {"head": 8, "head_quant": None}, 1),
    (
      (".*", "float", "float"),
      dict.fromkeys(("conv", "depthwise", "head", "in_quant", "quant", "head_quant")),
      0,
    ),
  ],
)
def test_rules_give_layers_their_bits(tmp_path, rule, expected, frozen):
  result = pj.Trainer(Net(), SCHEDULE, tmp_path, rules=(rule,), options=OPTIONS).fit(DATA)
  assert dict(result.bits.layers) == expected
  assert len(result.phases[-1].frozen) == frozen


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"sampling_every": 3}, r"Options\.plan\.sampling_every = 3"),
    ({"train": pj.TrainSettings(ema_rate=3.0)}, r"Options\.train\.ema_rate = 3"),
    ({"train": pj.TrainSettings(dtype="float16")}, r"Options\.train\.dtype = 'float16'"),
  ],
)
def test_options_that_are_not_allowed(tmp_path, options, message):
  with pytest.raises(pj.ConfigError, match=message):
    pj.Trainer(Net(), SCHEDULE, tmp_path, options=pj.Options(**options)).fit(DATA)


def test_a_policy_may_have_scalars_for_each_channel(tmp_path):
  trainer = pj.Trainer(Plain(), SCHEDULE, tmp_path, quantizer=pj.LSQ(), policy="brevitas")
  assert trainer._quantizer == pj.LSQ(per_channel=True)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"rules": (("head", 9, None),)}, r"Trainer's rules has the rule .* bits 9"),
    ({"rules": (("[", 8, None),)}, "Trainer's rules .* regular expression is not valid"),
    ({"rules": (("haed", 8, None),)}, r"Trainer's rules: .* matches no layer\. Near names: head"),
    ({"policy": "lsq"}, "policy = 'lsq' is not allowed: .* profit, lsq_paper, brevitas"),
  ],
)
def test_rules_that_are_not_allowed(tmp_path, given, message):
  with pytest.raises(pj.ConfigError, match=message):
    pj.Trainer(Plain(), SCHEDULE, tmp_path, **given).fit(DATA)


def test_padding_has_no_label_to_check():
  from profit_jax.data.batches import BatchSource

  padded = {**batch(0), "label": np.array([0, 1, 2, 0, 1, 2, -1, -1]), "mask": np.arange(8) < 6}
  source = BatchSource(of_batches(padded))
  source.num_classes = 3
  (seen,) = source.train_batches(0, 0)
  assert seen["mask"].sum() == 6


@pytest.mark.parametrize(
  ("model", "bits"),
  [(own_models.Branches(), 4), (own_models.Plain(), 3), (own_models.Codes(), 8)],
  ids=["branches", "plain", "codes"],
)
def test_own_models_are_trained_and_exported(tmp_path, model, bits):
  height, width, channels = own_models.IMAGE_SHAPE

  def of(seed):
    given = batch(seed, size=height, channels=channels)
    return {**given, "image": given["image"][:, :, :width]}

  data = pj.Data(train=[of(0), of(1)], eval=[of(2)], steps_per_epoch=2)
  schedule = pj.profit_schedule(
    weight_bits=(bits,), act_bits=(bits,), full_precision_epochs=1, finetune_epochs=1,
    sampling_epochs=1, freeze_fractions=(0.5,), stabilize=False, learning_rate=0.01,
  )  # fmt: skip
  result = pj.Trainer(model, schedule, tmp_path / "run", options=OPTIONS).fit(data)
  report = pj.export(result, tmp_path / "net.onnx", data.eval)
  assert report.examples == ROWS
  assert report.codes > 1000
  np.save(tmp_path / "images.npy", data.eval[0]["image"])
  found = list(predict.predict(report.path, [tmp_path / "images.npy"]))
  logits = model.apply(result.variables, data.eval[0]["image"], result.bits)
  assert [best[0][0] for best in found] == [str(index) for index in np.argmax(logits, 1)]


@pytest.mark.parametrize(
  ("weight_bits", "act_bits", "in_full_precision"),
  [((4,), (), "activations"), ((), (4,), "weights")],
)
def test_one_side_alone_is_quantized_but_not_exported(
  tmp_path, weight_bits, act_bits, in_full_precision
):
  schedule = pj.profit_schedule(
    weight_bits=weight_bits, act_bits=act_bits, full_precision_epochs=1, finetune_epochs=1,
    stabilize=False, profit_bits=(), learning_rate=0.01,
  )  # fmt: skip
  result = fit(tmp_path, schedule=schedule)
  assert (result.bits.weight is None, result.bits.act is None) == (not weight_bits, not act_bits)
  with pytest.raises(pj.ConfigError, match=f"{in_full_precision} are in full precision"):
    pj.export(result, tmp_path / "net.onnx", DATA.eval)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"train": iter(EVAL)}, r"Data\.train .*only once.*\(epoch, first_step\)"),
    ({"eval": iter(EVAL)}, r"Data\.eval .*only once"),
    ({"train": 3}, r"Data\.train is a int"),
    ({"steps_per_epoch": 0}, "steps_per_epoch = 0"),
  ],
)
def test_what_is_no_data(given, message):
  with pytest.raises(pj.ConfigError, match=message):
    pj.Data(**{"train": train, "eval": EVAL, "steps_per_epoch": 1, **given})


def test_own_loss_optimizer_teacher_and_first_weights(tmp_path):
  spec = describe(Net(), (8, 8, 1))
  first = spec.init(jax.random.key(3))
  schedule = pj.profit_schedule(
    weight_bits=(4,), act_bits=(4,), full_precision_epochs=0, finetune_epochs=1, sampling_epochs=1,
    freeze_fractions=(0.5,), stabilize=False, learning_rate=0.01,
  )  # fmt: skip
  seen = Seen()
  given = {
    "schedule": schedule,
    "loss": lambda logits, labels: 0.0 * jnp.sum(logits, 1) + 7.0,
    # Its state has other shapes than the parameters.
    "optimizer": lambda rate: optax.adafactor(
      rate, min_dim_size_to_factor=2, momentum=0.9, weight_decay_rate=0.01
    ),
    "teacher": (Net(), spec.init(jax.random.key(7))),
    "variables": {"params": first["params"]},
  }
  result = fit(tmp_path, **given, callbacks=[seen])
  # Parts of them were given: no full precision to compare with, but what they are worth is told.
  assert result.full_precision_top1 is None
  assert 0 <= result.start_top1 <= 100
  assert {round(losses["ce"], 4) for losses in seen.losses} == {7.0}
  assert all(losses["kd"] > 0 for losses in seen.losses)
  (frozen,) = result.phases[-1].frozen
  before, after = seen.params[-2:]
  held = [
    layer
    for layer in ("conv", "depthwise", "plain", "head")
    if np.array_equal(after[layer]["kernel"], before[layer]["kernel"])
  ]
  # The decay of the optimizer moves all kernels but the frozen one.
  assert held == [frozen]
  # Stopped in the phase that freezes, it ends the same.
  stopped = tmp_path / "stopped"
  with pytest.raises(pj.Stopped):
    fit(stopped, **given, callbacks=[Seen(stop_at=13)])
  again = fit(stopped, **given)
  jax.tree.map(np.testing.assert_array_equal, again.variables, result.variables)


def test_the_library_is_quiet_and_changes_no_setting_of_jax(whole, capfd, tmp_path):
  before = {
    name: getattr(jax.config, name) for name in ("jax_enable_x64", "jax_compilation_cache_dir")
  }
  fit(tmp_path, schedule=SCHEDULE[:1])
  assert capfd.readouterr() == ("", "")
  assert before == {name: getattr(jax.config, name) for name in before}


def test_a_smaller_batch_is_padded_with_rows_that_do_not_count():
  from profit_jax.data.batches import BatchSource

  source = BatchSource(of_batches(batch(0), batch(1, rows=3)))
  source.num_classes = 3
  whole, padded = source.train_batches(0, 0)
  assert whole["mask"].all()
  assert padded["mask"].tolist() == [True] * 3 + [False] * 5
  # Copies of its own rows, which take part in batch statistics.
  np.testing.assert_array_equal(padded["image"], padded["image"][[0, 1, 2, 0, 1, 2, 0, 1]])
  assert [int(each["mask"].sum()) for each in source.eval_batches(0)] == [8, 5]
