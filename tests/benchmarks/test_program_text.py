"""What `benchmarks/aot.py` counts in a compiled program's text."""

import pytest

from benchmarks import program_text
from benchmarks.program_text import Kernel

GPU = """\
HloModule jit_step

%fused_computation (param_0: f32[8]) -> f32[8] {
  %param_0 = f32[8]{0} parameter(0)
  ROOT %copy.9 = f32[8]{0} copy(%param_0)
}

ENTRY %main.1 (x: bf16[4,8], w: f32[8]) -> (f32[8], s32[]) {
  %x = bf16[4,8]{1,0} parameter(0), metadata={op_name="x"}
  %w = f32[8]{0} parameter(1)
  %constant.1 = s32[] constant(1)
  %loop_add_fusion.12 = f32[8]{0} fusion(%w), kind=kLoop, calls=%fused_computation
  %conv.3 = (bf16[4,8]{1,0}, u8[1024]{0}) custom-call(%x, %w), \
custom_call_target="__cudnn$convForward"
  %part = bf16[4,8]{1,0} get-tuple-element(%conv.3), index=0
  %copy.1 = bf16[4,8]{0,1} copy(%part)
  %sum-start = f32[8]{0} all-reduce-start(%loop_add_fusion.12), to_apply=%add
  %sum-done = f32[8]{0} all-reduce-done(%sum-start)
  ROOT %tuple = (f32[8]{0}, s32[]) tuple(%sum-done, %constant.1)
}
"""
TPU = """\
HloModule jit_step

ENTRY %main (x: bf16[8,128]) -> f32[] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %copy-start = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[8,128]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %copy-done = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %kernel = bf16[8,128]{1,0} custom-call(%copy-done), custom_call_target="tpu_custom_call", \
backend_config={"cost_estimate":{"flops":"1","bytes_accessed":"77"}}
  ROOT %reduce_fusion.2 = f32[]{:T(128)} fusion(%kernel), kind=kLoop
}
"""


@pytest.mark.parametrize(
  ("shape", "expected"),
  [
    ("f32[2,3]{1,0}", 24),
    ("bf16[128,112,112,96]{0,3,2,1:T(8,128)(2,1)S(1)}", 128 * 112 * 112 * 96 * 2),
    ("pred[]", 1),
    ("s4[10]", 5),
    ("f8e4m3fn[16]", 16),
    ("(f32[2]{0}, /*index=1*/s32[], token[])", 12),
  ],
)
def test_bytes_of_shapes(shape, expected):
  assert program_text.shape_bytes(shape) == expected


def test_kernels_are_the_entrys_operations_with_their_operands_and_results():
  assert program_text.kernels(GPU) == [
    Kernel("loop_add_fusion", "fusion", 32 + 32),
    # The workspace is not counted.
    Kernel("__cudnn$convForward", "custom-call", 64 + 64 + 32),
    Kernel("copy", "copy", 64 + 64),
    Kernel("all-reduce-start", "all-reduce-start", 32 + 32),
  ]


def test_a_pallas_kernel_has_its_operands_results_and_estimate():
  prefetch, kernel, fusion = program_text.kernels(TPU)
  assert (prefetch.kind, fusion.kind) == ("copy-start", "reduce_fusion")
  assert kernel == Kernel("tpu_custom_call", "custom-call", 2048 + 2048, 77)
  assert fusion.size == 2048 + 4


def test_kinds_are_counted_in_the_whole_program():
  assert program_text.kinds(GPU) == {"copy": 2, "fusion": 1, "custom-call": 1, "all-reduce": 1}
  # A prefetch is no copy.
  assert program_text.kinds(TPU) == {"custom-call": 1, "fusion": 1}


def test_kernels_by_kind_start_with_the_most_frequent():
  found = [Kernel("copy", "copy", 1), Kernel("fusion", "fusion", 1), Kernel("fusion", "fusion", 9)]
  assert list(program_text.by_kind(found).items()) == [("fusion", 2), ("copy", 1)]
