"""The encoder of patches, the two networks on it, and their training loss."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab import checks, train
from jaxlab.models.parot.geometry import (
  direction_loss,
  frame,
  normalize,
  orthogonality_loss,
  relative_pose,
  rotate,
  unrotate,
)
from jaxlab.nn.batch_norm import BatchNormAct
from jaxlab.nn.dropout import dropout
from jaxlab.nn.module import precision
from jaxlab.nn.points import check_points, farthest_points, gather_points, nearest_points, random_rotations


class Siamese(NamedTuple):
  """Losses between the two rotations of every patch, each [2]: local and global patches. Float32.

  Attributes:
    direction: `direction_loss`.
    orthogonality: `orthogonality_loss` of the first rotation.
    invariance: mean squared difference of the features.
  """

  direction: Float[Array, "2"]
  orthogonality: Float[Array, "2"]
  invariance: Float[Array, "2"]


class Encoding(NamedTuple):
  """What is known at S centres.

  Attributes:
    centres: their places.
    local: l, of the local patch and its neighbours.
    view: g, of the cloud as seen from the centre.
    pose: of the local in the global frame.
    frames: of the local and the global patch.
    siamese: losses, while training.
  """

  centres: Float[Array, "b s 3"]
  local: Float[Array, "b s c"]
  view: Float[Array, "b s c"]
  pose: Float[Array, "b s 16"]
  frames: tuple[Float[Array, "b s 3 3"], Float[Array, "b s 3 3"]]
  siamese: Siamese | None


class MLP(nn.Module):
  """Layers without bias, each with batch normalisation and (leaky) ReLU.

  Attributes:
    widths: of the layers.
    slope: of the activation below zero.
    pool: take the maximum over the axis before the last, after the last layer.
    dtype: compute dtype.
    param_dtype: parameter dtype.
    axis_name: pmap axis over which batch statistics are averaged.
  """

  widths: Sequence[int]
  slope: float = 0.0
  pool: bool = False
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "... c"], *, train: bool, normalize_first: bool = False) -> Float[Array, "... d"]:
    """Args: x, rows; `normalize_first` if it is to be normalised before the first layer. Returns rows, or maxima."""
    options = precision(self)
    norm = functools.partial(BatchNormAct, self.slope, axis_name=self.axis_name, **options)
    shape = x.shape
    x = x.reshape(-1, shape[-1])  # gradients of kernels over several axes of rows cost XLA a transposition on CPU
    if normalize_first:
      x = norm(name="norm0")(x, train=train)
    for i, width in enumerate(self.widths, start=1):
      x = nn.Dense(width, use_bias=False, name=f"dense{i}", **options)(x)
      pool = self.pool and i == len(self.widths)
      if pool:
        x = x.reshape(*shape[:-1], width)
      x = norm(pool=pool, name=f"norm{i}")(x, train=train)
    return x if self.pool else x.reshape(*shape[:-1], x.shape[-1])


class Disentangle(nn.Module):
  """Patch to invariant feature f and equivariant directions: PointNet u = max_k MLP(p_k), then a head for each."""

  width: int
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(
    self, patches: Float[Array, "b s k 3"], *, train: bool
  ) -> tuple[Float[Array, "b s c"], Float[Array, "b s 2 3"]]:
    """Args: patches, relative to their centres. Returns features in `dtype`, and unit vectors in float32."""
    c, options = self.width, precision(self)
    mlp = functools.partial(MLP, axis_name=self.axis_name, **options)
    u = mlp(widths=(c // 2, c, c), pool=True, name="points")(patches.astype(self.dtype), train=train)
    feature = mlp(widths=(c, c), name="feature")(u, train=train)
    directions = []
    for name in ("direction1", "direction2"):
      d = mlp(widths=(c // 2, c // 4), name=name)(u, train=train)
      d = nn.Dense(3, use_bias=False, name=f"{name}_out", **options)(d)
      directions.append(normalize(d.astype(jnp.float32))[0])
    return feature, jnp.stack(directions, -2)


class JointDense(nn.Module):
  """Dense layer without bias of the concatenation of arrays, before it is made: [x, y] K = x K_x + y K_y.

  What many rows share (a centre's feature among its neighbours, the cloud's among its centres) is then multiplied once
  and gathered afterwards.
  """

  width: int
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"

  @nn.compact
  def __call__(self, *parts: Float[Array, "..."]) -> list[Float[Array, "..."]]:
    """Args: arrays [..., C_i]. Returns their products with their rows of the kernel [sum C_i, width], to be added."""
    ends = np.cumsum([x.shape[-1] for x in parts])
    init, shape = nn.initializers.lecun_normal(), (int(ends[-1]), self.width)
    kernel = self.param("kernel", init, shape, self.param_dtype).astype(self.dtype)
    blocks = jnp.split(kernel, ends[:-1])
    return [
      (x.reshape(-1, x.shape[-1]) @ block).reshape(*x.shape[:-1], self.width)
      for x, block in zip(parts, blocks, strict=True)
    ]


class Encoder(nn.Module):
  """Patches to what is known at their centres. Attributes as in `PaRot`."""

  num_patches: int
  patch_size: int
  global_size: int
  neighbors: int
  width: int
  restore_pose: bool = True
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(self, points: Float[Array, "b n 3"], *, train: bool) -> Encoding:
    """Args: points, float32; while training needs a "dropout" key. Returns an `Encoding`."""
    c, options = self.width, precision(self) | {"axis_name": self.axis_name}
    local, world = self._sample(points, train)
    centres = gather_points(points, local)
    patches = gather_points(points, nearest_points(centres, points, self.patch_size)) - centres[:, :, None]
    views = gather_points(points, world)[:, None] - centres[:, :, None]
    feature, directions, local_losses = self._disentangle(Disentangle(c, name="local", **options), patches, train)
    view, view_directions, view_losses = self._disentangle(Disentangle(c, name="world", **options), views, train)

    index = nearest_points(centres, centres, self.neighbors)
    frames = frame(directions)
    offset = gather_points(centres, index) - centres[:, :, None]
    near = gather_points(frames.reshape(*frames.shape[:2], 9), index).reshape(*index.shape, 3, 3)
    pose = self._pose(near, frames[:, :, None], offset).astype(self.dtype)
    h = MLP((c // 4,), name="neighbor_pose", **options)(pose, train=train)
    # The first layer of [f_j, f_j - f_i, h].
    itself, difference, posed = JointDense(c, name="neighbor_edge", **precision(self))(feature, feature, h)
    rows = gather_points(itself + difference, index) - difference[:, :, None] + posed
    aggregate = MLP((c, c), pool=True, name="neighbor_mlp", **options)
    gathered = aggregate(rows, train=train, normalize_first=True)

    pair = frame(directions, differentiable=False), frame(view_directions, differentiable=False)
    siamese = None if local_losses is None else Siamese(*map(jnp.stack, zip(local_losses, view_losses, strict=True)))
    return Encoding(centres, gathered, view, self._pose(*pair, centres), pair, siamese)

  def _pose(self, first: Array, second: Array, offset: Array) -> Array:
    pose = relative_pose(first, second, offset)
    return pose if self.restore_pose else jnp.zeros_like(pose)

  def _sample(self, points: Array, train: bool) -> tuple[Array, Array]:
    """Indices of the centres and of the points of the global patch."""
    if train:
      starts = jax.random.randint(self.make_rng("dropout"), (2, len(points)), 0, points.shape[1])
      local = farthest_points(points, self.num_patches, starts[0])
      return local, local if self._same() else farthest_points(points, self.global_size, starts[1])
    both = farthest_points(points, max(self.num_patches, self.global_size))  # one start: the smaller is a prefix
    return both[:, : self.num_patches], both[:, : self.global_size]

  def _same(self) -> bool:
    return self.global_size == self.num_patches

  def _disentangle(self, net: Disentangle, patches: Array, train: bool) -> tuple[Array, Array, Any]:
    """Features, directions as of the patch that was not rotated, and the siamese losses of this kind of patch."""
    if not train:
      return *net(patches, train=False), None
    r1, r2 = random_rotations(self.make_rng("dropout"), (2, *patches.shape[:2]))
    # One after the other: each has batch statistics of its own.
    feature1, d1 = net(rotate(patches, r1), train=True)
    feature2, d2 = net(rotate(patches, r2), train=True)
    invariance = jnp.mean((feature1.astype(jnp.float32) - feature2.astype(jnp.float32)) ** 2)
    return feature1, unrotate(d1, r1), (direction_loss(d1, d2, r1, r2), orthogonality_loss(d1), invariance)


def _check(module: Any, points: Array) -> None:
  check_points(points)
  for name in ("num_patches", "patch_size", "global_size", "neighbors"):
    high = module.num_patches if name == "neighbors" else points.shape[1]
    checks.count(name, getattr(module, name), high=high)
  checks.count("width", module.width, low=4)
  if module.width % 4:
    raise ValueError(f"width: got {module.width}, expected a multiple of 4")
  checks.rate("dropout", module.dropout)


def _encode(module: Any, points: Array, train: bool) -> tuple[Encoding, Float[Array, "b s e"], Float[Array, "b d"]]:
  """The encoding, its pose embedded, and the vector e of the whole cloud, in submodules of `module`."""
  c, options = module.width, precision(module) | {"axis_name": module.axis_name}
  names = ("num_patches", "patch_size", "global_size", "neighbors", "width", "restore_pose")
  sizes = {name: getattr(module, name) for name in names}
  code = Encoder(**sizes, name="encoder", **options)(points.astype(jnp.float32), train=train)
  pose = code.pose.astype(module.dtype)
  h = MLP((c // 4,), slope=0.2, name="scale_pose", **options)(pose, train=train)
  rows = jnp.concatenate([code.local, code.view, h], -1)
  return code, pose, MLP((2 * c, 4 * c, 8 * c), 0.2, True, name="scale_mlp", **options)(rows, train=train)


class PaRot(nn.Module):
  """Classifier of point clouds.

  Attributes:
    num_classes: outputs.
    num_patches: S, centres.
    patch_size: points of a local patch.
    global_size: points of the cloud that a centre sees it by.
    neighbors: centres that a centre hears, itself included.
    width: channels of a feature, a multiple of 4; other layers are in proportion.
    restore_pose: False hides relative poses between patches, to see what they are worth.
    dropout: rate in the head; training needs a "dropout" key in any case, for rotations.
    dtype: compute dtype of layers. Geometry, losses and statistics are float32.
    param_dtype: parameter dtype.
    axis_name: pmap axis over which batch statistics are averaged.
  """

  num_classes: int = 40
  num_patches: int = 256
  patch_size: int = 64
  global_size: int = 32
  neighbors: int = 32
  width: int = 128
  restore_pose: bool = True
  dropout: float = 0.5
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(
    self, points: Float[Array, "b n 3"], *, train: bool = False
  ) -> Float[Array, "b k"] | tuple[Float[Array, "b k"], Siamese]:
    """Classifies clouds.

    Args:
      points: centred and scaled to about the unit ball.
      train: rotate patches at random, twice, use batch statistics (mutable collection "batch_stats") and dropout.

    Returns:
      Logits [B, num_classes] in `dtype`; while training with the siamese losses, for `objective`.

    Raises:
      ValueError: points of wrong shape or dtype, or too few; attributes out of range.
    """
    _check(self, points)
    checks.count("num_classes", self.num_classes)
    c, options = self.width, precision(self) | {"axis_name": self.axis_name}
    code, _, x = _encode(self, points, train)
    for i, width in enumerate((4 * c, 2 * c), start=1):
      x = MLP((width,), 0.2, name=f"head{i}", **options)(x, train=train)
      if train and self.dropout:
        x = dropout(self.make_rng("dropout"), x, self.dropout)
    logits = nn.Dense(self.num_classes, name="logits", **precision(self))(x)
    return logits if code.siamese is None else (logits, code.siamese)


class PaRotParts(nn.Module):
  """Labels every point of a cloud whose category is known.

  Attributes: as in `PaRot`, and
    num_parts: outputs, parts of all categories.
    num_categories: of clouds.
    interpolate: centres that a point hears.
    centre_quirk: whether points relate to the centres' directions q / ||q||, as in the official code, whose variable is
      overwritten there, instead of to the centres.
  """

  num_parts: int = 50
  num_categories: int = 16
  num_patches: int = 256
  patch_size: int = 64
  global_size: int = 64
  neighbors: int = 16
  interpolate: int = 11
  centre_quirk: bool = False
  width: int = 128
  restore_pose: bool = True
  dropout: float = 0.5
  dtype: jax.typing.DTypeLike = "float32"
  param_dtype: jax.typing.DTypeLike = "float32"
  axis_name: str | None = None

  @nn.compact
  def __call__(
    self, inputs: tuple[Float[Array, "b n 3"], Int[Array, " b"]], *, train: bool = False
  ) -> Float[Array, "b n k"] | tuple[Float[Array, "b n k"], Siamese]:
    """Labels points.

    Args:
      inputs: points, as for `PaRot`, and the category of each cloud.
      train: as for `PaRot`.

    Returns:
      Logits [B, N, num_parts] in `dtype`; while training with the siamese losses, for `objective`.

    Raises:
      ValueError: points or categories of wrong shape or dtype, or too few; attributes out of range.
    """
    points, category = inputs
    _check(self, points)
    for name in ("num_parts", "num_categories"):
      checks.count(name, getattr(self, name))
    checks.count("interpolate", self.interpolate, high=self.num_patches)
    if category.shape != points.shape[:1] or not jnp.issubdtype(category.dtype, jnp.integer):
      raise ValueError(f"category: got {category.dtype}{list(category.shape)}, expected integers {points.shape[:1]}")
    c, options = self.width, precision(self) | {"axis_name": self.axis_name}
    code, pose, e = _encode(self, points, train)
    points = points.astype(jnp.float32)

    # Down to the centres: [e, l, g, h], of which e is the same for all.
    h = MLP((c // 4,), slope=0.2, name="centre_pose", **options)(pose, train=train)
    joint = functools.partial(JointDense, 2 * c, **precision(self))
    whole, local, view, posed = joint(name="centre_joint")(e[:, None], code.local, code.view, h)
    x = whole + local + view + posed
    x = MLP((2 * c,), name="centre_mlp", **options)(x, train=train, normalize_first=True)

    # From centres to points.
    centres = normalize(code.centres)[0] if self.centre_quirk else code.centres
    index = nearest_points(points, centres, self.interpolate)
    unit, length = normalize(points[:, :, None] - gather_points(centres, index))
    frames = (gather_points(f.reshape(*f.shape[:2], 9), index).reshape(*index.shape, 3, 3) for f in code.frames)
    seen = [(f * unit[..., None, :]).sum(-1) for f in frames]
    pose = jnp.concatenate([length, *seen], -1).astype(self.dtype)
    h = MLP((c // 4,), slope=0.2, name="point_pose", **options)(pose, train=train)
    kind = jax.nn.one_hot(category, self.num_categories, dtype=self.dtype)[:, None, None]
    x, posed, kind = joint(name="point_joint")(x, h, kind)
    x = gather_points(x, index) + posed + kind
    x = MLP((c, c), name="point_mlp", **options)(x, train=train, normalize_first=True).sum(2)
    x = MLP((c, c), name="head", **options)(x, train=train)
    if train and self.dropout:
      x = dropout(self.make_rng("dropout"), x, self.dropout)
    logits = nn.Dense(self.num_parts, name="logits", **precision(self))(x)
    return logits if code.siamese is None else (logits, code.siamese)


def objective(
  *,
  label: str = "label",
  label_smoothing: float = 0.2,
  direction: Sequence[float] = (1.0, 1.0),
  orthogonality: Sequence[float] = (0.2, 0.1),
  invariance: Sequence[float] = (0.0, 0.0),
) -> train.Loss:
  """The training loss of both networks, for `train.supervised`.

      L = CE + sum over {local, global} of w_dir L_dir + w_orth L_orth + w_inv L_inv

  Args:
    label: of the batch's entry with the targets, class numbers [B] or parts [B, N].
    label_smoothing: e; the target is 1 - e, the other C - 1 classes share e. Less than (C - 1) / C.
    direction: w_dir, local and global.
    orthogonality: w_orth.
    invariance: w_inv; zero in the released code, though the paper lists the term.

  Returns:
    Of (outputs, batch): the loss and metrics; of outputs without siamese losses, as in evaluation, the cross entropy.

  Raises:
    ValueError: e out of range, weights that are not two.
  """
  checks.rate("label_smoothing", label_smoothing)
  weights = {"direction": direction, "orthogonality": orthogonality, "invariance": invariance}
  for name, pair in weights.items():
    if len(pair) != 2:
      raise ValueError(f"{name}: got {pair}, expected a weight of the local and one of the global scale")

  def loss(outputs: Any, batch: Any) -> tuple[Float[Array, ""], train.learner.Metrics]:
    logits, siamese = outputs if isinstance(outputs, tuple) else (outputs, None)
    classes = logits.shape[-1]
    # `cross_entropy` shares its e among all C classes, the target included.
    smoothing = label_smoothing * classes / (classes - 1) if classes > 1 else 0.0
    if smoothing >= 1:
      raise ValueError(f"label_smoothing: got {label_smoothing}, expected less than {1 - 1 / classes:.3g}, (C - 1) / C")
    entropy = train.cross_entropy(label_smoothing=smoothing, labels=lambda batch: batch[label])
    value, metrics = entropy(logits, batch)
    if siamese is None:
      return value, metrics
    metrics = dict(metrics, cross_entropy=value)
    for name, pair in weights.items():
      terms = getattr(siamese, name)
      value += (jnp.asarray(pair, jnp.float32) * terms).sum()
      metrics |= {f"{name}_local": terms[0], f"{name}_global": terms[1]}
    return value, metrics

  return loss
