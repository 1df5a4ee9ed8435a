"""What the tests of wrong input draw from: wrong and right values of every field, wrong places and
addresses, damaged files. Also how they run a command line in this process.
"""

import contextlib
import io
import math
import warnings

import numpy as np
import pytest
from hypothesis import strategies as st

import main
from profit_jax.models import REGISTRY


def command(*arguments):
  """Runs `main.py` with arguments in this process; returns exit code, output and errors."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
    # ml_collections' way to load a configuration file.
    warnings.filterwarnings("ignore", r"the load_module\(\) method", DeprecationWarning)
    code, _ = main.run(["main.py", *arguments])
  return code, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def registered(*names):
  """Within, only these models are registered: advice on weights that do not fit traces all."""
  with pytest.MonkeyPatch.context() as patch:
    for name in REGISTRY.keys() - set(names):
      patch.delitem(REGISTRY, name)
    yield


def assert_refused(code, err, names):
  """Asserts exit code 2 and one message that has one of the names."""
  assert code == 2, err
  assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1, err
  assert "Traceback" not in err
  assert any(name in err for name in names if name), err


TEXT = st.text(
  st.characters(codec="ascii", categories=("L", "N", "P", "S")), min_size=1, max_size=12
)
WORDS = st.from_regex(r"[a-z]{3,8}_[a-z]{1,8}", fullmatch=True)  # no name of anything here
NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])


def ints(low, high):
  """(wrong, right) whole numbers around an interval."""
  return st.integers(-(2**40), low - 1) | st.integers(high + 1, 2**40), st.integers(low, high)


def at_least(low):
  """(wrong, right) whole numbers where any large one will do."""
  return st.integers(-(2**40), low - 1), st.integers(low, 10**6)


def floats(low, high, *, open_low=False, open_high=False):
  """(wrong, right) numbers around an interval."""
  below = st.floats(max_value=low, exclude_max=not open_low, allow_nan=False)
  above = st.floats(min_value=high, exclude_min=not open_high, allow_nan=False)
  return below | above | NOT_FINITE, st.floats(
    low, high, exclude_min=open_low, exclude_max=open_high
  )


def choice(*names):
  """(wrong, right) names."""
  return WORDS | TEXT.filter(lambda name: name not in names), st.sampled_from(names)


def truth():
  """(wrong, right) booleans; the wrong ones are of another type."""
  return WORDS, st.booleans()


BITS = st.lists(st.integers(2, 8), max_size=4, unique=True).map(
  lambda bits: tuple(sorted(bits, reverse=True))
)
WRONG_BITS = (
  st.lists(st.integers(-3, 12), min_size=1, max_size=4)
  .map(tuple)
  .filter(lambda bits: any(not 2 <= b <= 8 for b in bits))
  | st.lists(st.integers(2, 8), min_size=2, max_size=4)
  .map(tuple)
  .filter(lambda b: list(b) != sorted(set(b), reverse=True))
  | WORDS
)
FRACTIONS = st.lists(st.floats(0, 1), min_size=1, max_size=4).map(
  lambda shares: tuple(sorted(shares))
)
WRONG_FRACTIONS = (
  st.just(())
  | st.lists(st.floats(-2, 3), min_size=1, max_size=4)
  .map(tuple)
  .filter(lambda f: any(not 0 <= x <= 1 for x in f))
  | st.lists(st.floats(0, 1), min_size=2, max_size=4)
  .map(tuple)
  .filter(lambda f: list(f) != sorted(f))
)
WIDTHS = st.none() | st.just("float") | st.integers(2, 8)
WRONG_WIDTHS = st.integers(-5, 20).filter(lambda bits: not 2 <= bits <= 8) | WORDS | st.booleans()
PATHS = st.sampled_from(["classifier", "stem_conv", ".*conv", "block00/.*"])  # all models have them
STRIDES = (
  (
    st.lists(st.integers(-1, 4), min_size=1, max_size=9)
    .map(tuple)
    .filter(lambda s: len(s) not in (6, 7, 8) or set(s) - {1, 2})
  ),
  st.just(()),
)
NORMALIZATIONS = ("dataset", "imagenet", "inception", "none")
MODELS = ("mobilenet_v1", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small")
# Of the digits, in memory. Wrong files are below.
FIELDS = {
  "seed": ints(0, 2**32 - 1),
  "model.name": choice(*MODELS),
  "model.width": floats(0, 4, open_low=True),
  "model.activation": choice("relu", "relu6"),
  "model.dropout": floats(0, 1, open_high=True),
  "model.strides": STRIDES,
  "model.bn_momentum": floats(0, 1, open_high=True),
  "model.bn_epsilon": floats(0, 0.1, open_low=True),
  "model.squeeze_excite": choice("before", "after"),
  "model.pad_value": (
    st.floats().filter(lambda value: value not in (0.0, -0.375)),
    st.sampled_from([0.0, -0.375]),
  ),
  "model.channel_rounding": choice("nearest", "up", "timm"),
  "model.padding": choice("torch", "same"),
  "init.weights": (st.nothing(), st.just("")),  # a plan is made without reading it
  "init.entry": (WORDS, st.just("")),
  "init.variant": (WORDS, st.just("")),
  "init.reset_head": (st.just(True), st.just(False)),
  "init.published_settings": choice("apply", "compare"),
  "teacher.model": choice("self", "none"),
  "teacher.weights": (WORDS, st.just("")),
  "teacher.entry": (WORDS, st.just("")),
  "teacher.variant": (WORDS, st.just("")),
  "teacher.batch_stats": choice("batch", "running"),
  "teacher.normalization": choice(*NORMALIZATIONS),
  "teacher.width": floats(0, 4, open_low=True),
  "teacher.activation": choice("relu", "relu6"),
  "teacher.strides": (st.lists(st.sampled_from([0, 3]), min_size=1).map(tuple), st.just(())),
  "teacher.bn_epsilon": floats(0, 0.1, open_low=True),
  "teacher.squeeze_excite": choice("before", "after"),
  "teacher.pad_value": (
    st.floats().filter(lambda value: value not in (0.0, -0.375)),
    st.sampled_from([0.0, -0.375]),
  ),
  "teacher.channel_rounding": choice("nearest", "up", "timm"),
  "teacher.padding": choice("torch", "same"),
  "data.name": (
    st.sampled_from(["", " ", "../digits", "digits:x", "no_such_set", "folder"]),
    st.just("digits"),
  ),
  "data.data_dir": (st.nothing(), st.just("")),
  "data.train_split": (st.just(""), st.just("train")),
  "data.eval_split": (st.nothing(), st.just("")),
  "data.image_key": (st.nothing(), st.just("")),
  "data.label_key": (st.nothing(), st.just("")),
  "data.image_size": ints(8, 1024),
  "data.normalization": choice(*NORMALIZATIONS),
  "data.augment": truth(),
  "data.train_crop": choice("random_resized_crop", "pad_crop"),
  "data.crop_pct": floats(0.1, 1),
  "data.interpolation": choice("bicubic", "bilinear"),
  "data.max_broken": floats(0, 1),
  "data.num_readers": ints(1, 1024),
  "plan.weight_bits": (WRONG_BITS, BITS),
  "plan.act_bits": (WRONG_BITS, BITS),
  "plan.refit_bits": (st.just((7,)) | WRONG_BITS, st.just(()) | st.just((4,))),
  "plan.progressive": truth(),
  "plan.stabilize": truth(),
  "plan.profit": truth(),
  "plan.profit_bits": (st.just((7,)), st.just((4,)) | BITS),
  "plan.freeze_fractions": (WRONG_FRACTIONS, FRACTIONS),
  "plan.full_precision_epochs": at_least(0),
  "plan.finetune_epochs": at_least(1),
  "plan.bn_epochs": at_least(0),
  "plan.sampling_epochs": at_least(1),
  "plan.sampling_every": ints(1, 1347),
  "plan.warmup_epochs": at_least(0),
  "train.batch_size": ints(1, 1347),
  "train.accumulation_steps": ints(1, 1347),
  "train.eval_batch_size": ints(1, 1024),
  "train.learning_rate": floats(0, 10, open_low=True),
  "train.full_precision_learning_rate": floats(0, 10, open_low=True),
  "train.quantizer_lr_scale": floats(0, 1),
  "train.weight_decay": floats(0, 1, open_high=True),
  "train.momentum": floats(0, 1, open_high=True),
  "train.ema_rate": floats(0, 1, open_high=True),
  "train.dtype": choice("auto", "float32", "tfloat32", "bfloat16"),
  "train.kernels": choice("tuned", "xla"),
  "quant.method": choice("duq", "lsq", "pact", "qil"),
  "quant.per_channel": truth(),
  "quant.rules": (
    st.builds(lambda bits: (("classifier", *bits),), st.tuples(WRONG_WIDTHS, WIDTHS))
    | st.builds(lambda bits: (("classifier", *bits),), st.tuples(WIDTHS, WRONG_WIDTHS))
    | st.builds(lambda text: ((text, 8, None),), st.sampled_from(["(", "*", "[a", "(?P<x"]) | WORDS)
    | st.sampled_from([("classifier", 8, 8), (("classifier", 8),), ((8, 8, 8),), "classifier"]),
    st.just(())
    | st.builds(lambda name, bits: ((name, *bits),), PATHS, st.tuples(WIDTHS, st.just(None))),
  ),
  "quant.policy": choice("profit", "lsq_paper", "brevitas"),
  "oscillation.dampening": floats(0, 1000),
  "oscillation.freeze_thresholds": (
    st.sampled_from([(0.1,), (0.01, 0.1), (0.1, 0.0005), (2.0, 0.1), (0.1, 0.05, 0.02)]) | WORDS,
    st.sampled_from([(), (0.1, 0.01), (0.02, 0.02)]),
  ),
  "oscillation.freeze_momentum": floats(0, 1, open_low=True, open_high=True),
  "oscillation.bn_reestimation_batches": at_least(0),
  "checkpoint.keep": at_least(1),
  "checkpoint.minutes": (
    st.floats(max_value=0, exclude_max=True, allow_nan=False) | NOT_FINITE,
    st.floats(0, 1e6),
  ),
  "recovery.retries": at_least(0),
  "recovery.learning_rate_factor": floats(0, 1, open_low=True, open_high=True),
  "compilation_cache": (st.nothing(), st.just("")),
}

# Places that are wrong for everything. README.md is a file, and tests a directory without a run,
# weights or images.
SCHEMES = st.builds("{}://{}".format, WORDS, WORDS)  # unknown file systems
LONG = st.integers(256, 400).map("a".__mul__)  # for a file's name
NO_RUN = (
  SCHEMES | LONG | WORDS | st.sampled_from(["README.md", "README.md/run", "tests", "/dev/null"])
)
NO_WEIGHTS = (
  SCHEMES
  | LONG
  | st.builds("{}{}".format, WORDS, st.sampled_from([".npz", ".pth", ".safetensors", ".zip", ""]))
  | st.sampled_from(
    [
      "README.md",
      "README.md/w.npz",
      "tests",
      "tests/golden/quantizers.npz",
      "tests/golden/torch_files/zip.pth",
    ]
  )
)
NO_FOLDER = SCHEMES | LONG | WORDS | st.sampled_from(["", "README.md", "README.md/data", "tests"])

# Texts that are not HOST:PORT.
PORTS = (
  WORDS
  | (st.integers(-(2**40), 0) | st.integers(2**16, 2**80)).map(str)
  | st.sampled_from(["", "²", "٣", "1.5", " 1"])
)
ADDRESSES = (
  TEXT.filter(lambda text: ":" not in text)
  | st.builds("localhost:{}".format, PORTS)
  | st.builds("{}:8476".format, st.sampled_from(["", "..", ".a", "[]", "a" * 64]))
)


@st.composite
def clusters(draw):
  """Options for several processes of which one is wrong or missing."""
  processes = draw(st.integers(1, 2**31 - 1))
  options = {
    "coordinator_address": "localhost:8476",
    "num_processes": processes,
    "process_id": draw(st.integers(0, processes - 1)),
  }
  no_number = WORDS | st.sampled_from(["", "1.5", "²", "1e3"])
  wrong = {
    "coordinator_address": ADDRESSES,
    "num_processes": st.integers(-(2**40), 0) | st.integers(2**31, 2**40) | no_number,
    "process_id": st.integers(-(2**40), -1) | st.integers(processes, 2**40) | no_number,
  }
  name = draw(st.sampled_from(sorted(options)))
  if draw(st.booleans()):
    options[name] = draw(wrong[name])
  else:
    del options[name]
  return [f"--{option}={value}" for option, value in options.items()]


@st.composite
def damaged(draw, content):
  """Bytes with something cut out, changed, or put in between."""
  first = draw(st.integers(0, len(content)))
  length = draw(st.sampled_from([0, 1, 4, 100, len(content)]))
  put = draw(st.binary(max_size=8))
  return content[:first] + put + content[first + length :]


@st.composite
def wrong_tensors(draw, tensors):
  """A copy of a model's tensors of which one is wrong, and its name."""
  name = draw(st.sampled_from(sorted(tensors)))
  value, changed = tensors[name], dict(tensors)
  how = draw(st.sampled_from(["missing", "unexpected", "shape", "integers", "not finite"]))
  if how == "missing":
    del changed[name]
  elif how == "unexpected":
    name = draw(WORDS)
    changed[name] = value
  elif how == "shape":
    changed[name] = value[None]
  elif how == "integers":
    changed[name] = value.astype(np.int32)
  else:
    changed[name] = np.full_like(value, draw(NOT_FINITE))
  return changed, name
