"""Integer model files of a trained network, and the proof that they compute what was trained.

`profit_jax.export` is this package and, called, `profit_jax.export.write.export`: one name for
both, because the import of a package takes the name of a function beside it.
"""

import sys
import types
from typing import Any


class _Callable(types.ModuleType):
  def __call__(self, *args: Any, **options: Any) -> Any:
    from profit_jax.export.write import export

    return export(*args, **options)


sys.modules[__name__].__class__ = _Callable
