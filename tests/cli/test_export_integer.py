"""`--mode export` of integer files: their cards, their use, and limits that are missed."""

import json
import re

import numpy as np
import pytest
from etils import epath

import profit_jax as pj
from profit_jax.cli import eval_file, predict
from profit_jax.export import formats, runtimes
from profit_jax.export.integer import ranges
from profit_jax.models import student_spec
from tests.cli.conftest import MODEL, tiny_settings, write_run
from tests.export.integers import FORMATS
from tests.export.nets import NORMALIZATION, digits, random_variables
from tests.wrong_input import assert_refused
from tests.wrong_input import command as run_command

pytestmark = pytest.mark.filterwarnings(r"ignore:the load_module\(\) method:DeprecationWarning")
NAMES = {name: f"{MODEL}_w4a4{formats.FORMATS[name].suffix}" for name in ("onnx", *FORMATS)}
ENDINGS = ("", ".json", ".md")


def export(run, *arguments):
  return run_command("--mode=export", f"--workdir={run}", *arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_v1):
  """A run with an exact file and both integer files, and what the command printed."""
  pytest.importorskip("ai_edge_litert")
  workdir = tmp_path_factory.mktemp("integer") / "run"
  write_run(workdir, best=True)
  code, printed, err = export(workdir, f"--formats={','.join(NAMES)}")
  assert code == 0, err
  return workdir, printed


@pytest.fixture(scope="module")
def exported(run):
  return run[0] / "export"


def card_of(exported, name):
  return json.loads((exported / f"{NAMES[name]}.json").read_text())


@pytest.mark.parametrize("name", FORMATS)
def test_a_line_says_how_much_differs(run, name):
  (line,) = (line for line in run[1].splitlines() if line.startswith(name))
  size = (run[0] / "export" / NAMES[name]).stat().st_size
  assert re.fullmatch(
    rf"{name} +{re.escape(NAMES[name])}  {size:,} bytes \([\d.]+x (smaller|larger) than float32\)  "
    r"0\.\d\d % of 403,200 codes differ, by 1 at most  top-1 ([\d.]+) % of 450 images, trained "
    r"([\d.]+) %: 100\.00 % of predictions agree",
    line,
  )


@pytest.mark.parametrize("name", FORMATS)
def test_the_card_says_how_much_differs_and_where(exported, name):
  card = card_of(exported, name)
  text = (exported / f"{NAMES[name]}.md").read_text()
  top1, proof = card["top1"], card["verification"]
  assert top1["agreement"] == 100.0
  assert top1["limits"] == {"agreement": 99.0, "top1_loss": 0.5}
  assert top1["trained"] == card_of(exported, "onnx")["top1"]["trained"]
  assert {row["quantizer"] for row in proof["quantizers"]} == {
    *("stem_quant", "block00/depthwise_quant", "block00/pointwise_quant")
  }
  for field, whole in (("codes", "codes"), ("differing", "differing")):
    assert sum(row[field] for row in proof["quantizers"]) == proof["file"][whole]
  assert proof["file"]["largest_difference"] == 1
  # Layers that read codes add nothing; what the stem's few codes change is seen free-running.
  stem, *others = proof["quantizers"]
  assert [row["differing"] for row in others] == [0, 0]
  assert 0 < stem["differing"] == stem["free_differing"]
  assert sum(row["free_differing"] for row in others) > 0
  for row in proof["quantizers"]:
    assert f"| {row['quantizer']} | {row['codes']:,} | " in text
  assert "is not equal to the trained model" in text
  assert "100.00 % are the trained model's; the export asked for 99 %" in text
  # Nothing of 4 bits is in the file.
  assert card["policy"]["weights"] == "all kernels, 4 bits in training; int8 in the file"
  for row in card["layers"]:
    assert row["kernel_bytes"] == np.prod(row["kernel"])
    assert row["bops"] == row["macs"] * row["weight_bits"] * row["input_bits"]
    assert row["input_bits"] in (4, 8)
  assert card["cost"]["bops"] == sum(row["bops"] for row in card["layers"])
  # What its input is.
  assert card["input"]["type"] == "uint8"
  assert ("file_input" in card) == (name == "litert_int8")
  assert ("int8 `[1, " in text) == (name == "litert_int8")
  # What opens it, and that all of it computes in integers.
  found = card["runtime_check"]
  if name == "onnx_int8":
    assert (found["ir_version"], found["opsets"], found["integer_operators"]) == (
      7,
      {"ai.onnx": 13},
      4,
    )
    assert "| ONNX | IR version 7, opset ai.onnx 13 |" in text
  else:
    assert (found["partitions"], list(found["operators"])) == (1, ["XNNPACK"])
    assert "takes the whole file, in 1 part." in text


