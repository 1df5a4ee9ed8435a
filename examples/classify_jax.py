"""An exported JAX file without profit_jax: python classify_jax.py FILE.jax IMAGE (needs jax,
flatbuffers, numpy, pillow). IMAGE is a gray or RGB picture of 8 bits; classify_onnx.py reads more
kinds.
"""

import json
import sys

import jax
import numpy as np
from PIL import Image

if len(sys.argv) != 3:
  sys.exit("usage: python classify_jax.py FILE.jax IMAGE")
file, picture = sys.argv[1:]
with open(f"{file}.json") as opened:
  card = json.load(opened)
size, share = card["input"]["image_size"], card["input"]["crop_pct"]
image = Image.open(picture).convert("RGB")
shorter = round(size / share)  # the shorter side is scaled to this, then the centre is cut out
sides = [shorter * side // min(image.size) for side in image.size]
image = image.resize(sides, Image.Resampling[card["input"]["interpolation"].upper()])
left, top = (round((side - size) / 2) for side in image.size)
pixels = np.asarray(image.crop((left, top, left + size, top + size)))[None]
with open(file, "rb") as opened:
  program = jax.export.deserialize(bytearray(opened.read()))
(logits,) = np.asarray(program.call(pixels))  # on the CPU, a GPU or a TPU; any number of images
for index in np.argsort(-logits)[:5]:
  print(card["class_names"][index] if card["class_names"] else index, logits[index])
