"""Computes `variants.json`: what the classes of timm, torchvision and efficientnet-lite-pytorch
compute for every net of theirs that a model here is.

    pip install torch torchvision timm efficientnet-lite-pytorch
    python -m tests.golden.variants

Each net has 1000 classes and is evaluated in float64 on one image that is no square. Tensors and
image are made from their names by `tests/golden_data.py`. Kept are the number of parameters, a
digest of the tensors' names and shapes, and the first ten logits.
"""

import importlib.metadata
import json

import timm
import torch
import torchvision
from efficientnet_lite_pytorch import EfficientNet

from tests import golden_data

PACKAGES = ("torch", "torchvision", "timm", "efficientnet-lite-pytorch")
LOGITS = 10
MAKERS = {
  "timm": timm.create_model,
  "torchvision": torchvision.models.get_model,
  "efficientnet-lite-pytorch": EfficientNet.from_name,
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
  ),
  "efficientnet-lite-pytorch": tuple(f"efficientnet-lite{size}" for size in range(5)),
}


def golden(source: str, name: str) -> dict:
  """The numbers of one net."""
  net = MAKERS[source](name).double().eval()
  state = net.state_dict()
  shapes = {
    key: tuple(value.shape)
    for key, value in state.items()
    if not key.endswith("num_batches_tracked")
  }
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


def main() -> None:
  """Writes the file."""
  torch.set_default_dtype(torch.float64)
  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  variants = {
    f"{source}:{name}": golden(source, name) for source, names in NAMES.items() for name in names
  }
  text = json.dumps({"versions": versions, "variants": variants}, indent=1)
  (golden_data.GOLDEN / "variants.json").write_text(text + "\n")


if __name__ == "__main__":
  main()
