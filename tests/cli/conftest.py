"""The runs and exported files that other packages' tests make."""

from tests.export.conftest import random_run, tiny_v1
from tests.train.conftest import finished_run, tiny

__all__ = ["finished_run", "random_run", "tiny", "tiny_v1"]
