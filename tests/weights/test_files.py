"""File formats: every one that people have, and none that can run code."""

import io
import os
import pathlib
import pickle
import shutil
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from profit_jax.settings import ConfigError
from profit_jax.weights.files import read_tensors
from tests import golden_data

TORCH = golden_data.GOLDEN / "torch_files"


def expect(tensors, expected_file):
  with np.load(TORCH / expected_file) as expected:
    assert sorted(tensors) == sorted(expected.files)
    for name in expected.files:
      assert tensors[name].shape == expected[name].shape, name
      np.testing.assert_array_equal(tensors[name].astype(expected[name].dtype), expected[name], err_msg=name)


# Both formats hold float16 to float64, bfloat16, a transposed and a strided view, one at an offset, two names for one
# storage, a Parameter and an empty tensor.
@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_torch_files_of_both_formats(name):
  tensors = read_tensors(str(TORCH / name))
  expect(tensors, "expected.npz")
  assert tensors["bn.weight"].dtype == np.float16
  assert tensors["bn.bias"].dtype == ml_dtypes.bfloat16


def test_weights_among_other_things_and_behind_wrappers():
  expect(read_tensors(str(TORCH / "nested.ckpt")), "expected_net.npz")  # beside an optimizer, as the authors' code saves it
  expect(read_tensors(str(TORCH / "dataparallel.pth")), "expected_net.npz")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin", ".pth.tar"])
def test_names_of_torch_files(tmp_path, suffix):
  shutil.copy(TORCH / "zip.pth", tmp_path / f"w{suffix}")
  expect(read_tensors(str(tmp_path / f"w{suffix}")), "expected.npz")


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_numpy_and_safetensors(tmp_path, dtype):
  given = {"a.weight": np.arange(6, dtype=dtype).reshape(2, 3), "a.num_batches_tracked": np.array(3)}
  np.savez(tmp_path / "w.npz", **given)
  safetensors.numpy.save_file(given, tmp_path / "w.safetensors")
  for name in ("w.npz", "w.safetensors"):
    read = read_tensors(str(tmp_path / name))
    assert sorted(read) == sorted(given)
    assert read["a.weight"].dtype == dtype
    np.testing.assert_array_equal(read["a.weight"], given["a.weight"])


def test_bfloat16_in_safetensors(tmp_path):
  values = np.array([1.5, -2.0], ml_dtypes.bfloat16)
  header = b'{"w":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
  (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())
  np.testing.assert_array_equal(read_tensors(str(tmp_path / "w.safetensors"))["w"].astype(np.float32), [1.5, -2.0])


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
  with pytest.raises(ConfigError, match=r"asks to run .*(system|eval).*not run here"):
    read_tensors(str(tmp_path / "w.pth"))
  assert not marker.exists()
  # The same pickle does run where it is let: what was refused is a real danger.
  pickle.loads(pickle.dumps(evil(marker), protocol=2))
  assert marker.exists()


def test_a_pickled_module_and_a_pickle_in_npz_are_refused(tmp_path):
  with pytest.raises(ConfigError, match=r"asks to run torch\.nn\.modules.*state_dict"):
    read_tensors(str(TORCH / "whole_model.pth"))
  marker = tmp_path / "ran"
  np.savez(tmp_path / "w.npz", w=np.array([Touch(marker)], object))
  with pytest.raises(ConfigError, match=r"cannot be read as \.npz"):
    read_tensors(str(tmp_path / "w.npz"))
  assert not marker.exists()


@pytest.mark.parametrize("source", ["zip.pth", "legacy.pth", "w.safetensors", "w.npz"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_truncated_files(tmp_path, source, share):
  np.savez(tmp_path / "w.npz", a=np.zeros(100))
  safetensors.numpy.save_file({"a": np.zeros(100)}, tmp_path / "w.safetensors")
  content = ((TORCH if source.endswith(".pth") else tmp_path) / source).read_bytes()
  place = tmp_path / f"cut{pathlib.Path(source).suffix}"
  place.write_bytes(content[: int(share * len(content))])
  with pytest.raises(ConfigError, match="cannot be read as"):
    read_tensors(str(place))


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
  # A shape of 1000 in a storage of a few: torch's own reader checks this as well.
  with zipfile.ZipFile(TORCH / "dataparallel.pth") as content:
    files = {name: content.read(name) for name in content.namelist()}
  pickled = next(name for name in files if name.endswith("data.pkl"))
  # In protocol 2 the 1-D shape (4,) of the norm's tensors is BININT1 4, TUPLE1.
  assert b"K\x04\x85" in files[pickled]
  files[pickled] = files[pickled].replace(b"K\x04\x85", b"K\xff\x85")
  with zipfile.ZipFile(tmp_path / "w.pth", "w") as content:
    for name, data in files.items():
      content.writestr(name, data)
  with pytest.raises(ConfigError, match="reaches beyond"):
    read_tensors(str(tmp_path / "w.pth"))


def test_files_that_are_no_weights(tmp_path):
  with (tmp_path / "single.npz").open("wb") as file:
    np.save(file, np.zeros(3))
  (tmp_path / "list.pth").write_bytes(archive([1, 2]))
  (tmp_path / "config.pth").write_bytes(archive({"lr": 0.1, "epoch": 3}))
  (tmp_path / "none.pth").write_bytes(archive({}))
  (tmp_path / "w.h5").touch()
  (tmp_path / "directory").mkdir()
  for name, reason in {
    "absent.pth": "does not exist",
    "single.npz": "cannot be read as .npz: it holds a single array",
    "list.pth": "holds a list, not a dictionary",
    "config.pth": r"holds more than tensors: 'lr' \(float\), 'epoch' \(int\)",
    "none.pth": "holds no tensors",
    "w.h5": "unknown format: it must be one of .safetensors, .npz",
    "directory": "holds no weights: it must be the --workdir of a run",
  }.items():
    with pytest.raises(ConfigError, match=reason):
      read_tensors(str(tmp_path / name))