@pytest.mark.parametrize("name", FORMATS)
def test_predict_and_eval_agree_with_the_trained_model(exported, tmp_path, capsys, name):
  np.save(tmp_path / "images.npy", next(digits().eval_batches(40))["image"])
  best, expected = (
    [
      classes[0][0]
      for classes in predict.predict(exported / NAMES[which], [tmp_path / "images.npy"])
    ]
    for which in (name, "onnx")
  )
  assert len(best) == 40
  assert best == expected
  assert eval_file.main([str(exported / NAMES[name])]) == 0
  printed = capsys.readouterr().out
  assert f"{NAMES[name]}: top-1 {card_of(exported, name)['top1']['file']:.2f} %" in printed


@pytest.mark.parametrize("name", FORMATS)
def test_a_missed_limit_leaves_no_file(run, monkeypatch, name):
  workdir = run[0]
  runner = formats.load(name).Runner
  right = runner.run

  def others(self, image, with_codes=False):
    """Every tenth image is put into another class."""
    logits, codes = right(self, image, with_codes)
    logits = logits.copy()
    logits[::10] = np.roll(logits[::10], 1, axis=1)
    return logits, codes

  content = {path.name: path.read_bytes() for path in (workdir / "export").iterdir()}
  try:
    with monkeypatch.context() as patch:
      patch.setattr(runner, "run", others)
      code, printed, err = export(workdir, f"--formats={name},onnx")
    kept = {path.name for path in (workdir / "export").iterdir()}
  finally:
    for file, before in content.items():
      (workdir / "export" / file).write_bytes(before)
  assert code == 1
  lines = printed.splitlines()
  (missed,) = (line for line in lines if line.startswith(name))
  assert re.search(r"LIMIT MISSED: 89\.78 % of its predictions are the trained model's, where 99 %",
                   missed)  # fmt: skip
  rows = [line.split() for line in lines if line.strip().startswith(("stem_", "block00/"))]
  assert [row[0] for row in rows] == [
    *("stem_quant", "block00/depthwise_quant", "block00/pointwise_quant")
  ]
  assert err.startswith(f"export failed: {name}: not within the limits (see above), and not kept.")
  assert len(err.splitlines()) == 1
  # The earlier file went, the other format's was written, the other runtime's stayed.
  assert kept == content.keys() - {f"{NAMES[name]}{ending}" for ending in ENDINGS}


def test_a_file_that_changes_when_its_codes_are_asked_for_is_not_kept(run, monkeypatch):
  runner = formats.load("onnx_int8").Runner
  right = runner.run

  def watched(self, image, with_codes=False):
    logits, codes = right(self, image, with_codes)
    return logits * (1.01 if with_codes else 1.0), codes

  export_folder = run[0] / "export"
  content = {path.name: path.read_bytes() for path in export_folder.iterdir()}
  try:
    with monkeypatch.context() as patch:
      patch.setattr(runner, "run", watched)
      code, printed, err = export(run[0], "--formats=onnx_int8", "--min_agreement=0")
    kept = {path.name for path in export_folder.iterdir()}
  finally:
    for file, before in content.items():
      (export_folder / file).write_bytes(before)
  assert code == 1
  assert "onnx_int8   NOT EQUAL: its logits change by 9.9e-03 of the largest when " in printed
  assert "LIMIT MISSED" not in printed
  assert err.startswith("export failed: onnx_int8: not what was trained (see above)")
  assert kept == content.keys() - {f"{NAMES['onnx_int8']}{ending}" for ending in ENDINGS}


def test_looser_limits_keep_it(run, monkeypatch):
  runner = formats.load("onnx_int8").Runner
  right = runner.run

  def others(self, image, with_codes=False):
    logits, codes = right(self, image, with_codes)
    return np.roll(logits, 1, axis=1), codes

  monkeypatch.setattr(runner, "run", others)
  limits = "--min_agreement=0", "--max_top1_loss=100"
  code, printed, err = export(run[0], "--formats=onnx_int8", *limits)
  assert code == 0, err
  assert " 0.00 % of predictions agree" in printed
  card = card_of(run[0] / "export", "onnx_int8")
  assert card["top1"]["limits"] == {"agreement": 0.0, "top1_loss": 100.0}


