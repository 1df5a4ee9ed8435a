"""PROFIT (Park & Yoo, ECCV 2020, arXiv 2008.04693) in JAX and Flax."""

__version__ = "0.2.0.dev0"
