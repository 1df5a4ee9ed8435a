"""What a run starts from: the first weights of student and teacher, and their accuracy before
training.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from profit_jax.config import Settings
from profit_jax.data import Source
from profit_jax.models import build, student_spec
from profit_jax.nn.spec import ModelSpec, describe
from profit_jax.train import published
from profit_jax.train.evaluate import evaluate
from profit_jax.train.packing import pack_variables
from profit_jax.train.programs import Programs
from profit_jax.train.progress import Best, Progress, Start
from profit_jax.train.tracer import Who
from profit_jax.typing import Variables
from profit_jax.weights.load import Loaded, head_of, load_variables
from profit_jax.weights.variants import differing_settings


class Student(NamedTuple):
  """The net that is trained.

  Attributes:
    spec: its model.
    make: gives its first variables; called in a fresh run only.
    loaded: what its file gave; None from random weights, and in a run that resumes, which does not
      need the file.
    file_spec: the model with the padding of the file's own code, where that is another than the
      run's; else None.
  """

  spec: ModelSpec
  make: Callable[[], Variables]
  loaded: Loaded | None
  file_spec: ModelSpec | None


class Teacher(NamedTuple):
  """The net that teaches.

  Attributes:
    spec: its model; None without one.
    variables: its weights; None without one, or where a checkpoint has them, or will have (a
      student with a random classifier is its own teacher once the full-precision phase is over).
    loaded: what the file of another model gave; else None.
    is_student: whether it is the student before quantization, which every checkpoint keeps.
  """

  spec: ModelSpec | None
  variables: Variables | None
  loaded: Loaded | None
  is_student: bool = False


def load_student(settings: Settings, num_classes: int, progress: Progress | None = None) -> Student:
  """Builds the student and, in a fresh run, reads (and checks) its file, where it has one.

  Args:
    settings: validated.
    num_classes: of the data.
    progress: of a run that resumes; None in a fresh one.

  Raises:
    ConfigError: a file that does not hold this model's weights.
  """
  spec = student_spec(settings, num_classes)

  def random() -> Variables:
    return spec.init(jax.random.key(settings.seed))

  def with_padding(pad_value: float | None) -> ModelSpec | None:
    if pad_value in (None, settings.model.pad_value):
      return None
    other = dataclasses.replace(settings.model, pad_value=pad_value)
    return describe(build(other, num_classes), spec.input_shape, spec.bits)

  if progress is not None:
    return Student(
      spec, random, None, with_padding(progress.start and progress.start.file_pad_value)
    )
  if settings.from_scratch:
    return Student(spec, random, None, None)
  head = None
  if settings.init.reset_head:
    # Of a whole initialization, XLA compiles what is asked for: the head.
    head = jax.jit(lambda key: head_of(settings.model.name, spec.init(key)))(
      jax.random.key(settings.seed)
    )
  loaded = load_variables(
    settings.init.weights,
    settings.model.name,
    spec.shapes,
    new_head=head,
    entry=settings.init.entry,
    variant=settings.init.variant,
    settings=settings.model,
  )
  return Student(
    spec, lambda: loaded.variables, loaded, with_padding(loaded.settings.get("pad_value"))
  )


def load_teacher(
  settings: Settings, student: Student, num_classes: int, progress: Progress | None = None
) -> Teacher:
  """Builds the teacher and reads its weights, where it has a file; arguments as `load_student`'s.

  Raises:
    ConfigError: a file that does not hold that model's weights.
  """
  teacher = settings.teacher
  if teacher.model == "none":
    return Teacher(None, None, None)
  if teacher.model == "self":
    # Its dropout would only add noise to what it teaches. The student may still have to adapt to
    # negative padding: what the file's own code computes teaches better.
    seen = student.file_spec or student.spec
    padding = getattr(seen.model, "pad_value", settings.model.pad_value)
    own = dataclasses.replace(settings.model, dropout=0.0, pad_value=padding)
    later = settings.new_classifier or progress is not None
    spec = describe(build(own, num_classes), student.spec.input_shape, student.spec.bits)
    return Teacher(spec, None if later else student.make(), None, is_student=True)
  spec = describe(build(teacher.as_model(), num_classes), student.spec.input_shape)
  loaded = load_variables(
    teacher.weights,
    teacher.model,
    spec.shapes,
    role="teacher",
    entry=teacher.entry,
    variant=teacher.variant,
    settings=teacher.as_model(),
  )
  return Teacher(spec, loaded.variables, loaded)


def weight_warnings(settings: Settings, student: Student, teacher: Teacher) -> list[str]:
  """What the user should look at before training: settings that the files' own code does not have,
  and more.
  """
  found = []
  for section, loaded, model in (
    ("model", student.loaded, settings.model),
    ("teacher", teacher.loaded, settings.teacher.as_model()),
  ):
    if loaded is None:
      continue
    found += loaded.notes
    if loaded.published is not None:
      found += published.differences(settings, loaded.published, section)
    of = f"{loaded.variant}, " if loaded.variant else ""
    for name, (theirs, ours) in differing_settings(model.name, loaded.settings, model).items():
      # The student's padding is a choice, to which the full-precision phase adapts it.
      if (section, name) != ("model", "pad_value"):
        found.append(
          f"config.{section}.{name} = {ours!r}, but these weights ({of}{loaded.source} names) are "
          f"for {theirs!r}."
        )
  if student.file_spec is not None and (
    settings.teacher.model == "none" or not settings.plan.full_precision_epochs
  ):
    found.append(
      f"config.model.pad_value = {settings.model.pad_value}, but these weights are for "
      f"{student.file_spec.model.pad_value}, and "
      "this plan has no full-precision phase that adapts them: that needs a teacher and "
      "plan.full_precision_epochs."
    )
  return found


def evaluate_start(
  programs: Programs,
  source: Source,
  settings: Settings,
  student: Student,
  teacher: Teacher,
  variables: Any,
) -> Start:
  """Evaluates what came from files, in full precision.

  Args:
    programs: that know the models.
    source: the data.
    settings: validated.
    student: its file counts; random weights are not evaluated.
    teacher: likewise; `self` is the student.
    variables: the student's, packed, on the devices.
  """

  def of(who, values):
    return evaluate(programs, source, settings, values, who=who)[0]

  start = Start()
  if student.loaded is not None:
    scores = of("student", variables)
    start = dataclasses.replace(
      start,
      source=student.loaded.source,
      sha256=student.loaded.sha256,
      variant=student.loaded.variant,
      variant_by=student.loaded.told_by,
      quantized=student.loaded.quantizers,
      file_pad_value=None if student.file_spec is None else student.file_spec.model.pad_value,
      new_head=settings.init.reset_head or student.loaded.incomplete,
      top1=scores["top1"],
      top5=scores["top5"],
      examples=int(scores["examples"]),
      file_top1=None if student.file_spec is None else of("file", variables)["top1"],
    )
  if teacher.loaded is not None:
    scores = of(
      "teacher", programs.placement.replicate(pack_variables(teacher.variables, teacher.spec))
    )
    start = dataclasses.replace(
      start,
      teacher_top1=scores["top1"],
      teacher_sha256=teacher.loaded.sha256,
      teacher_variant=teacher.loaded.variant,
      teacher_variant_by=teacher.loaded.told_by,
      examples=int(scores["examples"]),
    )
  return start


def baseline(start: Start) -> Best | None:
  """The full precision that a run is measured against; a new classifier is none, nor a net that was
  trained quantized.
  """
  if start.top1 is None or start.new_head or start.quantized:
    return None
  top1 = max(start.top1, start.file_top1 or 0.0)
  return Best(epoch=0, phase=0, top1=top1, top5=start.top5, weights="raw", examples=start.examples)


def evaluated(student: Student, teacher: Teacher) -> list[Who]:
  """The models that `evaluate_start` evaluates, as `Programs` calls them."""
  chosen: dict[Who, Any] = {
    "student": student.loaded,
    "file": student.file_spec,
    "teacher": teacher.loaded,
  }
  return [who for who, there in chosen.items() if there is not None]
