"""A file is what its content says, whatever it is called; what is no weights file is named."""

import gzip
import io
import json
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from profit_jax.config import ConfigError
from profit_jax.weights import hub
from profit_jax.weights.claims import claim_of
from profit_jax.weights.files import read_contents
from tests.weights.torch_writer import Tensor, torch_file

TENSORS = {
  "conv.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
  "fc.bias": np.ones(2, np.float32),
}
TREE = {name: Tensor(array) for name, array in TENSORS.items()}


def npz(save=np.savez):
  file = io.BytesIO()
  save(file, **TENSORS)
  return file.getvalue()


def zipped(entries):
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
    for name, content in entries.items():
      archive.writestr(name, content)
  return file.getvalue()


def packed_again(content, root=""):
  """As a file manager packs what it has unpacked."""
  with zipfile.ZipFile(io.BytesIO(content)) as archive:
    entries = {f"{root}{name}": archive.read(name) for name in archive.namelist()}
  junk = {f"__MACOSX/{root}archive/._data.pkl": b"x", f"{root}.DS_Store": b"x", "empty/": b""}
  return zipped({**entries, **junk})


def expect(path, entry=""):
  read = read_contents(str(path), entry)
  assert sorted(read.tensors) == sorted(TENSORS)
  for name, array in TENSORS.items():
    np.testing.assert_array_equal(read.tensors[name], array)
  return read


TORCH, SAFE = torch_file(TREE), safetensors.numpy.save(TENSORS)
FORMATS = {
  "torch": TORCH,
  "safetensors": SAFE,
  "npz": npz(),
  "compressed": npz(np.savez_compressed),
}


@pytest.mark.parametrize("content", FORMATS)
@pytest.mark.parametrize(
  "name",
  ["W.PTH", "w", "w.weights", "w.safetensors", "w.NPZ", "w.pth.tar", "w.pt", "w.tar", "w (1).pth"],
)
def test_suffixes_do_not_count(tmp_path, name, content):
  (tmp_path / name).write_bytes(FORMATS[content])
  expect(tmp_path / name)


PACKED = {
  "gzip": gzip.compress(TORCH),
  "gzip of gzip": gzip.compress(gzip.compress(SAFE)),
  "compressed entries": torch_file(TREE, compression=zipfile.ZIP_DEFLATED),
  "no root": torch_file(TREE, root=""),
  "packed again": packed_again(TORCH),
  "packed again in a folder": packed_again(TORCH, "mobilenet/"),
  "one file of torch": zipped({"a/w.pth": TORCH, "a/README.md": "?", "__MACOSX/a/._w.pth": "?"}),
  "one safetensors": zipped({"model": SAFE, "config.json": "{}"}),
  "one npz in gzip": gzip.compress(zipped({"n.npz": npz()})),
}


@pytest.mark.parametrize("content", PACKED)
def test_packed_files(tmp_path, content):
  (tmp_path / "w.pth").write_bytes(PACKED[content])
  expect(tmp_path / "w.pth")


@pytest.fixture(params=[("model", ".safetensors"), ("pytorch_model", ".bin")])
def sharded(request, tmp_path):
  """The directory and the index of a sharded file, and which part has which tensor."""
  stem, suffix = request.param
  where = {}
  for number, name in enumerate(TENSORS, 1):
    part = f"{stem}-0000{number}-of-00002{suffix}"
    of_torch, of_numpy = {name: TREE[name]}, {name: TENSORS[name]}
    content = torch_file(of_torch) if suffix == ".bin" else safetensors.numpy.save(of_numpy)
    (tmp_path / part).write_bytes(content)
    where[name] = part
  path = tmp_path / f"{stem}{suffix}.index.json"
  path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
  return tmp_path, path, where


