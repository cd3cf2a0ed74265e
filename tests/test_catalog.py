"""The catalog, the README's table, and the cost of importing the package."""

import pathlib
import re
import subprocess
import sys

import pytest

import jaxlab
from jaxlab import __main__ as command
from jaxlab import catalog

ROOT = pathlib.Path(__file__).parent.parent


def test_63_systems_each_once():
  assert len(catalog.SYSTEMS) == 63
  assert len({s.slug for s in catalog.SYSTEMS}) == 63
  assert len({s.arxiv for s in catalog.SYSTEMS}) == 63
  assert all(re.fullmatch(r"\d{4}\.\d{5}", s.arxiv) for s in catalog.SYSTEMS)
  assert {s.status for s in catalog.SYSTEMS} <= {"done", "planned"}


def test_rooms_exist():
  for system in catalog.SYSTEMS:
    assert (ROOT / "jaxlab" / system.room.replace(".", "/")).is_dir(), system


def test_a_planned_system_has_no_module_yet():
  for system in catalog.SYSTEMS:
    path = ROOT / (system.module.replace(".", "/") + ".py")
    package = path.with_suffix("")
    assert (path.is_file() or package.is_dir()) == (system.status == "done"), system


def test_get():
  assert catalog.get("smt").module == "jaxlab.models.smt"
  with pytest.raises(ValueError, match="^slug: got 'sm'"):
    catalog.get("sm")


def test_readme_shows_the_catalog():
  text = (ROOT / "README.md").read_text()
  assert command.updated(text) == text, "run python -m jaxlab README.md"
  with pytest.raises(ValueError, match="^text: got no markers"):
    command.updated("no table here")


def test_command_prints_every_system():
  out = subprocess.run([sys.executable, "-m", "jaxlab"], capture_output=True, text=True, check=True).stdout
  assert all(s.module in out and s.paper in out for s in catalog.SYSTEMS)


def test_import_is_lazy():
  code = (
    "import sys, time, jax; before = set(sys.modules); start = time.perf_counter(); import jaxlab;"
    "print(time.perf_counter() - start, *(set(sys.modules) - before))"
  )
  seconds, *modules = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  ).stdout.split()
  assert float(seconds) < 1
  assert modules == ["jaxlab"]
  assert jaxlab.catalog is catalog
  with pytest.raises(AttributeError, match="nothing"):
    jaxlab.nothing  # noqa: B018
