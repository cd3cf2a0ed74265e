"""A small training run on scikit-learn's digits, shared by the tests here; `main` is the body of a child process."""

import os
from pathlib import Path

import flax.linen as nn
import grain
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

from jaxlab import train


class Net(nn.Module):
  """A little of everything that a restart must bring back: BatchNorm statistics, dropout, weights."""

  width: int = 24
  norm: bool = True
  dropout: float = 0.2
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x, *, train=False):
    # No bias before BatchNorm: its gradient is rounding noise, which Adam would blow up to full steps.
    x = nn.Dense(self.width, use_bias=not self.norm)(x.reshape(len(x), -1))
    if self.norm:
      x = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name, momentum=0.9)(x)
    x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
    return nn.Dense(10)(x)


def digits():
  images, labels = load_digits(return_X_y=True)
  return {"image": (images / 16).astype(np.float32), "label": labels.astype(np.int32)}


def learner(net=None, **options):
  options = {"ema_decay": 0.9, **options}
  return train.supervised(net or Net(), train.cross_entropy(label_smoothing=0.1), optax.adam(3e-3), **options)


def pipeline(batch_size=32):
  data = digits()
  examples = grain.MapDataset.range(len(data["label"])).seed(3).shuffle()
  # A random augmentation, so that the pipeline's own randomness must be restored too.
  examples = examples.random_map(
    lambda i, rng: {"image": data["image"][i] + rng.normal(0, 0.02, 64).astype(np.float32), "label": data["label"][i]}
  )
  return examples.repeat().batch(batch_size)


def flat(state):
  """Leaves by path as NumPy arrays, to compare bit by bit."""
  paths = jax.tree_util.tree_flatten_with_path(state)[0]
  plain = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  return {jax.tree_util.keystr(path): np.asarray(plain(leaf)) for path, leaf in paths}


def main(workdir, steps, save_every, cache):
  """Trains in `workdir` and leaves every leaf of the final state in `final.npz`."""
  jax.config.update("jax_compilation_cache_dir", str(cache))  # the 20 restarts would spend their time compiling
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  state = train.fit(
    learner(),
    pipeline(),
    steps=steps,
    workdir=workdir,
    key=jax.random.key(0),
    evaluate_on=digits(),
    evaluate_every=100,
    log_every=1,
    save_every=save_every,
    progress=False,
  )
  temporary = Path(workdir) / "final.tmp.npz"
  np.savez(temporary, **flat(state))
  os.replace(temporary, Path(workdir) / "final.npz")