def test_sharded_files(sharded):
  directory, path, where = sharded
  digests = {expect(path).sha256, expect(directory).sha256}
  assert len(digests) == 1
  part = where["conv.weight"]
  with pytest.raises(ConfigError, match=rf"one of 2 parts.*{path.name}"):
    read_contents(str(directory / part))
  (directory / part).unlink()
  with pytest.raises(ConfigError, match=rf"missing: {part}"):
    read_contents(str(path))
  path.write_text(json.dumps({"weight_map": {**where, "conv.weight": "../secret"}}))
  with pytest.raises(ConfigError, match=r"same directory; missing: \.\./secret"):
    read_contents(str(path))
  path.write_text(json.dumps({"weight_map": {**where, "conv.weight": where["fc.bias"]}}))
  with pytest.raises(ConfigError, match=r"1 tensors.*conv\.weight"):
    read_contents(str(path))


def test_directories_of_the_hub(tmp_path):
  directory = tmp_path / "mobilenetv2_100.ra_in1k"
  directory.mkdir()
  (directory / "pytorch_model.bin").write_bytes(TORCH)
  assert expect(directory).published.architecture == "mobilenetv2_100"
  (directory / "config.json").write_text('{"architecture": "timm/mobilenetv1_100.in1k"}')
  assert expect(directory).published.architecture == "mobilenetv1_100"
  assert hub.published(str(directory)).architecture == "mobilenetv1_100"
  # The first of several counts.
  (directory / "pytorch_model.bin").write_bytes(b"damaged")
  (directory / "model.safetensors").write_bytes(SAFE)
  expect(directory)


def test_a_net_is_named_by_the_content_of_a_file(tmp_path):
  content = torch_file({"arch": "mobilenetv2_100", "state_dict": TREE})
  for name, packed in (("w", content), ("w.CKPT", content), ("w.gz", gzip.compress(content))):
    (tmp_path / name).write_bytes(packed)
    assert claim_of(epath.Path(tmp_path / name)).net == "mobilenetv2_100"
    expect(tmp_path / name, "state_dict")


def test_objects_in_an_npz_are_passed_over(tmp_path):
  np.savez(tmp_path / "w.npz", **TENSORS, history=np.array([{"loss": 1}], object))
  (note,) = expect(tmp_path / "w.npz").notes
  assert "history" in note


def tar():
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w") as archive:
    archive.addfile(tarfile.TarInfo("w.pth"))
  return file.getvalue()


