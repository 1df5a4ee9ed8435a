"""What is told where events cannot be written."""

from profit_jax.report import tensorboard


class FullDisk:
  """Stands for a writer of events."""

  def write_scalars(self, step, scalars):
    raise OSError(
      "{{function_node __wrapped__FlushSummaryWriter_device_/job:localhost/device:CPU:0}} "
      "/run/events.out; No space left on device\n  Failed to flush 11 events "
      "[Op:FlushSummaryWriter] name: "
    )

  def close(self):
    pass


def test_a_full_disk_is_told_once_without_names_of_operations():
  told = []
  observer = tensorboard.TensorBoardObserver.__new__(tensorboard.TensorBoardObserver)
  observer._writer, observer._warn = FullDisk(), told.append
  for step in range(2):
    observer._write(step, {"train/step_loss": 1.0})
  assert told == [
    "TensorBoard's events can no longer be written; training continues without them: "
    "/run/events.out; No space left on device Failed to flush 11 events."
  ]
