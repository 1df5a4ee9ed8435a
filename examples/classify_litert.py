"""An exported LiteRT file without profit_jax: python classify_litert.py FILE.tflite IMAGE (needs
ai-edge-litert, numpy, pillow). FILE may be a .int8.tflite, too. IMAGE is a gray or RGB picture of 8
bits; classify_onnx.py reads more kinds.
"""

import json
import sys

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from PIL import Image

if len(sys.argv) != 3:
  sys.exit("usage: python classify_litert.py FILE.tflite IMAGE")
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
interpreter = Interpreter(file)
interpreter.allocate_tensors()
(given,), (found,) = interpreter.get_input_details(), interpreter.get_output_details()
if given["dtype"] == np.int8:  # pixel - 128, whatever the input's scale is
  pixels = (pixels ^ np.uint8(128)).view(np.int8)
interpreter.set_tensor(given["index"], pixels)
interpreter.invoke()
(logits,) = interpreter.get_tensor(found["index"])
if found["dtype"] == np.int8:
  scale, zero = found["quantization"]
  logits = np.float32(scale) * (np.float32(logits) - zero)
for index in np.argsort(-logits)[:5]:
  print(card["class_names"][index] if card["class_names"] else index, logits[index])
