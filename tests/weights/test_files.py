"""File formats: every one that people have, and none that can run code."""

import gzip
import io
import os
import pathlib
import pickle
import re
import shutil
import struct
import time
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from profit_jax.config import ConfigError
from profit_jax.weights import containers, files, formats, hub, prefixes, torch_file
from profit_jax.weights.files import read_contents
from tests import golden_data
from tests.weights.torch_writer import Global, Made, Tensor, pickled
from tests.weights.torch_writer import torch_file as written

TORCH = golden_data.GOLDEN / "torch_files"


def contents(path):
  return read_contents(path).tensors


def expect(tensors, expected_file):
  with np.load(TORCH / expected_file) as expected:
    assert sorted(tensors) == sorted(expected.files)
    for name in expected.files:
      assert tensors[name].shape == expected[name].shape, name
      np.testing.assert_array_equal(
        tensors[name].astype(expected[name].dtype), expected[name], err_msg=name
      )


# Both formats hold float16 to float64, bfloat16, a transposed and a strided view, one at an offset,
# two names for one storage, a Parameter and an empty tensor.
@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_torch_files_of_both_formats(name):
  tensors = contents(str(TORCH / name))
  expect(tensors, "expected.npz")
  assert tensors["bn.weight"].dtype == np.float16
  assert tensors["bn.bias"].dtype == ml_dtypes.bfloat16


def test_weights_among_other_things_and_behind_wrappers():
  # Beside an optimizer, as the authors' code saves it.
  expect(contents(str(TORCH / "nested.ckpt")), "expected_net.npz")
  expect(contents(str(TORCH / "dataparallel.pth")), "expected_net.npz")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin", ".pth.tar"])
def test_names_of_torch_files(tmp_path, suffix):
  shutil.copy(TORCH / "zip.pth", tmp_path / f"w{suffix}")
  expect(contents(str(tmp_path / f"w{suffix}")), "expected.npz")


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_numpy_and_safetensors(tmp_path, dtype):
  given = {
    "a.weight": np.arange(6, dtype=dtype).reshape(2, 3),
    "a.num_batches_tracked": np.array(3),
  }
  np.savez(tmp_path / "w.npz", **given)
  safetensors.numpy.save_file(given, tmp_path / "w.safetensors")
  for name in ("w.npz", "w.safetensors"):
    read = contents(str(tmp_path / name))
    assert sorted(read) == sorted(given)
    assert read["a.weight"].dtype == dtype
    np.testing.assert_array_equal(read["a.weight"], given["a.weight"])


def test_bfloat16_in_safetensors(tmp_path):
  values = np.array([1.5, -2.0], ml_dtypes.bfloat16)
  header = b'{"w":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
  (tmp_path / "w.safetensors").write_bytes(
    len(header).to_bytes(8, "little") + header + values.tobytes()
  )
  np.testing.assert_array_equal(
    contents(str(tmp_path / "w.safetensors"))["w"].astype(np.float32), [1.5, -2.0]
  )


# Written by torch beside NumPy's scalars and arrays, dates, paths, counters, enumerations, types of
# torch, omegaconf's and EasyDict's configurations, and tensors that need code.
@pytest.mark.parametrize("name", ["beside_2.pth", "beside_5.pth"])
def test_what_is_beside_the_weights_does_not_matter(name):
  read = read_contents(str(TORCH / name))
  np.testing.assert_array_equal(read.tensors["conv.weight"], [[0, 1, 2], [3, 4, 5]])
  np.testing.assert_array_equal(read.tensors["bn.bias"], [1.5, -2])
  (note,) = read.notes
  assert all(part in note for part in ("'state_dict'", "metric", "26 more")), note
  tree = torch_file.read((TORCH / name).read_bytes())
  assert tree["args"]["model"] == tree["cfg"]["model"] == "mobilenetv2_100"
  assert tree["hyper"]["arch"] == "resnet18"
  assert tree["args"]["lr"] == 0.1


