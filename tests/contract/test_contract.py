"""What every finished system of the catalog must satisfy."""

import importlib.util
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab import catalog, train

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
DEVICES = 8


def load(slug):
  spec = importlib.util.spec_from_file_location(f"contract_{slug}", HERE / "cases" / f"{slug}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.CASE


# xdist keeps a system's tests together, so that its case is made and compiled once.
@pytest.fixture(
  scope="module", params=[pytest.param(s, marks=pytest.mark.xdist_group(s.slug), id=s.slug) for s in catalog.done()]
)
def system(request):
  yield request.param
  jax.clear_caches()  # as in conftest: the many programs of one system would slow the next


@pytest.fixture(scope="module")
def case(system):
  return load(system.slug)


@pytest.fixture(scope="module")
def run(case):
  return jax.jit(case.function)


def close(a, b, atol):
  chex.assert_trees_all_close(jax.tree.map(np.asarray, a), jax.tree.map(np.asarray, b), atol=atol, rtol=1e-4)


def stacked(case, count):
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(case.inputs(seed) for seed in range(count)))


def test_whole(system):
  """Module, test, experiment and benchmark stand where the catalog says."""
  room = system.room.replace(".", "/")
  assert (ROOT / system.experiment).is_file()
  assert (ROOT / f"benchmarks/{system.slug}.py").is_file()
  assert (ROOT / f"tests/{room}/test_{system.slug}.py").is_file()
  assert importlib.import_module(system.module).__doc__.count(system.arxiv) == 1


def test_jit_equals_eager(case, run):
  inputs = case.inputs(0)
  close(run(case.params, inputs), case.function(case.params, inputs), case.tolerance)


def test_outputs_are_finite_and_depend_on_the_input(case, run):
  first, second = run(case.params, case.inputs(0)), run(case.params, case.inputs(1))
  chex.assert_tree_all_finite(first)
  changes = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), first, second)
  assert max(jax.tree.leaves(changes)) > 1e-4


def test_no_retrace(case):
  chex.clear_trace_counter()

  def function(params, inputs):
    return case.function(params, inputs)

  counted = jax.jit(chex.assert_max_traces(function, n=1))
  for seed in range(3):
    counted.lower(case.params, case.inputs(seed))


def test_every_parameter_has_a_gradient(case):
  def loss(params, inputs):
    leaves = jax.tree.leaves(case.function(params, inputs))
    return sum((leaf * jax.random.normal(jax.random.key(i), leaf.shape)).sum() for i, leaf in enumerate(leaves))

  grads = jax.jit(jax.grad(loss))(case.params, case.inputs(0))
  chex.assert_tree_all_finite(grads)
  silent = [
    jax.tree_util.keystr(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
    if not np.asarray(leaf, "float32").any()
  ]
  assert not silent


def test_bfloat16(case, run):
  if case.narrow is None:
    return
  inputs = case.inputs(0)
  narrow = jax.jit(case.narrow)(case.params, inputs)
  for mine, wide in zip(*map(jax.tree.leaves, (narrow, run(case.params, inputs))), strict=True):
    assert mine.dtype == jnp.bfloat16
    wide = np.asarray(wide)
    assert np.abs(np.asarray(mine, "float32") - wide).max() <= case.narrow_tolerance * np.abs(wide).max()


def test_eight_devices_by_pmap_equal_one(case, run):
  assert jax.device_count() == DEVICES
  many = jax.pmap(case.function, in_axes=(None, 0))(case.params, stacked(case, DEVICES))
  for seed in range(DEVICES):
    one = jax.tree.map(lambda a, seed=seed: np.asarray(a)[seed], many)
    close(one, run(case.params, case.inputs(seed)), case.tolerance)


def test_vmap_over_eight_devices_on_a_mesh_equals_a_loop(case, run):
  split = NamedSharding(train.mesh(), PartitionSpec("data"))
  inputs = jax.tree.map(lambda a: jax.device_put(a, split), stacked(case, DEVICES))
  many = jax.jit(jax.vmap(case.function, (None, 0)), out_shardings=split)(case.params, inputs)
  for seed in range(DEVICES):
    one = jax.tree.map(lambda a, seed=seed: np.asarray(a)[seed], many)
    close(one, run(case.params, case.inputs(seed)), case.tolerance)


def test_parameters_survive_a_file(case, tmp_path):
  if not jax.tree.leaves(case.params):
    return
  train.save_variables(tmp_path / "variables", {"params": case.params})
  chex.assert_trees_all_equal(train.load_variables(tmp_path / "variables")["params"], case.params)


def test_padding_is_ignored(case, run):
  if case.pad is None:
    return
  inputs = case.inputs(0)
  close(case.unpad(run(case.params, case.pad(inputs))), run(case.params, inputs), case.tolerance)


def test_relabelling_nodes_relabels_outputs(case, run):
  if case.relabel is None:
    return
  inputs = case.inputs(0)
  order = np.random.default_rng(0).permutation(case.num_nodes)
  mine = run(case.params, case.relabel(inputs, order))
  close(mine, case.reorder(run(case.params, inputs), order), case.tolerance)


def test_bad_input_is_named(case):
  assert len(case.bad) >= 5
  for name, (call, argument) in case.bad.items():
    with pytest.raises(ValueError) as error:
      call()
    assert str(error.value).startswith(f"{argument}: got "), f"{name}: {error.value}"


def test_every_case_belongs_to_a_finished_system():
  cases = {path.stem for path in (HERE / "cases").glob("*.py")}
  assert cases == {system.slug for system in catalog.done()}
