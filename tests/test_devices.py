"""What is said where JAX has no devices, and where it leaves an accelerator idle."""

import logging

import jax
import pytest

from profit_jax import devices
from profit_jax.config import ConfigError
from profit_jax.export import jax_file


@pytest.mark.parametrize(
  ("error", "reason"),
  [
    (
      RuntimeError(
        "Unable to initialize backend 'tpu': INTERNAL: Failed to open libtpu.so (set "
        "JAX_PLATFORMS='' to automatically choose an available backend)"
      ),
      "backend 'tpu': INTERNAL: Failed to open libtpu.so. Set JAX_PLATFORMS=cpu",
    ),
    (AssertionError(), "there is no such device on this machine. Set JAX_PLATFORMS=cpu"),
  ],
)
def test_a_platform_that_is_not_there_is_refused(monkeypatch, error, reason):
  def fails():
    raise error

  monkeypatch.setattr(jax, "devices", fails)
  with pytest.raises(ConfigError, match="JAX has no devices with JAX_PLATFORMS=cpu: ") as refused:
    devices.require()
  assert reason in str(refused.value)


@pytest.mark.parametrize(
  ("flags", "reason"),
  [
    ("--xla_no_such_flag=1", "Unknown flag in XLA_FLAGS: --xla_no_such_flag=1."),
    ("--xla_cpu_enable_fast_math=maybe", "maybe for flag xla_cpu_enable_fast_math."),
    ("no_such_file", 'Could not open file "no_such_file"'),
  ],
)
def test_flags_that_xla_does_not_know_are_refused(monkeypatch, flags, reason):
  monkeypatch.setenv("XLA_FLAGS", flags)
  with pytest.raises(ConfigError) as refused:
    devices.require()
  assert str(refused.value).startswith(f"XLA_FLAGS='{flags}' is not allowed: ")
  assert reason in str(refused.value)


@pytest.mark.parametrize(
  ("setting", "value", "told"),
  [
    ("jax_disable_jit", True, "JAX_DISABLE_JIT=True is not allowed"),
    ("jax_numpy_rank_promotion", "raise", "JAX_NUMPY_RANK_PROMOTION=raise is not allowed"),
    ("jax_transfer_guard", "disallow", "JAX_TRANSFER_GUARD=disallow is not allowed"),
  ],
)
def test_settings_of_jax_that_stop_every_program_are_refused(monkeypatch, setting, value, told):
  monkeypatch.setattr(devices.jax, "config", type("Config", (), {"jax_platforms": ""}))
  for name in devices._REFUSED:
    monkeypatch.setattr(devices.jax.config, name, None, raising=False)
  monkeypatch.setattr(devices.jax.config, setting, value)
  with pytest.raises(ConfigError, match=told):
    devices.require()


def test_a_build_that_finds_no_accelerator_says_so_in_one_line(monkeypatch, caplog):
  def finds_none():
    try:
      raise RuntimeError("Unable to load cuDNN. Is it installed?")
    except RuntimeError:
      logging.getLogger("jax._src.xla_bridge").exception("Jax plugin configuration error")

  monkeypatch.setattr(jax, "devices", finds_none)
  devices.require()
  (record,) = caplog.records
  assert record.getMessage() == (
    "JAX cannot use an accelerator: Unable to load cuDNN. Is it installed?"
  )
  assert not record.exc_info


def test_an_exported_jax_file_needs_devices(monkeypatch, tmp_path):
  def fails():
    raise RuntimeError("Unable to initialize backend 'tpu'")

  monkeypatch.setattr(jax, "devices", fails)
  with pytest.raises(ConfigError, match="JAX has no devices"):
    jax_file.open_file(tmp_path / "net.jax")


def machine(root, *files):
  for name, text in files:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)
  return root


VFIO = ("sys/bus/pci/drivers/vfio-pci/0000:00:04.0/vendor", "0x1ae0\n")


@pytest.mark.parametrize(
  ("files", "told"),
  [
    (
      [("dev/nvidia0", "")],
      ["an NVIDIA GPU (", "dev/nvidia0)", '"jax[cuda13]=='],
    ),
    ([("proc/driver/nvidia/gpus/0000:01:00.0/information", "")], ["an NVIDIA GPU ("]),
    ([("dev/accel0", "")], ["a TPU (", '"jax[tpu]==']),
    ([("dev/vfio/0", ""), VFIO], ["a TPU ("]),
  ],
)
def test_an_accelerator_that_jax_does_not_see_is_named(tmp_path, files, told):
  warning = devices.warning("", machine(tmp_path, *files))
  assert all(part in warning for part in (*told, "JAX_PLATFORMS=cpu"))
  assert devices.warning("cpu", tmp_path) == ""


@pytest.mark.parametrize(
  "files",
  [
    [("dev/nvidiactl", ""), ("dev/null", "")],
    # A host that passes another vendor's device on to its guests.
    [("dev/vfio/0", ""), (VFIO[0], "0x10de\n")],
  ],
)
def test_a_machine_without_an_accelerator_is_not_warned_of(tmp_path, files):
  assert devices.warning("", machine(tmp_path, *files)) == ""
  assert "finds no cuda device" in devices.warning("cuda,cpu", tmp_path)


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpus_may_be_hidden(tmp_path, monkeypatch, hidden):
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
  assert devices.warning("", machine(tmp_path, ("dev/nvidia0", ""))) == ""
