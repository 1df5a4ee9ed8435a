"""How fast images come: this package's pipeline against decoding alone, and against a loader of PIL
and NumPy.

    python benchmarks/input_pipeline.py [--images_per_second SPEED]

Cuts JPEGs of ImageNet's usual size (500x375) out of scikit-learn's two photographs and measures, in
turns and in one run:

  decode       decoding whole JPEGs with tf.data and throwing the pixels away: the limit of these
               cores
  profit_jax   random part, scaling to 224, mirroring, batches of bytes:
               `data.load(settings).train_batches`
  PIL bytes    the same in PIL, in as many threads as there are cores (PIL and NumPy compute
               outside Python's lock, and processes would have to send their batches), giving the
               same batches of bytes
  PIL floats   and normalized by NumPy to float32, as such loaders do (here the compiled step does
               it)

With SPEED, or on an accelerator, where it is measured (MobileNet-v2 at 224, W4A4, batch 256,
bfloat16, its own teacher), it says how many such cores feed one accelerator.
"""

import argparse
import concurrent.futures
import io
import os
import pathlib
import statistics
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import numpy as np
from PIL import Image

SIZE, BATCH, ROUNDS = 224, 64, 3
WIDTH, HEIGHT, QUALITY, DIFFERENT, FILES = 500, 375, 95, 1024, 4096
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
CORES = len(os.sched_getaffinity(0))


def write_files(root: pathlib.Path) -> list[str]:
  """An image folder with two classes; returns the training files."""
  from sklearn.datasets import load_sample_images

  photographs = [Image.fromarray(photo) for photo in load_sample_images().images]
  rng, paths = np.random.default_rng(0), []
  # Enough that a pass's fixed costs do not show: its graphs are traced in 0.3 s.
  for i in range(FILES + 2):
    photo = photographs[i % 2]
    left, top = rng.integers(0, photo.width - WIDTH + 1), rng.integers(0, photo.height - HEIGHT + 1)
    path = root / ("train" if i < FILES else "val") / str(i % 2) / f"{i:04d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    if DIFFERENT <= i < FILES:
      os.link(paths[i % DIFFERENT], path)
    else:
      photo.crop((left, top, left + WIDTH, top + HEIGHT)).save(path, quality=QUALITY)
    paths.append(str(path))
  return paths[:FILES]


def pil_image(path: str, rng: np.random.Generator) -> np.ndarray:
  """A random part of an image, scaled and mirrored or not, as torchvision's code would make it."""
  with open(path, "rb") as file:
    image = Image.open(io.BytesIO(file.read())).convert("RGB")
  for _ in range(10):
    area = image.width * image.height * rng.uniform(0.08, 1)
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    width, height = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
    if width <= image.width and height <= image.height:
      break
  else:
    width, height = image.width, image.height
  left, top = rng.integers(0, image.width - width + 1), rng.integers(0, image.height - height + 1)
  image = image.crop((left, top, left + width, top + height)).resize(
    (SIZE, SIZE), Image.Resampling.BICUBIC
  )
  if rng.uniform() < 0.5:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return np.asarray(image)


def pil_batch(task: tuple[list[str], int, bool]) -> np.ndarray:
  """A batch in one thread; floats are normalized."""
  paths, seed, floats = task
  rng = np.random.default_rng(seed)
  images = np.stack([pil_image(path, rng) for path in paths])
  return (images.astype(np.float32) / 255 - MEAN) / STD if floats else images


def accelerator_speed() -> float | None:
  """Images per second of a training step on the first device; None on a CPU."""
  import jax

  if jax.default_backend() == "cpu":
    return None
  from configs import mbv2_w4
  from profit_jax import data, schedule
  from profit_jax.config import parse
  from profit_jax.models import REGISTRY
  from profit_jax.train import start
  from profit_jax.train.programs import Programs
  from profit_jax.train.state import create_state

  config = mbv2_w4.get_config()
  config.train.dtype = "bfloat16"
  settings = parse(config, REGISTRY)
  info = data.info(settings)
  phase = schedule.plan(settings)[-2]
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))
  student = start.load_student(settings, info.num_classes)
  programs = Programs(settings, info, student.spec, student.spec, mesh)
  state = programs.placement.replicate(create_state(student.make(), student.spec, ema=True))
  state = programs.states.with_fresh_optimizer(state, phase.program)
  teacher, key = programs.placement.replicate((student.make(), jax.random.key(0)))
  size = settings.train.batch_size
  batch = programs.placement.split(
    {
      "image": np.zeros((size, SIZE, SIZE, 3), np.uint8),
      "label": np.zeros(size, np.int32),
      "mask": np.ones(size, bool),
    }
  )
  step, rate = programs.train_step(phase.program), np.float32(0.001)
  bits = student.spec.bits.at(phase.weight_bits, phase.act_bits)
  for i in range(30):
    if i == 10:
      jax.block_until_ready(state)
      begun = time.perf_counter()
    state, _, _ = step(state, batch, bits, rate, key, teacher, None, None)
  jax.block_until_ready(state)
  return 20 * size / (time.perf_counter() - begun)


