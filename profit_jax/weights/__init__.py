"""Strict import of weights that other codebases wrote."""
