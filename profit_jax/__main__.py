"""`python -m profit_jax COMMAND`, where the command `profit` is not installed."""

import sys

from profit_jax.cli.main import profit

sys.exit(profit())