XML = b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code><Message>Denied.</Message></Error>'
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 14212972\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>\n Sign in</title></head>"
# What somebody downloads or saves in the place of weights -> what is said of it.
OTHERS = {
  "web page": (PAGE, "web page ('Sign in')*Download the file itself"),
  "page in other letters": ("<HTML>".encode("utf-16"), "web page"),
  "error of a storage service": (XML, "answer of a server*AccessDenied: Denied."),
  "error of a hub": (b'{"error":"Repository not found"}', "server*'Repository not found'"),
  "error of an interface": (b'{"error": {"message": "Rate limit"}}', "server*'Rate limit'"),
  "text": (b"404: Not Found", "a text, not weights*'404: Not Found'"),
  "long text": ("naïve ".encode() * 2000, "a text*naïve"),
  "pointer of Git LFS": (LFS, "Git LFS*git lfs pull"),
  "pointer of git-annex": (b"/annex/objects/SHA256E-s5--00.pth\n", "git annex get"),
  "empty": (b"", "is empty"),
  "unfinished": (bytes(5000), "zero bytes*did not finish"),
  "tar": (tar(), "tar archive*Unpack"),
  "gzipped tar": (gzip.compress(tar()), "tar archive*Unpack"),
  "bzip2": (b"BZh91AY&SY", "bzip2*Unpack"),
  "7z": (b"7z\xbc\xaf\x27\x1c\0\4", "7z*Unpack"),
  "Keras h5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5*Keras*hf:timm/tf_mobilenetv3"),
  "Keras": (zipped({"config.json": "{}", "model.weights.h5": "?"}), "Keras model*timm"),
  "TorchScript": (
    zipped({"m/data.pkl": b"?", "m/constants.pkl": b"?", "m/code/__torch__.py": "?"}),
    "TorchScript*torch.jit.load(FILE).state_dict()",
  ),
  "torch.export": (
    zipped({"m/archive_format": "pt2", "m/data/weights/weight_0": b"?"}),
    "torch.export*torch.export.load(FILE).state_dict",
  ),
  "ONNX": (b"\x08\x08\x12\x07pytorch\x1a\x052.8.0:", "ONNX model"),
  "TensorFlow Lite": (b"\x1c\0\0\0TFL3" + bytes(40), "TensorFlow Lite"),
  "TensorFlow's index": (
    bytes(range(99)) + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb",
    "TensorFlow check",
  ),
  "Flax": (b"\x81\xa6params\x81\xa5Dense\x80", "MessagePack*Flax"),
  "image": (b"\x89PNG\r\n\x1a\n" + bytes(40), "an image (PNG)"),
  "zip of several": (zipped({"a.pth": TORCH, "b.pth": TORCH}), "2 weights files: a.pth, b.pth"),
  "zip of none": (zipped({"a.txt": "?"}), "zip archive without weights*a.txt"),
  "too often packed": (
    gzip.compress(gzip.compress(gzip.compress(gzip.compress(TORCH)))),
    "packed more than 3 times",
  ),
  "transformers": (
    safetensors.numpy.save(
      {"mobilenet_v2.conv_stem.first_conv.convolution.weight": np.zeros(3, np.float32)}
    ),
    "transformers*hf:timm/mobilenetv2_100",
  ),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w"])
def test_what_is_no_weights_file_is_named(tmp_path, kind, name):
  content, told = OTHERS[kind]
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ConfigError) as refused:
    read_contents(str(tmp_path / name))
  message = str(refused.value)
  assert message.startswith(f"The weights file '{tmp_path / name}' ")
  assert "\n" not in message
  assert len(message) < 450
  assert all(part in message for part in told.split("*")), message


def test_other_packings_in_zip_archives_are_refused(tmp_path):
  # Their decoders cannot be stopped at a size.
  for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
    (tmp_path / "w.pth").write_bytes(torch_file(TREE, compression=method))
    with pytest.raises(ConfigError, match="not packed with deflate"):
      read_contents(str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
  ("files", "told"),
  [
    (["saved_model.pb", "variables"], "SavedModel"),
    (["model.ckpt.index", "model.ckpt.data-00000-of-00001"], "TensorFlow checkpoint"),
    (["_CHECKPOINT_METADATA", "manifest.ocdbt"], "Orbax"),
    (["mine.PTH", "other.npz", "README.md"], "directory: give one of its files, mine.PTH, other"),
    ([], "--workdir"),
  ],
)
def test_directories_without_known_weights_are_named(tmp_path, files, told):
  for name in files:
    (tmp_path / name).touch()
  with pytest.raises(ConfigError, match=told):
    read_contents(str(tmp_path))


def test_the_prefix_of_a_tensorflow_checkpoint(tmp_path):
  (tmp_path / "model.ckpt.index").touch()
  with pytest.raises(ConfigError, match="TensorFlow checkpoint"):
    read_contents(str(tmp_path / "model.ckpt"))


def test_a_damaged_file_is_taken_for_what_its_name_says(tmp_path):
  for name, told in (("w.pth", "a PyTorch file"), ("w.NPZ", "an .npz file")):
    (tmp_path / name).write_bytes(bytes(range(256)))
    with pytest.raises(ConfigError, match=f"cannot be read as {told}"):
      read_contents(str(tmp_path / name))
  shutil.copy(tmp_path / "w.pth", tmp_path / "w.dat")
  with pytest.raises(ConfigError, match="unknown format"):
    read_contents(str(tmp_path / "w.dat"))
