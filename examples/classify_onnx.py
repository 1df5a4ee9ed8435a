"""An exported ONNX file without profit_jax: python classify_onnx.py FILE.onnx IMAGE (needs
onnxruntime, numpy, pillow). IMAGE is a picture; for a model trained on own arrays, a .npy file of
one.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageChops

if len(sys.argv) != 3:
  sys.exit("usage: python classify_onnx.py FILE.onnx IMAGE")
file, picture = sys.argv[1:]
with open(f"{file}.json") as opened:
  card = json.load(opened)
if picture.endswith(".npy"):
  pixels = np.load(picture).reshape(1, *card["input"]["shape"])
else:
  size, share = card["input"]["image_size"], card["input"]["crop_pct"]
  image = Image.open(picture)
  if image.mode == "F" or (image.mode.startswith("I") and image.format == "TIFF"):
    sys.exit(f"{picture} has more than 8 bits: convert it to PNG")
  if image.mode.startswith("I"):  # 16 bits, of which the high byte is seen
    image = Image.fromarray(np.uint8(np.asarray(image) >> 8))
  if image.mode == "CMYK" and image.format != "TIFF" and "adobe" not in image.info:
    image = ImageChops.invert(image)  # Pillow takes all JPEG files for Adobe's
  # Transparency is dropped; Pillow alone would make a palette's black.
  image = image.convert("RGBA" if image.mode == "P" else "RGB").convert("RGB")
  shorter = round(size / share)  # the shorter side is scaled to this, then the centre is cut out
  image = image.resize(
    [shorter * side // min(image.size) for side in image.size],
    Image.Resampling[card["input"]["interpolation"].upper()],
  )
  left, top = (round((side - size) / 2) for side in image.size)
  # As uint8 [1, size, size, 3].
  pixels = np.asarray(image.crop((left, top, left + size, top + size)))[None]
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
(logits,) = session.run(None, {"image": pixels})
for index in np.argsort(-logits[0])[:5]:
  print(card["class_names"][index] if card["class_names"] else index, logits[0, index])