@pytest.mark.parametrize("field", ["min_agreement", "max_top1_loss"])
@pytest.mark.parametrize("value", ["101", "-1", "nan", "inf", "many", ""])
def test_limits_that_nothing_can_be_measured_by(tmp_path, field, value):
  code, printed, err = export(tmp_path, "--formats=onnx_int8", f"--{field}={value}")
  assert_refused(code, err, [f"{field}={value}"])
  assert not printed


@pytest.mark.parametrize("name", FORMATS)
def test_an_older_runtime_than_the_cards_is_refused(exported, tmp_path, monkeypatch, capsys, name):
  package = formats.FORMATS[name].opened_by
  path = tmp_path / NAMES[name]
  path.write_bytes((exported / NAMES[name]).read_bytes())
  card = card_of(exported, name)
  card["runtime_check"]["lowest"] = "1.15.0"
  (tmp_path / f"{path.name}.json").write_text(json.dumps(card))
  np.save(tmp_path / "image.npy", np.zeros((16, 16, 3), np.uint8))
  monkeypatch.setattr(runtimes, "installed", {package: "1.14.1"}.get)
  assert predict.main([str(path), str(tmp_path / "image.npy")]) == 2
  told = (
    f"cannot be opened with {package} 1.14.1: it needs version 1.15.0 or later. Install it: pip"
  )
  assert told in capsys.readouterr().err


def result_of(workdir):
  """What the library would have trained."""
  settings = tiny_settings()
  spec = student_spec(settings, 10)
  return pj.Result(
    top1=10.0,
    top5=50.0,
    start_top1=None,
    full_precision_top1=None,
    weights="raw",
    variables=random_variables(settings),
    bits=spec.bits.at(4, 4),
    spec=spec,
    phases=(),
    epochs=(),
    class_names=tuple("0123456789"),
    normalization=NORMALIZATION,
    seed=0,
    train_examples=1347,
    workdir=epath.Path(workdir),
  )


@pytest.mark.parametrize("rows", [30, 225])
def test_the_library_measures_ranges_on_enough_images(tiny_v1, tmp_path, monkeypatch, rows):
  seen, measure = [], ranges.measure

  def counted(net, images):
    seen.append(sum(map(len, images)))
    return measure(net, images)

  monkeypatch.setattr(ranges, "measure", counted)
  batches = [
    {"image": batch["image"], "label": batch["label"]} for batch in digits().eval_batches(rows)
  ]
  pj.export(result_of(tmp_path), tmp_path / "net.int8.onnx", batches)
  assert seen[0] >= 256


def test_the_library_exports_integer_files_within_limits(tiny_v1, tmp_path):
  batches = [
    {"image": batch["image"], "label": batch["label"]} for batch in digits().eval_batches(90)
  ]
  result, path = result_of(tmp_path), tmp_path / "net.int8.onnx"
  report = pj.export(result, path, batches, limits=pj.IntegerLimits(agreement=100.0))
  assert (report.format, report.examples, report.agreement, report.largest) == (
    *("onnx_int8", 450, 100.0, 1),
  )
  assert str(report).endswith("100.00 % of predictions agree")
  assert path.exists()
  runner = formats.load("onnx_int8").open_file(path)

  class Rolled:
    RUNTIME = formats.load("onnx_int8").RUNTIME
    write = staticmethod(formats.load("onnx_int8").write)

    @staticmethod
    def open_file(_):
      return Rolled

    @staticmethod
    def run(image, with_codes=False):
      logits, codes = runner.run(image, with_codes)
      return np.roll(logits, 1, axis=1), codes

  with pytest.raises(pj.NotEqual, match=r"^net.int8.onnx: .* the file was not kept") as caught:
    pj.export(result, path, batches, load=lambda _: Rolled)
  found = caught.value.comparison
  assert found.agreement == 0.0
  assert found.rows[0].quantizer == "stem_quant"
  assert found.limits == pj.IntegerLimits()
  assert not list(tmp_path.glob("net.int8.onnx*"))
