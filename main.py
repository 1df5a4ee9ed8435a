"""Trains, evaluates, plans and exports: `profit_jax/cli/main.py`.

python main.py --config configs/digits_w4.py --workdir RUN [--mode MODE]
"""

from profit_jax.cli.main import main, run

__all__ = ["run"]

if __name__ == "__main__":
  main()
