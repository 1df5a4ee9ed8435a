"""What each part of the method is worth on digits: a grid of runs for `profit ablate`.

Command:  profit ablate --config configs/ablation_digits.py --workdir runs/ablation
Cost and result: docs/ablation.md.
"""


def get_grid():
  """A plain dictionary.

  config: what `main.py --config` takes; `{axis}` stands for that axis's label.
  fields: of every run, as `--config.FIELD=VALUE`.
  axes: by name, labels and the fields that each sets. The first label of an axis is the method as
    it is; tables compare the others with it.
  keep: labels -> whether the cell is run.
  seeds: runs of every cell, with seeds 0, 1, ...
  """
  return {
    "config": "configs/digits_w4.py:{model}",
    "fields": {
      # Small images and few epochs: a run must cost a minute or two, since there are many.
      "data.image_size": 16,
      "model.strides": (1, 1, 2, 2, 2, 1, 1, 1),
      "plan.full_precision_epochs": 20,
      "plan.finetune_epochs": 3,
    },
    "axes": {
      "model": {
        "mobilenet_v2": {},
        "mobilenet_v3_small": {"model.strides": (1, 1, 2, 2, 1, 1)},
      },
      "bits": {
        "W3A3": {
          "plan.weight_bits": (8, 4, 3),
          "plan.act_bits": (8, 4, 3),
          "plan.profit_bits": (3,),
        },
        "W2A2": {
          "plan.weight_bits": (8, 4, 2),
          "plan.act_bits": (8, 4, 2),
          "plan.profit_bits": (2,),
          "plan.refit_bits": (2,),
        },
      },
      # Off: the same three fine-tunings with nothing frozen, so that both sides train for as many
      # epochs.
      "freezing": {"on": {}, "off": {"plan.freeze_fractions": (0.0, 0.0, 0.0)}},
      # Off: straight to the last bits, in fine-tunings that are longer by what the others take.
      "progressive": {"on": {}, "off": {"plan.progressive": False, "plan.finetune_epochs": 7}},
      "negative padding": {"on": {}, "off": {"model.pad_value": 0.0}},
    },
    # Each part left out alone, and freezing and progressive bits together: plain fine-tuning. Only
    # MobileNet-v3 pads.
    "keep": lambda labels: (
      labels["negative padding"] == "on"
      or (
        labels["model"] == "mobilenet_v3_small"
        and labels["freezing"] == labels["progressive"] == "on"
      )
    ),
    "seeds": 5,
  }