class Touch:
  """Creates a file when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f"touch {self.path}",)


class Evaluated(Touch):
  def __reduce__(self):
    return eval, (f"__import__('pathlib').Path({str(self.path)!r}).touch()",)


def archive(payload):
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w") as content:
    content.writestr("archive/data.pkl", pickle.dumps(payload, protocol=2))
    content.writestr("archive/byteorder", "little")
  return file.getvalue()


def stream(payload):
  parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, payload, [])
  return b"".join(pickle.dumps(part, protocol=2) for part in parts)


@pytest.mark.parametrize("write", [archive, stream])
@pytest.mark.parametrize("evil", [Touch, Evaluated])
def test_code_in_a_file_is_refused_and_does_not_run(tmp_path, write, evil):
  marker = tmp_path / "ran"
  (tmp_path / "w.pth").write_bytes(write({"features.0.0.weight": evil(marker)}))
  with pytest.raises(ConfigError, match=r"\.(system|eval)\b"):
    contents(str(tmp_path / "w.pth"))
  assert not marker.exists()
  # The same pickle does run where it is let: what was refused is a real danger.
  pickle.loads(pickle.dumps(evil(marker), protocol=2))
  assert marker.exists()


PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("evil", [Touch, Evaluated])
def test_code_beside_the_weights_does_not_run(tmp_path, protocol, evil):
  marker = tmp_path / "ran"
  weights = {"w": Tensor(np.arange(4, dtype=np.float32))}
  tree = {"state_dict": weights, "x": evil(marker), "y": [{evil(marker): evil(marker)}]}
  (tmp_path / "w.pth").write_bytes(written(tree, protocol))
  np.testing.assert_array_equal(contents(str(tmp_path / "w.pth"))["w"], np.arange(4))
  assert not marker.exists()


QUANTIZED = Made(Global("torch._utils", "_rebuild_qtensor"))
MASKED = Made(
  Global("torch._tensor", "_rebuild_from_type_v2"),
  (Global("torch._utils", "_rebuild_tensor_v2"), Global("mine", "Masked"), (), {}),
)


@pytest.mark.parametrize(
  ("name", "value", "told"),
  [
    ("w", QUANTIZED, "_rebuild_qtensor"),
    ("w", MASKED, r"mine\.Masked"),
    # By its name, it is a part of the net.
    ("layer.weight", Made(Global("mine", "Weight")), r"mine\.Weight"),
  ],
)
def test_a_tensor_that_needs_code_is_refused(tmp_path, name, value, told):
  tensor = Tensor(np.zeros(4, np.float32))
  for tree in ({"layer.bias": tensor, name: value}, {"state_dict": {name: value}}):
    (tmp_path / "w.pth").write_bytes(written(tree))
    with pytest.raises(ConfigError, match=rf"'{name}' \(.*{told}.*state_dict"):
      contents(str(tmp_path / "w.pth"))


def test_what_is_among_the_tensors_is_named(tmp_path):
  scalar = Made(Global("numpy", "scalar"), (3,))
  tree = {"layer.bias": Tensor(np.zeros(4, np.float32)), "acc": scalar, "epoch": 3}
  tree |= {"layer._extra_state": scalar, "history": [0.5, {"loss": 0.1}]}
  (tmp_path / "w.pth").write_bytes(written(tree))
  read = read_contents(str(tmp_path / "w.pth"))
  assert list(read.tensors) == ["layer.bias"]
  (note,) = read.notes
  assert all(f"'{name}'" in note for name in ("acc", "epoch", "layer._extra_state", "history"))
  # It may be another part of the net.
  (tmp_path / "w.pth").write_bytes(written({**tree, "head": {"bias": tree["layer.bias"]}}))
  with pytest.raises(ConfigError, match=r"more than tensors: 'head' \(dict\)"):
    contents(str(tmp_path / "w.pth"))


def test_a_pickle_of_tensors_that_torch_save_did_not_write(tmp_path):
  nested = b"".join(
    pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
  )
  nested += b"\x80\x02" + storage(6) + b"." + pickle.dumps(["0"], 2)
  nested += (6).to_bytes(8, "little") + np.arange(6, dtype=np.float32).tobytes()
  inner = Made(Global("torch.storage", "_load_from_bytes"), (nested,))
  tensor = Made(Global("torch._utils", "_rebuild_tensor_v2"), (inner, 0, (2, 3), (3, 1), False, {}))
  for protocol in PROTOCOLS:
    (tmp_path / "w.pkl").write_bytes(pickled({"w": tensor}, protocol)[0])
    np.testing.assert_array_equal(contents(str(tmp_path / "w.pkl"))["w"], [[0, 1, 2], [3, 4, 5]])


ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
  "value",
  [
    ARRAY,
    np.asfortranarray(ARRAY),
    ARRAY.astype(">f4"),
    Made(Global("torch._utils", "_rebuild_device_tensor_from_numpy"), (ARRAY, None, "xla:0")),
    Made(Global("torch._utils", "_rebuild_parameter_with_state"), (Tensor(ARRAY), True, {}, {})),
  ],
  ids=["rows", "columns", "big endian", "of a TPU", "with attributes"],
)
def test_arrays_and_other_tensors(tmp_path, value, protocol):
  (tmp_path / "w.pth").write_bytes(written({"w": value}, protocol))
  np.testing.assert_array_equal(contents(str(tmp_path / "w.pth"))["w"], ARRAY)


def test_a_pickled_module_and_a_pickle_in_npz_are_refused(tmp_path):
  with pytest.raises(ConfigError, match=r"torch\.nn\.modules"):
    contents(str(TORCH / "whole_model.pth"))
  marker = tmp_path / "ran"
  np.savez(tmp_path / "w.npz", w=np.array([Touch(marker)], object))
  with pytest.raises(ConfigError, match=r"w\.npz"):
    contents(str(tmp_path / "w.npz"))
  assert not marker.exists()


@pytest.mark.parametrize("source", ["zip.pth", "legacy.pth", "w.safetensors", "w.npz"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_truncated_files(tmp_path, source, share):
  np.savez(tmp_path / "w.npz", a=np.zeros(100))
  safetensors.numpy.save_file({"a": np.zeros(100)}, tmp_path / "w.safetensors")
  content = ((TORCH if source.endswith(".pth") else tmp_path) / source).read_bytes()
  place = tmp_path / f"cut{pathlib.Path(source).suffix}"
  place.write_bytes(content[: int(share * len(content))])
  with pytest.raises(ConfigError, match=place.name):
    contents(str(place))


# Pickles as their instructions: what no honest writer of pickles would write.
def text(value):
  return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
  return b"J" + struct.pack("<i", value)


def name(module, value):
  return f"c{module}\n{value}\n".encode()


def group(*parts):
  return b"(" + b"".join(parts) + b"t"


def storage(size, kind="FloatStorage", key="0"):
  return group(text("storage"), name("torch", kind), text(key), text("cpu"), number(size)) + b"Q"


def tensor(shape, strides, size, offset=0, **options):
  arguments = group(
    storage(size, **options),
    number(offset),
    group(*map(number, shape)),
    group(*map(number, strides)),
    b"\x89",
    b"N",
  )
  return name("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def crafted(*entries, elements=4, compression=zipfile.ZIP_STORED, beside=0):
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w", compression) as content:
    content.writestr("archive/data.pkl", b"\x80\x02}(" + b"".join(entries) + b"u.")
    content.writestr("archive/data/0", np.arange(elements, dtype=np.float32).tobytes())
    content.writestr("archive/data/1", bytes(beside))
  return file.getvalue()


def test_a_crafted_file_that_is_honest(tmp_path):
  (tmp_path / "w.pth").write_bytes(crafted(text("w"), tensor((2, 2), (1, 2), 4)))
  np.testing.assert_array_equal(contents(str(tmp_path / "w.pth"))["w"], [[0, 2], [1, 3]])


STATE = b"}" + text("itemsize") + number(1000) + b"s"
# What it is -> the pickle's entries, and what the message says of them.
ATTACKS = {
  "reads beyond its storage": ((text("w"), tensor((5,), (1,), 4)), r"\(5,\).*\b4\b"),
  "reads beyond its storage by strides": (
    (text("w"), tensor((2, 2), (4, 1), 4)),
    r"\(2, 2\).*\b4\b",
  ),
  "reads before its storage": ((text("w"), tensor((2,), (1,), 4, offset=-2)), r"\(-2, 2, 1\)"),
  "goes backwards": ((text("w"), tensor((2,), (-1,), 4, offset=3)), r"\(3, 2, -1\)"),
  "makes much of one element": (
    (text("w"), tensor((30000, 10000), (0, 0), 4)),
    r"\(30000, 10000\).*\b4\b",
  ),
  "says a storage is larger than it is": (
    (text("w"), tensor((2,), (1,), 5)),
    r"\b16\b.*\b5 x float32",
  ),
  "describes a storage in two ways": (
    (text("v"), tensor((1,), (1,), 4), text("w"), tensor((1,), (1,), 2, kind="DoubleStorage")),
    "storage 0",
  ),
  "changes a storage": ((text("w"), storage(4), STATE, b"b"), r"_Storage\b"),
  "changes a type": (
    (text("w"), name("torch", "BFloat16Storage"), STATE, b"b"),
    "it changes a dtype",
  ),
  "changes a function": ((text("w"), name("torch", "Size"), STATE, b"b"), "_Function"),
  "calls a value": ((text("w"), text("x"), b")", b"R"), "called"),
  "says bytes are more than there are": (
    (text("w"), b"\x96" + struct.pack("<Q", 2**40)),
    "damaged",
  ),
  "uses an extension": ((text("w"), b"\x82\x01"), "damaged"),
  "makes an instance": ((b"(", b"ios\nsystem\n"), "damaged"),
  "has the same tensor very often": (
    tuple(part for i in range(4000) for part in (text(str(i)), tensor((1000,), (1,), 1000))),
    "larger",
  ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_crafted_files_are_refused(tmp_path, attack):
  entries, message = ATTACKS[attack]
  elements = 1000 if attack.startswith("has the same") else 4
  (tmp_path / "w.pth").write_bytes(crafted(*entries, elements=elements))
  with pytest.raises(ConfigError, match=message):
    contents(str(tmp_path / "w.pth"))


def test_a_small_file_cannot_fill_the_memory(tmp_path):
  # Thirty tuples, each ten times the one before it; a place in the memo far away.
  laughs = b"]" + b"".join(b"q%c0" % i + b"(" + b"h%c" % i * 10 + b"t" for i in range(30))
  far = tensor((2,), (1,), 4) + b"r" + struct.pack("<I", 2**32 - 1)
  (tmp_path / "w.pth").write_bytes(crafted(text("l"), laughs, text("w"), far))
  with pytest.raises(ConfigError, match=r"'l' \(tuple\)"):
    contents(str(tmp_path / "w.pth"))


# A tuple of two, each of which is a tuple of two, sixty times.
DEEP = b"K\x01\x85q\0" + b"".join(b"0h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))


@pytest.mark.parametrize(
  ("program", "told"),
  [
    (text("w") + b"N0" * 500_001 + b"N", "1000000 instructions"),
    (DEEP + b"K\x01", "key of more than"),
    (text("w") + b"\x8f(" + DEEP + b"\x90", "key of more than"),
    (text("w") + name("torch", "Size") + b")R(" + DEEP + b"\x91", "key of more than"),
    (text("w") + name("collections", "OrderedDict") + b"](" + DEEP + b"Nta\x85R", "key of more"),
    (
      text("w")
      + group(text("storage"), name("torch", "FloatStorage"), DEEP, text("cpu"), number(4))
      + b"Q",
      "name",
    ),
  ],
)
def test_a_small_file_ends_soon(tmp_path, program, told):
  (tmp_path / "w.pth").write_bytes(crafted(program))
  began = time.process_time()
  with pytest.raises(ConfigError, match=told):
    contents(str(tmp_path / "w.pth"))
  assert time.process_time() - began < 3


def test_names_and_options_of_any_size_end_soon(tmp_path):
  options = {"model": "mobilenetv2_100", "model_kwargs": {}}
  for _ in range(60):
    options["model_kwargs"] = {"a": options["model_kwargs"], "b": options["model_kwargs"]}
  entries = {}
  for _ in range(60):
    entries = dict.fromkeys((*containers.RAW, *containers.AVERAGED), entries)
  (tmp_path / "options.pth").write_bytes(archive({"state_dict": {}, "args": options}))
  (tmp_path / "entries.pth").write_bytes(archive(entries))
  began = time.process_time()
  with pytest.raises(ConfigError, match="not a plain mobilenetv2_100"):
    hub.published(str(tmp_path / "options.pth"))
  with pytest.raises(ConfigError, match="no tensors"):
    contents(str(tmp_path / "entries.pth"))
  deep = {"a." * 100_000 + "w": np.zeros(3)}
  assert prefixes.fitted(deep, [{"w", "b"}], "F")[0].keys() == {"w"}
  assert time.process_time() - began < 1


def test_more_tensors_than_any_net_has(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "_MOST_TENSORS", 2)
  np.savez(tmp_path / "w.npz", **{str(i): np.zeros(0) for i in range(3)})
  with pytest.raises(ConfigError, match="holds 3 tensors, more than any net"):
    contents(str(tmp_path / "w.npz"))


def test_a_packed_file_cannot_fill_the_memory(tmp_path, monkeypatch):
  monkeypatch.setattr(formats, "_ALWAYS_UNPACKED", 10_000)
  size = 2_000_000  # zeros shrink to a thousandth
  bomb = crafted(text("w"), tensor((4,), (1,), 4), compression=zipfile.ZIP_DEFLATED, beside=size)
  np.savez_compressed(tmp_path / "w.npz", w=np.zeros(size))
  for packed in (bomb, gzip.compress(bytes(size)), (tmp_path / "w.npz").read_bytes()):
    (tmp_path / "w.pth").write_bytes(packed)
    with pytest.raises(ConfigError, match="unpacked"):
      contents(str(tmp_path / "w.pth"))


def test_wrappers_of_wrappers_and_options_beside_the_weights(tmp_path):
  options = name("argparse", "Namespace") + b")R" + STATE + b"b"
  weights = b"}(" + text("_orig_mod.module.w") + tensor((4,), (1,), 4) + b"u"
  (tmp_path / "w.pth").write_bytes(crafted(text("args"), options, text("state_dict"), weights))
  read = read_contents(str(tmp_path / "w.pth"))
  np.testing.assert_array_equal(read.tensors["w"], np.arange(4))
  (note,) = read.notes
  assert "'state_dict'" in note
  assert "args" in note


def test_files_that_are_no_weights(tmp_path):
  with (tmp_path / "single.npz").open("wb") as file:
    np.save(file, np.zeros(3))
  (tmp_path / "list.pth").write_bytes(archive([1, 2]))
  (tmp_path / "config.pth").write_bytes(archive({"lr": 0.1, "epoch": 3}))
  (tmp_path / "none.pth").write_bytes(archive({}))
  (tmp_path / "w.h5").touch()
  (tmp_path / "directory").mkdir()
  for name, told in {
    "absent.pth": "exist",
    "single.npz": "array",
    "list.pth": "dictionary",
    "config.pth": r"'lr' \(float\), 'epoch' \(int\)",
    "none.pth": "no tensors",
    "w.h5": r"\.safetensors, \.npz",
    "directory": "--workdir",
  }.items():
    with pytest.raises(ConfigError, match=rf"{re.escape(name)}[\s\S]*{told}"):
      contents(str(tmp_path / name))
