"""What the MobileNets share: how channels are rounded, and the bound of a ReLU6's quantizer."""

# A ReLU6 quantizer's interval starts at 6 or below, whether the non-linearity itself is bounded or
# not.
RELU6_BOUND = 6.0


def divisible_by_8(channels: float) -> int:
  """Rounds to the nearest multiple of 8, at least 8, and not more than 10 % down."""
  rounded = max(8, int(channels + 4) // 8 * 8)
  return rounded + 8 if rounded < 0.9 * channels else rounded


def up_to_multiple_of_8(channels: float) -> int:
  """Rounds up to a multiple of 8."""
  return int((channels + 7) // 8) * 8
