"""Counts in the text of a program that XLA compiled for a TPU or a GPU; imports no JAX."""

import collections
import re
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_OTHERS = ("fusion", "copy", "custom-call", "convolution", "dot", "transpose", "while")
# Bits an element. Tuples, tokens and opaque values have no size.
_BITS = {"pred": 8, "bf16": 16} | {
  f"{kind}{bits}": bits for kind in "fsuc" for bits in (2, 4, 8, 16, 32, 64, 128)
}
# They run no kernel: names for memory, and the second halves of asynchronous operations.
_NO_KERNEL = frozenset(
  {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "async-start", "async-done"}
)
SMALL = 10**6  # bytes

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)$")


class Kernel(NamedTuple):
  """An instruction of a program's entry that the device runs.

  Attributes:
    kind: its operation; of a fusion its name without numbers; of a custom call its target.
    operation: its operation in XLA.
    size: bytes of its operands and results.
    estimate: bytes that XLA's analysis counts for a Pallas kernel; 0 unless the kernel names some.
  """

  kind: str
  operation: str
  size: int
  estimate: int = 0


def shape_bytes(shape: str) -> int:
  """Bytes of an array or a tuple as the text writes it, such as `bf16[8,2]{1,0}`."""
  total = 0
  for element, dimensions in re.findall(r"\b([a-z]+\d*)(?:e\dm\d\w*)?\[([\d,]*)\]", shape):
    count = 1
    for size in filter(None, dimensions.split(",")):
      count *= int(size)
    total += count * _BITS.get(element, 0) // 8
  return total


def kernels(text: str) -> list[Kernel]:
  """The kernels of a program's entry, in order.

  An operand counts wherever it is read. A loop counts once. The workspace of a library's call, the
  bytes at the end of its results, is not counted.
  """
  entry = text[text.index("\nENTRY ") :].partition("\n}")[0]
  sizes: dict[str, int] = {}
  found = []
  for line in entry.splitlines():
    match = _INSTRUCTION.match(line)
    if match is None:
      continue
    name, shape, operation, rest = match.groups()
    sizes[name] = shape_bytes(shape)
    if operation in _NO_KERNEL or operation.endswith("-done"):
      continue
    operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
    results = sizes[name]
    if operation == "custom-call" and shape.startswith("("):
      results = shape_bytes(shape.split("u8[")[0])
    size = results + sum(sizes.get(operand, 0) for operand in operands)
    estimate = re.search(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"', line)
    found.append(
      Kernel(_kind(name, operation, line), operation, size, int(estimate[1]) if estimate else 0)
    )
  return found


def _kind(name: str, operation: str, line: str) -> str:
  if target := re.search(r'custom_call_target="([^"]*)"', line):
    return target.group(1)
  return re.sub(r"[._\d]+$", "", name) if operation == "fusion" else operation


def kinds(text: str) -> dict[str, int]:
  """How often each kind of instruction stands anywhere in a program, fused ones included.

  A collective in two halves, as GPUs have them, counts once.
  """
  pattern = rf" (?:({'|'.join(COLLECTIVES)})(?:-start)?|({'|'.join(_OTHERS)}))\("
  return dict(collections.Counter(one or other for one, other in re.findall(pattern, text)))


def by_kind(kernels: list[Kernel]) -> dict[str, int]:
  """How many kernels of each kind, the most frequent first."""
  return dict(collections.Counter(kernel.kind for kernel in kernels).most_common())
