"""What a run starts from: the student's and the teacher's first weights, and what they are worth before training."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from profit_jax.data import Source
from profit_jax.models import build, init_variables, variable_shapes
from profit_jax.settings import Settings
from profit_jax.train.evaluate import evaluate
from profit_jax.train.programs import Programs
from profit_jax.train.progress import Start
from profit_jax.weights.load import HEAD, Loaded, Variables, differing_settings, load_variables


class Student(NamedTuple):
  """The net that is trained.

  Attributes:
    model: its module.
    make: gives its first variables; called in a fresh run only.
    loaded: what its file gave; None from random weights.
    file_model: the module with the padding of the file's own code, where that is another than the run's; else None.
  """

  model: nn.Module
  make: Callable[[], Variables]
  loaded: Loaded | None
  file_model: nn.Module | None


class Teacher(NamedTuple):
  """The net that teaches.

  Attributes:
    model: its module; None without one.
    variables: its weights; None without one, or while it does not exist yet (the student from random weights is its own
      teacher once the full-precision phase is over).
    loaded: what the file of another model gave; else None.
  """

  model: nn.Module | None
  variables: Variables | None
  loaded: Loaded | None


def load_student(settings: Settings, num_classes: int) -> Student:
  """Builds the student and reads (and checks) its file, where it has one.

  Raises:
    ConfigError: a file that does not hold this model's weights.
  """
  size = settings.data.image_size
  model = build(settings.model, num_classes)

  def random() -> Variables:
    return init_variables(model, jax.random.key(settings.seed), size)

  if settings.from_scratch:
    return Student(model, random, None, None)
  head = None
  if settings.init.reset_head:
    # Of a whole initialization, XLA compiles what is asked for: the classifier.
    key = jax.random.key(settings.seed)
    head = {"params": {HEAD: jax.jit(lambda key: init_variables(model, key, size)["params"][HEAD])(key)}}
  loaded = load_variables(settings.init.weights, settings.model.name, variable_shapes(model, size), new_head=head)
  pad_value = loaded.settings.get("pad_value", settings.model.pad_value)
  file_model = None if pad_value == settings.model.pad_value else model.clone(pad_value=pad_value)
  return Student(model, lambda: loaded.variables, loaded, file_model)


def load_teacher(settings: Settings, student: Student, num_classes: int) -> Teacher:
  """Builds the teacher and reads its weights, where it has a file.

  Raises:
    ConfigError: a file that does not hold that model's weights.
  """
  teacher = settings.teacher
  if teacher.model == "none":
    return Teacher(None, None, None)
  if teacher.model == "self":
    # Its dropout would only add noise to what it teaches. The student may still have to adapt to negative padding: what the
    # file's own code computes teaches better.
    own = (student.file_model or student.model).clone(dropout=0.0)
    return Teacher(own, None if settings.from_scratch else student.make(), None)
  other = build(teacher.as_model(), num_classes)
  shapes = variable_shapes(other, settings.data.image_size)
  loaded = load_variables(teacher.weights, teacher.model, shapes, role="teacher")
  return Teacher(other, loaded.variables, loaded)


def doubts(settings: Settings, student: Student, teacher: Teacher) -> list[str]:
  """Settings with which the files' own code does not compute, as sentences."""
  found = []
  for section, loaded, model in (
    ("model", student.loaded, settings.model),
    ("teacher", teacher.loaded, settings.teacher.as_model()),
  ):
    if loaded is not None:
      found += [f"config.{section}.{difference}." for difference in differing_settings(loaded, model)]
  return found


def evaluate_start(
  programs: Programs, source: Source, settings: Settings, student: Student, teacher: Teacher, variables: Any
) -> Start:
  """Evaluates what came from files, in full precision.

  Args:
    programs: that know the models.
    source: the data.
    settings: validated.
    student: its file counts; random weights are not evaluated.
    teacher: likewise; `self` is the student.
    variables: the student's, on the devices.
  """

  def of(who, values):
    return evaluate(programs, source, settings, values, who=who)[0]

  start = Start()
  if student.loaded is not None:
    scores = of("student", variables)
    start = dataclasses.replace(
      start,
      source=student.loaded.source,
      new_head=settings.init.reset_head,
      top1=scores["top1"],
      top5=scores["top5"],
      examples=int(scores["examples"]),
      file_top1=None if student.file_model is None else of("file", variables)["top1"],
    )
  if teacher.loaded is not None:
    scores = of("teacher", programs.replicate(teacher.variables))
    start = dataclasses.replace(start, teacher_top1=scores["top1"], examples=int(scores["examples"]))
  return start


def evaluated(student: Student, teacher: Teacher) -> list[str]:
  """The models that `evaluate_start` evaluates, as `Programs` calls them."""
  chosen = {"student": student.loaded, "file": student.file_model, "teacher": teacher.loaded}
  return [who for who, there in chosen.items() if there is not None]