def open_source(directory: str):
  """This package's source for an image folder."""
  from configs import mbv2_w4
  from profit_jax import data
  from profit_jax.config import parse
  from profit_jax.models import REGISTRY

  config = mbv2_w4.get_config()
  config.update_from_flattened_dict(
    {
      "data.name": "folder",
      "data.data_dir": directory,
      "train.batch_size": BATCH,
      "train.eval_batch_size": 2,
    }
  )
  return data.load(parse(config, REGISTRY))


def decode(files: list[str]) -> None:
  """Decodes whole JPEGs with tf.data and throws the pixels away."""
  import tensorflow as tf

  def height(path):
    return tf.shape(
      tf.io.decode_jpeg(tf.io.read_file(path), channels=3, dct_method="INTEGER_ACCURATE")
    )[0]

  options = tf.data.Options()
  options.autotune.enabled = False  # as in data/images.py, which says why
  for _ in (
    tf.data.Dataset.from_tensor_slices(files)
    .map(height, CORES, deterministic=True)
    .batch(BATCH)
    .with_options(options)
  ):
    pass


def measure() -> tuple[dict[str, list[float]], float]:
  """Images per second of every loader in every round, and the files' average size in bytes."""
  with (
    tempfile.TemporaryDirectory() as directory,
    concurrent.futures.ThreadPoolExecutor(CORES) as pool,
  ):
    files = write_files(pathlib.Path(directory))
    size = statistics.mean(os.path.getsize(path) for path in files)
    # Opened first: it sets up TensorFlow.
    source = open_source(directory)

    def ours(epochs=iter(range(1000))):
      for _ in source.train_batches(next(epochs), BATCH):
        pass

    def pil(floats):
      tasks = [(files[i : i + BATCH], i, floats) for i in range(0, FILES, BATCH)]
      for _ in pool.map(pil_batch, tasks):
        pass

    loaders = {
      "decode": lambda: decode(files),
      "profit_jax": ours,
      "PIL bytes": lambda: pil(False),
      "PIL floats": lambda: pil(True),
    }
    speeds = {name: [] for name in loaders}
    for turn in range(ROUNDS + 1):
      for name, run in loaders.items():
        begun = time.perf_counter()
        run()
        if turn:  # the first one warms up: files into the page cache, graphs traced
          speeds[name].append(FILES / (time.perf_counter() - begun))
  return speeds, size


def main() -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--images_per_second", type=float, help="of one accelerator, measured elsewhere"
  )
  options = parser.parse_args()
  speeds, size = measure()
  median = {name: statistics.median(values) for name, values in speeds.items()}
  print(
    f"{FILES} JPEGs of {WIDTH}x{HEIGHT}, {size / 1000:.0f} kB on average, {CORES} cores; median "
    f"of {ROUNDS} turns "
    f"(lowest to highest)"
  )
  for name, values in speeds.items():
    print(
      f"{name:11} {median[name]:7.0f} images/s  ({min(values):.0f} to {max(values):.0f}), "
      f"{median[name] / CORES:.0f} a core"
    )
  for other, target in (("decode", "0.85"), ("PIL floats", "2"), ("PIL bytes", None)):
    wanted = f"  (target: at least {target})" if target else ""
    print(f"profit_jax / {other}: {median['profit_jax'] / median[other]:.2f}{wanted}")

  speed = options.images_per_second or accelerator_speed()
  if speed is None:
    print(
      "Cores that feed one accelerator: not run, there is none here; give its --images_per_second."
    )
  else:
    told = "given" if options.images_per_second else "measured"
    print(
      f"Cores that feed one accelerator of {speed:.0f} images/s ({told}): "
      f"{speed * CORES / median['profit_jax']:.1f}"
    )


if __name__ == "__main__":
  main()
