"""Computes `variants.json`: what the classes of timm, torchvision and efficientnet-lite-pytorch
compute for every net of theirs that a model here is.

    pip install torch torchvision timm efficientnet-lite-pytorch
    python -m tests.golden.variants

Each net has 1000 classes and is evaluated in float64 on one image that is no square. Tensors and
image are made from their names by `tests/golden_data.py`. Kept are the number of parameters, a
digest of the tensors' names and shapes, and the first ten logits; and which other nets of timm and
torchvision have the tensors of one of these.
"""

import functools
import importlib.metadata
import json
import re

import timm
import torch
import torchvision
from efficientnet_lite_pytorch import EfficientNet
from torchvision.models import get_model

from tests import golden_data

PACKAGES = ("torch", "torchvision", "timm", "efficientnet-lite-pytorch")
LOGITS = 10
MAKERS = {
  "timm": timm.create_model,
  "torchvision": lambda name: get_model(name.replace("quantization.", "quantized_")),
  # Without an image size it pads by that of each image.
  "efficientnet-lite-pytorch": functools.partial(EfficientNet.from_name, image_size=None),
}
NAMES = {
  "timm": (
    *(f"{prefix}efficientnet_lite{size}" for size in range(5) for prefix in ("", "tf_")),
    *(f"mnasnet_{percent}" for percent in ("050", "075", "100", "140")),
    *(f"mobilenetv1_{size}" for size in ("100", "100h", "125")),
    *(f"mobilenetv2_{size}" for size in ("035", "050", "075", "100", "110d", "120d", "140")),
    *(f"mobilenetv3_large_{percent}" for percent in ("075", "100")),
    *(f"mobilenetv3_small_{percent}" for percent in ("050", "075", "100")),
    "mobilenetv3_rw",
    *(
      f"tf_mobilenetv3_{size}_{percent}"
      for size in ("large", "small")
      for percent in ("075", "100", "minimal_100")
    ),
    *(f"mobilenetv4_conv_{size}" for size in ("small", "small_035", "small_050", "medium")),
  ),
  "torchvision": (
    *(f"mnasnet{width}" for width in ("0_5", "0_75", "1_0", "1_3")),
    *("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small"),
    *(f"resnet{depth}" for depth in (18, 34, 50, 101)),
    *(
      f"{prefix}{name}"
      for prefix in ("quantized_", "quantization.")
      for name in ("mobilenet_v2", "mobilenet_v3_large", "resnet18", "resnet50")
    ),
  ),
  "efficientnet-lite-pytorch": tuple(f"efficientnet-lite{size}" for size in range(5)),
}


# Families in which equal tensors are looked for.
FAMILIES = re.compile("efficientnet|fbnet|lite|mnasnet|mobilenet|resnet|spnas")


def shapes_of(net: torch.nn.Module) -> dict[str, tuple[int, ...]]:
  """The shapes of a net's tensors by name, without counters."""
  return {
    name: tuple(value.shape)
    for name, value in net.state_dict().items()
    if not name.endswith("num_batches_tracked")
  }


def golden(source: str, name: str) -> dict:
  """The numbers of one net."""
  net = MAKERS[source](name).double().eval()
  state, shapes = net.state_dict(), shapes_of(net)
  for key, value in golden_data.full_precision_tensors(shapes).items():
    state[key] = torch.from_numpy(value)
  net.load_state_dict(state)
  image = golden_data.variant_image(f"{source}:{name}").transpose(0, 3, 1, 2).copy()
  with torch.no_grad():
    logits = net(torch.from_numpy(image))[0, :LOGITS].tolist()
  return {
    "parameters": sum(parameter.numel() for parameter in net.parameters()),
    "tensors": golden_data.digest(shapes),
    "logits": logits,
  }


def same_tensors(digests: set[str]) -> list[str]:
  """The nets whose tensors have one of these digests, without those of `NAMES`."""
  found = []
  for source, names in (
    ("timm", timm.list_models()),
    ("torchvision", torchvision.models.list_models(torchvision.models)),
  ):
    for name in sorted({*names} - {*NAMES[source]}):
      if FAMILIES.search(name):
        with torch.device("meta"):
          net = MAKERS[source](name)
        if golden_data.digest(shapes_of(net)) in digests:
          found.append(f"{source}:{name}")
  return found


def main() -> None:
  """Writes the file."""
  torch.set_default_dtype(torch.float64)
  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  variants = {
    f"{source}:{name}": golden(source, name) for source, names in NAMES.items() for name in names
  }
  same = same_tensors({variant["tensors"] for variant in variants.values()})
  text = json.dumps({"versions": versions, "same_tensors": same, "variants": variants}, indent=1)
  (golden_data.GOLDEN / "variants.json").write_text(text + "\n")


if __name__ == "__main__":
  main()
