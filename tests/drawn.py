"""How many examples Hypothesis draws; `make test-all` sets the profile ci. By hand:

HYPOTHESIS_PROFILE=full pytest tests/test_wrong_input.py
"""

import os

import hypothesis

EXAMPLES = {"fast": 20, "ci": 30, "full": 500}
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "fast")


def load_profile():
  """For tests that are imported after this."""
  for name, count in EXAMPLES.items():
    derandomize = name != "full"
    hypothesis.settings.register_profile(
      name, max_examples=count, deadline=None, derandomize=derandomize, database=None
    )
  hypothesis.settings.load_profile(PROFILE)


def share_of_examples(share):
  """Fewer examples for a test whose examples are expensive or few."""
  return hypothesis.settings(max_examples=round(share * EXAMPLES[PROFILE]))
