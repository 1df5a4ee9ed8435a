"""Layers (Flax linen) of which models are made."""
