"""The figures in README.md, docs and configurations are the measured ones; what they name exists.

`benchmarks/readme_figures.py` measures the figures into `benchmarks/readme_figures.json`. Here that
file is compared with the README's table and results, the `Result:` lines of the configurations, the
exports in the docs, and every other percentage with two decimals or more.
"""

import ast
import json
import pathlib
import re

import pytest

import profit_jax as pj
from configs.digits_w4 import MODELS
from profit_jax.nn.spec import describe

ROOT = pathlib.Path(__file__).parent.parent
FIGURES = json.loads((ROOT / "benchmarks" / "readme_figures.json").read_text())
RUNS = FIGURES["runs"]
DEMO = "configs/digits_w4.py"
FINETUNED = json.loads((ROOT / "benchmarks" / "lite0_finetune.json").read_text())
README = (ROOT / "README.md").read_text()
# docs/ablation.md has figures of its own, with their commits, in docs/ablation/*.json.
DOCS = sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "ablation.md")
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
LINKED = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def name(path):
  return path.relative_to(ROOT).as_posix()


def words(text):
  """With every run of blanks as one: what is printed may be wrapped."""
  return " ".join(text.split())


def blocks(text):
  """The lines in code blocks, fenced or indented, without indentation."""
  fenced = re.findall(r"^```.*?\n(.*?)^```", text, flags=re.S | re.M)
  outside = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
  indented = re.findall(r"^    .*", outside, flags=re.M)
  return [line.strip() for line in [*"".join(fenced).splitlines(), *indented]]


def docstring(path):
  return ast.get_docstring(ast.parse(path.read_text())) or ""


def percent(value):
  return "diverged" if value is None else f"{value:.2f} %"


def top1(run):
  return percent(run["top1"])


def full_precision(run):
  return percent(run["full_precision_top1"])


def runs_of(config):
  """The run of every model that was measured; MobileNet-v2 is the configurations' default."""
  names = {model: config if model == "mobilenet_v2" else f"{config}:{model}" for model in MODELS}
  return {model: RUNS[name] for model, name in names.items() if name in RUNS}


def test_the_demo_prints_these_rows_and_this_line():
  measured = [words(row) for row in RUNS[DEMO]["table"]]
  rows = [words(line) for line in blocks(README) if re.match(r"\d+ +(fp|[wa]\d)", line)]
  assert rows
  assert [row for row in rows if row not in measured] == []
  assert RUNS[DEMO]["final_line"] in words(README)


def test_the_results_are_the_measured_ones():
  rows = [
    tuple(cell.strip() for cell in line.strip("|").split("|"))
    for line in README.splitlines()
    if line.startswith("| mobilenet_")
  ]
  four, two = runs_of(DEMO), runs_of("configs/digits_w2.py")
  assert four.keys() == two.keys()
  # One column of full precision stands for both runs of a model.
  both = [model for model in four if two[model]["top1"] is not None]
  assert [m for m in both if full_precision(four[m]) != full_precision(two[m])] == []
  assert rows == [
    (model, str(MODELS[model][0]), full_precision(four[model]), top1(four[model]), top1(two[model]))
    for model in four
  ]
  three = RUNS["configs/digits_w3.py"]
  assert f"{top1(three)} at W3A3, {full_precision(three)} in full precision" in words(README)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_a_configuration_states_its_result(bits):
  config = f"configs/digits_w{bits}.py"
  run, text = RUNS[config], words(docstring(ROOT / config))
  result = f"top-1 {top1(run)} at W{bits}A{bits}, {full_precision(run)} in full precision"
  assert f"Result: {result} (seed {run['seed']}; {run['examples']} images" in text


@pytest.mark.parametrize("path", [*LINKED[:1], *DOCS, *CONFIGS], ids=name)
def test_every_percentage_is_measured_or_cited(path):
  text = docstring(path) if path.suffix == ".py" else path.read_text()
  known = {*FIGURES["cited"]}
  for run in RUNS.values():
    fields = (run[field] for field in ("top1", "top5", "full_precision_top1"))
    known |= {f"{value:.2f}" for value in fields if value is not None}
    known |= set(re.findall(r"[\d.]+(?= points)", run["final_line"]))
  # 0.22 points: what one of the 450 images is.
  known |= {f"{100 / RUNS[DEMO]['examples']:.2f}"}
  known |= {f"{value:.2f}" for value in finetuned()}
  found = re.findall(r"(\d+\.\d{2,})(?= %| points)", words(text))
  assert sorted({*found} - known) == []


