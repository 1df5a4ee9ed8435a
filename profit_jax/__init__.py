"""PROFIT (Park & Yoo, ECCV 2020, arXiv 2008.04693) in JAX and Flax."""
