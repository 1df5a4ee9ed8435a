"""Integer model files of a trained network, and the proof that they compute what was trained."""
