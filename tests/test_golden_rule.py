"""The rule and its comparison, on a model small enough to write by hand."""

import json

import golden_rule
import numpy as np
import pytest

HEAD = [1.1020455360412598, -0.9441056251525879, -1.0812687873840332, -0.9419594407081604]
NORM = [0.9215701222419739, 1.0282009840011597]
VARIANCE = [0.6938385963439941, 0.5847850441932678]


def record(path, out, **more):
  manifest = {"source": "by hand", "state": [["W.weight", [2, 3]], ["W.bias", [2]]], "inputs": {"x": [4, 3]}}
  np.savez(path, manifest=json.dumps(manifest), **{"in.scale": np.float32(2)}, **{"out.out": out}, **more)


def apply(variables, inputs):
  return inputs["scale"] * (inputs["x"] @ variables["W.weight"].T + variables["W.bias"])


@pytest.fixture
def expected():
  x = golden_rule.inputs({"inputs": {"x": [4, 3]}}, {})["x"]
  return 2 * (x @ golden_rule.tensor("W.weight", (2, 3)).T + golden_rule.tensor("W.bias", (2,)))


def test_values_are_those_of_the_recording_side():
  # Numbers written down when the rule was fixed; files recorded under it are void if they change.
  np.testing.assert_allclose(golden_rule.tensor("head.weight", (2, 2)).ravel(), HEAD, rtol=1e-6)
  np.testing.assert_allclose(golden_rule.tensor("norm.weight", (2,)), NORM, rtol=1e-6)
  np.testing.assert_allclose(golden_rule.tensor("bn.running_var", (2,)), VARIANCE, rtol=1e-6)
  assert golden_rule.tensor("bn.num_batches_tracked", ()).dtype == np.int64


def test_check_returns_the_difference(tmp_path, expected):
  record(tmp_path / "toy.npz", expected + np.float32(1e-3))
  path = str(tmp_path / "toy.npz")
  assert golden_rule.check(path, dict, apply, atol=2e-3) == pytest.approx(1e-3, rel=0.01)
  with pytest.raises(AssertionError):
    golden_rule.check(path, dict, apply, atol=5e-4)


@pytest.mark.parametrize(
  "wrong", [lambda v, i: apply(v, i)[:3], lambda v, i: (apply(v, i), 0.0), lambda v, i: apply(v, i) * np.nan]
)
def test_check_fails_on_shape_names_and_nan(tmp_path, expected, wrong):
  record(tmp_path / "toy.npz", expected)
  with pytest.raises(AssertionError):
    golden_rule.check(str(tmp_path / "toy.npz"), dict, wrong, atol=1.0)
