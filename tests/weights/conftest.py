"""Lists of differences, which messages name, go into the test's directory."""

import tempfile

import pytest


@pytest.fixture(autouse=True)
def _lists(tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
