"""Configurations: `base.py` has every field once; the others hold differences only."""
