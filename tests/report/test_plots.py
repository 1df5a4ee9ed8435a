"""What the plots' axes say."""

from profit_jax.report import plots


def test_layers_stand_from_input_to_output():
  layers = [
    *(
      "stem_conv",
      "block00/depthwise_conv",
      "block00/squeeze_excite/reduce",
      "block00/squeeze_excite/expand",
    ),
    *(
      "block00/project_conv",
      "block01/expand_conv",
      "block01/depthwise_conv",
      "block01/project_conv",
    ),
    *("head_conv", "pre_classifier", "classifier"),
  ]
  names, values = plots.layer_matrix(
    [{layer: float(index) for index, layer in enumerate(sorted(layers))}]
  )
  assert names == layers
  assert list(values[:, 0]) == [sorted(layers).index(layer) for layer in layers]
  assert plots.layer_matrix([{"stem_norm": 0.0}]) is None
