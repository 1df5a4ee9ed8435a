"""`main.py` with the tiny net that can be exported registered as `tiny_v1`.

python -m tests.export.command OPTIONS
"""

import sys

import main
from profit_jax.models import register
from tests.export import tiny

if __name__ == "__main__":
  register("tiny_v1")(tiny.TinyV1)
  sys.exit(main.run(sys.argv)[0])
