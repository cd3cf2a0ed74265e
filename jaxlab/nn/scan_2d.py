"""Selective scans of an image: its pixels are read in several orders, each with its own scan, and the results summed.

    y_p = sum_k scan_k(x in order k) at p,    orders such as rows, columns, diagonals, forwards or backwards

Four orders, rows and columns and the reverse of each, make the SS2D of Liu et al., "VMamba", arXiv:2401.10166, whose
parameters these are. Each order k has a projection to (delta, B, C), step sizes of rank R, decays A and a skip D:

    (d, B, C) = W_k x;   delta = softplus(V_k d + b_k);   h_t = exp(delta A_k) h + delta x_t B;   y_t = C h_t + D_k x_t
"""

import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab import checks
from jaxlab.nn.mamba import log_range, step_bias
from jaxlab.nn.selective_scan import selective_scan

Order = Literal["rows", "columns", "diagonals", "antidiagonals"]
Direction = tuple[Order, bool]  # and whether it is read backwards

SS2D: tuple[Direction, ...] = (("rows", False), ("columns", False), ("rows", True), ("columns", True))
"""Those of VMamba, in the order of its parameters."""

CS2D: tuple[Direction, ...] = (("rows", False), ("columns", True), ("diagonals", False), ("antidiagonals", True))
"""Rows, columns and both diagonals, each once (Cao et al., arXiv:2410.05624), two of them backwards."""


@functools.cache
def order(kind: Order, height: int, width: int) -> Int[np.ndarray, " pixels"]:
  """Host. The pixels y * width + x of an image in the order in which they are read.

  Rows and columns one after the other; diagonals by y + x, antidiagonals by y - x, each from its top.

  Raises:
    ValueError: an unknown kind.
  """
  y, x = np.divmod(np.arange(height * width), width)
  keys = {"rows": (y, x), "columns": (x, y), "diagonals": (y + x, y), "antidiagonals": (y - x, y)}
  if kind not in keys:
    raise ValueError(f"directions: got {kind!r}, expected one of {sorted(keys)}")
  first, second = keys[kind]
  return np.lexsort((second, first))


def read(x: Float[Array, "b h w *c"], kind: Order) -> Float[Array, "b l *c"]:
  """The pixels of images in an order."""
  return _permute(x.reshape(x.shape[0], -1, *x.shape[3:]), kind, *x.shape[1:3], False)


def write(x: Float[Array, "b l *c"], kind: Order, height: int, width: int) -> Float[Array, "b h w *c"]:
  """Images from pixels in an order: the inverse of `read`."""
  return _permute(x, kind, height, width, True).reshape(x.shape[0], height, width, *x.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _permute(x, kind, height, width, back):
  if kind == "rows":
    return x
  places = order(kind, height, width)
  return jnp.take(x, np.argsort(places) if back else places, axis=1, unique_indices=True, mode="clip")


# A permutation's gradient is its inverse: a gather, where JAX would scatter.
_permute.defvjp(
  lambda x, *order: (_permute(x, *order), None),
  lambda kind, height, width, back, _, g: (_permute(g, kind, height, width, not back),),
)


class SelectiveScan2D(nn.Module):
  """The sum above. Neither projects its input nor gates or normalises its output.

  Parameters, for K orders: `x_proj` [K, C, R + 2N], `dt_proj` [K, R, C], `dt_bias` [K, C], `A_log` [K, C, N],
  `D` [K, C].

  Attributes:
    state_size: N, states of a channel.
    dt_rank: R; None for ceil(C / 16).
    directions: the orders.
    dtype: of projections and result; the scan itself runs in float32.
    param_dtype: parameter dtype.
  """

  state_size: int = 16
  dt_rank: int | None = None
  directions: tuple[Direction, ...] = SS2D
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Images to images.

    Raises:
      ValueError: a state size below 1, no or unknown directions.
    """
    checks.count("state_size", self.state_size)
    if not self.directions:
      raise ValueError("directions: got none, expected at least one")
    _, height, width, channels = x.shape
    count, rank = len(self.directions), -(-channels // 16) if self.dt_rank is None else self.dt_rank
    uniform = lambda bound: lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
    x_proj = self.param(
      "x_proj", uniform(channels**-0.5), (count, channels, rank + 2 * self.state_size), self.param_dtype
    )
    dt_proj = self.param("dt_proj", uniform(rank**-0.5), (count, rank, channels), self.param_dtype)
    dt_bias = self.param("dt_bias", step_bias, (count, channels), self.param_dtype)
    A_log = self.param("A_log", log_range, (count, channels, self.state_size), self.param_dtype)
    D = self.param("D", nn.initializers.ones, (count, channels), self.param_dtype)
    x, x_proj, dt_proj = nn.dtypes.promote_dtype(x, x_proj, dt_proj, dtype=self.dtype)
    dtype = x.dtype
    projected = jnp.einsum("bhwc,kcr->bhwkr", x, x_proj)  # before pixels are moved, as it treats each alone
    A = -jnp.exp(A_log.astype("float32"))

    def scan(members: list[int], reverse: bool) -> Array:
      """[B, L, G, C] of directions read the same way, in their orders: one scan with a group for each."""
      u = jnp.stack([read(x, self.directions[k][0]) for k in members], 2)
      d, B, C = jnp.split(
        jnp.stack([read(projected[..., k, :], self.directions[k][0]) for k in members], 2),
        (rank, rank + self.state_size),
        -1,
      )
      k = np.array(members)
      delta = jnp.einsum("blgr,grc->blgc", d, dt_proj[k])
      flat = lambda a: a.reshape(*a.shape[:-2], -1)
      y = selective_scan(
        flat(u).astype("float32"), flat(delta), A[k].reshape(-1, self.state_size), B, C, flat(D[k].astype("float32")),
        delta_bias=flat(dt_bias[k].astype("float32")), delta_softplus=True, reverse=reverse,
      )  # fmt: skip
      return y.reshape(u.shape)

    # Those of one order are summed before they are moved back.
    sums: dict[Order, Array] = {}
    for reverse in (False, True):
      members = [k for k, (_, backwards) in enumerate(self.directions) if backwards == reverse]
      if members:
        y = scan(members, reverse)
        for g, k in enumerate(members):
          kind = self.directions[k][0]
          sums[kind] = sums[kind] + y[:, :, g] if kind in sums else y[:, :, g]
    return functools.reduce(jnp.add, (write(y, kind, height, width) for kind, y in sums.items())).astype(dtype)
