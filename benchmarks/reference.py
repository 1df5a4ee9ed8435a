"""The authors' PyTorch training step, run from a checkout of their repository
(github.com/EunhyeokPark/PROFIT).

Nothing of their code is here: their model and `train_ts` are imported and called. What this adds is
what their script expects around them: the parameter groups of its optimizer, `DataParallel`, a
loader, and, where there is no CUDA, tensors whose `.cuda()` is themselves. torch is imported only
when it is asked for.
"""

import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

# name: (memory format, compiled, autocast to bfloat16)
VARIANTS = {
  "eager": ("contiguous", False, False),
  "channels_last": ("channels_last", False, False),
  "compiled": ("contiguous", True, False),
  "compiled_channels_last": ("channels_last", True, False),
  "eager_bf16": ("channels_last", False, True),
  "compiled_bf16": ("channels_last", True, True),
}
_MODELS = {
  "mobilenet_v2": ("conv_model.ilsvrc.MobileNetV2_quant", "mobilenet_v2", "width_mult"),
  "mobilenet_v3_large": (
    "conv_model.ilsvrc.MobileNetV3Large_pad_quant",
    "MobileNetV3Large",
    "scale",
  ),
}
_BITS = 4


class Job(NamedTuple):
  """What both sides compute.

  Attributes:
    directory: the checkout.
    model: our name of it.
    width: of the model.
    dtype: float32 or bfloat16, ours; the variant says theirs.
    self_teacher: a copy of the model runs beside it.
    seed: of the frozen layers.
  """

  directory: str
  model: str
  width: float
  dtype: str
  self_teacher: bool
  seed: int


def describe() -> str:
  """Version and device, in a line."""
  import torch

  where = (
    torch.cuda.get_device_name()
    if torch.cuda.is_available()
    else f"CPU, {torch.get_num_threads()} threads"
  )
  return f"torch {torch.__version__} on {where}"


def contenders(
  job: Job, variant: str, batch: dict[str, np.ndarray], stages: list[str]
) -> Iterator[tuple[str, Callable[[int], None]]]:
  """Their steps of the stages that are asked for, and a function each that runs so many.

  Raises:
    SystemExit: they have no such model.
  """
  import torch

  if job.model not in _MODELS:
    sys.exit(
      f"the authors' repository has no {job.model}, only {', '.join(_MODELS)}: leave "
      "--torch-reference out"
    )
  sys.path.insert(0, job.directory)
  library = importlib.import_module("my_lib.train_test")
  library.accuracy = _accuracy
  if not torch.cuda.is_available():
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self
    # Their AIWQ hook measures on device 0 only, and a CPU says -1.
    torch.Tensor.get_device = lambda self: 0
  else:
    torch.backends.cudnn.benchmark = True
  for stage in stages:
    torch._dynamo.reset()
    yield stage, _contender(library, job, variant, batch, stage)


def _contender(library, job, variant, batch, stage) -> Callable[[int], None]:
  import torch

  layout, compiled, autocast = VARIANTS[variant]
  layout = torch.channels_last if layout == "channels_last" else torch.contiguous_format
  images, labels = _tensors(batch, layout)
  model = _model(job, stage, images).to(memory_format=layout)
  average, teacher = copy.deepcopy(model), None
  if job.self_teacher:
    teacher = _model(job, "fp", images).to(memory_format=layout).requires_grad_(False)
  if compiled:
    # In place: AIWQ's hooks, which the sampling step sets, are then seen or break the graph, as
    # torch decides.
    for module in (model, teacher):
      if module is not None:
        module.compile()
  model, average, teacher = (
    module and torch.nn.DataParallel(module.cuda()) for module in (model, average, teacher)
  )
  images, labels = images.cuda(), labels.cuda()
  loss = torch.nn.CrossEntropyLoss().cuda()
  optimizer = _optimizer(torch, model, stage)
  metric = {}
  if stage == "sampling":
    metric = {name: 0 for name, module in model.module.named_modules() if _is_conv(torch, module)}

  def run(count: int) -> None:
    with torch.autocast(
      "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, enabled=autocast
    ):
      if stage == "forward":
        model.eval()
        with torch.no_grad():
          for _ in range(count):
            model(images)
      else:
        library.train_ts(
          [(images, labels)] * count, model, average, teacher, loss, optimizer, 0, metric
        )
    if torch.cuda.is_available():
      torch.cuda.synchronize()

  return run


def _accuracy(output: Any, target: Any, topk: tuple[int, ...]) -> list[Any]:
  # Theirs takes a view that PyTorch has refused since 1.7.
  best = output.topk(max(topk), 1).indices
  right = best == target[:, None]
  return [right[:, :k].float().sum() * (100.0 / len(target)) for k in topk]


def _tensors(batch: dict[str, np.ndarray], layout: Any):
  import torch

  scaled = (batch["image"].astype(np.float32) / 255 - 0.45) / 0.225
  images = torch.from_numpy(scaled.transpose(0, 3, 1, 2).copy()).to(memory_format=layout)
  return images, torch.from_numpy(batch["label"].astype(np.int64))


def _model(job: Job, stage: str, images: Any) -> Any:
  ops = importlib.import_module("quant_op.duq").QuantOps
  module, factory, width = _MODELS[job.model]
  model = getattr(importlib.import_module(module), factory)(ops, **{width: job.width})
  if stage != "fp":
    ops.initialize(model, [(images, None)], 2**_BITS, act=True)
  if stage not in ("fp", "a"):
    ops.initialize(model, [(images, None)], 2**_BITS, weight=True)
  return model


def _is_conv(torch: Any, module: Any) -> bool:
  return hasattr(module, "_weight_quant") and isinstance(module, torch.nn.Conv2d)


def _optimizer(torch: Any, model: Any, stage: str) -> Any:
  """SGD in their script's groups. A frozen kernel, or a BN phase's, has rate 0 there and is
  computed all the same.
  """
  rate, quant, norm, weight = 1e-6, [], [], []
  for name, parameter in model.named_parameters():
    group = quant if name.endswith((".a", ".c")) else norm if parameter.ndim == 1 else weight
    group.append(parameter)
  groups = [
    {"params": quant, "weight_decay": 0.0, "lr": rate * 1e-2},
    {"params": norm, "weight_decay": 0.0, "lr": rate},
    {"params": weight, "weight_decay": 4e-5, "lr": 0.0 if stage == "bn" else rate},
  ]
  return torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)
