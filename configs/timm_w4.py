r"""The strongest small nets of timm at 4 bits on ImageNet, ResNet-101 as teacher, by MobileNet-v2's
recipe; 22 phases, 200 epochs.

Command:  pip install ".[hub]"
          python main.py --config configs/timm_w4.py:mobilenetv3_large_100.ra4_e3600_r224_in1k \
            --workdir RUN
Weights:  timm's, from https://huggingface.co/timm; top-1 at 224 px by its table of results:
            mobilenetv1_100.ra4_e3600_r224_in1k          75.39 %
            mobilenetv2_100.ra_in1k                      72.91 %
            mobilenetv3_large_100.ra4_e3600_r224_in1k    76.31 %
            mobilenetv3_large_100.miil_in21k_ft_in1k     77.92 %
            mobilenetv4_conv_small.e2400_r224_in1k       73.76 %
          Torchvision's resnet101-63fe2227.pth (77.374 %). Both are downloaded once.
Cost:     1,000,800 steps of 256 images at 224 px, each with a forward pass of the teacher; not run.
Result:   not run.

Crop, interpolation and normalization are those of each file's page, and so is the epsilon of the
norms. MobileNet-v3's weights were trained with zero padding; the full-precision phase adapts them
to negative padding.
"""

from typing import NamedTuple

from configs import base


class Recipe(NamedTuple):
  """A model and the images that its weights were trained for.

  Attributes:
    model: its name here.
    crop_pct: share of the shorter side that evaluation keeps.
    interpolation: of scaling.
    normalization: inception is mean and deviation 0.5; none is 0 and 1.
    bn_momentum: of the running statistics; the authors' value for MobileNet-v3.
  """

  model: str
  crop_pct: float
  interpolation: str
  normalization: str
  bn_momentum: float = 0.9


RECIPES = {
  "mobilenetv1_100.ra4_e3600_r224_in1k": Recipe("mobilenet_v1", 0.875, "bicubic", "inception"),
  "mobilenetv2_100.ra_in1k": Recipe("mobilenet_v2", 0.875, "bicubic", "imagenet"),
  "mobilenetv3_large_100.ra4_e3600_r224_in1k": Recipe(
    "mobilenet_v3_large", 0.95, "bicubic", "inception", 0.9997
  ),
  "mobilenetv3_large_100.miil_in21k_ft_in1k": Recipe(
    "mobilenet_v3_large", 0.875, "bilinear", "none", 0.9997
  ),
  "mobilenetv4_conv_small.e2400_r224_in1k": Recipe(
    "mobilenet_v4_conv_small", 0.875, "bicubic", "imagenet"
  ),
}


def get_config(weights: str = "mobilenetv3_large_100.ra4_e3600_r224_in1k"):
  """`base.py` with a model, its weights and their images; `weights` follows the file's colon."""
  if weights not in RECIPES:
    raise ValueError(
      f"configs/timm_w4.py:{weights} is not allowed: the weights must be one of "
      f"{', '.join(RECIPES)}."
    )
  recipe = RECIPES[weights]
  config = base.get_config()
  config.model.name = recipe.model
  config.model.bn_epsilon = 1e-5
  config.model.bn_momentum = recipe.bn_momentum
  config.init.weights = f"hf:timm/{weights}"
  config.teacher.model = "resnet101"
  config.teacher.weights = "torchvision:resnet101.IMAGENET1K_V1"
  config.teacher.normalization = "imagenet"
  config.data.image_size = 224
  config.data.crop_pct = recipe.crop_pct
  config.data.interpolation = recipe.interpolation
  config.data.normalization = recipe.normalization
  return config