def finetuned():
  """Top-1 in full precision, at 4 bits and of the file."""
  final = FINETUNED["final"]
  return final["full_precision_top1"], final["top1"], FINETUNED["export"]["top1"]["file"]


def test_the_fine_tuned_network_is_the_measured_one():
  full, four, file = map(percent, finetuned())
  text = words(docstring(ROOT / "configs/lite0_finetune_w4.py"))
  assert (
    f"{four} at W4A4, {full} in full precision, of 10,000 test images; the ONNX file {file}" in text
  )
  text = words((ROOT / "docs/weights.md").read_text())
  rows = (
    f"6 epochs | {full} | | W4A4 | {four} | | the ONNX file, {FINETUNED['export']['bytes']:,} bytes"
  )
  assert rows in text
  assert f"{FINETUNED['export']['top1']['images_at_ties']} get another class" in text


def test_exports_print_these_lines():
  printed = {words(line) for run in RUNS.values() for line in run["export"]["lines"]}
  for path in LINKED:
    shown = [words(line) for line in blocks(path.read_text()) if "codes differ" in line]
    assert [line for line in shown if line not in printed] == [], name(path)
  (onnx,) = (line for line in RUNS[DEMO]["export"]["lines"] if line.startswith("onnx"))
  size, ratio = re.search(r"([\d,]+) bytes \(([\d.]+x) smaller", onnx).groups()
  assert f"{size} bytes, {ratio} smaller" in words(README)


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / DEMO], ids=name)
def test_the_demo_takes_this_long(path):
  (minutes,) = re.findall(r"about (\d+) minutes on 2 CPU cores", words(path.read_text()))
  assert int(minutes) == round(RUNS[DEMO]["minutes"])


def sentences(text):
  """The prose: no code blocks, tables, headings or pictures; a link is its text."""
  text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
  text = re.sub(r"^(    |\||#|!\[).*", "", text, flags=re.M)
  text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
  text = re.sub(r"`[^`]*`", "code", text)
  text = re.sub(r"^(\d+\.|-) ", "", text, flags=re.M)
  paragraphs = [words(paragraph) for paragraph in re.split(r"\n\s*\n", text)]
  found = [part for paragraph in paragraphs for part in re.split(r"(?<=[.!?])\s", paragraph)]
  return [part for part in found if len(part.split()) > 1]


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "docs" / "library.md"], ids=name)
def test_the_example_of_the_library_can_be_trained(path, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  code = re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.S | re.M)[0]
  assert len(code.splitlines()) <= 20
  fitted = {}

  def fit(trainer, data, seed=0):
    fitted["data"] = data
    return "result"

  monkeypatch.setattr(pj.Trainer, "fit", fit)
  monkeypatch.setattr(pj, "export", lambda *given: fitted.update(export=given))
  names = {"my_train_batches": lambda epoch, first_step: iter(()), "my_eval_batches": [1]}
  exec(code, names)
  assert fitted == {"data": names["data"], "export": ("result", "net.onnx", [1])}
  assert describe(names["Net"](), (32, 32, 3)).outputs == 10
  assert [phase.weight_bits for phase in names["schedule"]][-1] == 4


def test_the_readme_is_short():
  assert len(README.splitlines()) <= 120
  counts = [len(sentence.split()) for sentence in sentences(README)]
  assert sum(counts) / len(counts) <= 20


def anchors(path):
  """What a link may name after `#`, as GitHub makes it of a heading."""
  headings = re.findall(r"^#+ (.*)", path.read_text(), flags=re.M)
  return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", LINKED, ids=name)
def test_links_lead_somewhere(path):
  for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
    if "://" in link:
      continue
    file, _, anchor = link.partition("#")
    target = path.parent / file if file else path
    assert target.exists(), link
    assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", [*LINKED, *CONFIGS, ROOT / "requirements.txt"], ids=name)
def test_what_is_named_exists(path):
  text = docstring(path) if path.suffix == ".py" else path.read_text()
  files = re.findall(
    r"\b(?:benchmarks|configs|examples|profit_jax|tests)/[\w/.]*\.(?:py|md)\b", text
  )
  modules = re.findall(r"python -m (profit_jax[\w.]*)", text)
  files += [
    f"{module.replace('.', '/')}{'.py' if '.' in module else '/__main__.py'}" for module in modules
  ]
  assert [file for file in files if not (ROOT / file).exists()] == []
  targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
  named = re.findall(r"(?:^ {4}|`)make (?:PYTHON=\S+ )?([a-z][\w-]*)", text, flags=re.M)
  assert [target for target in named if target not in targets] == []
