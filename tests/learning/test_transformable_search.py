import functools

import flax.linen as nn
import golden_rule
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.learning import local
from jaxlab.learning import transformable_search as tas

# ------------------------------------------------------------------------------------------------------ official code


def below(prefix, state):
  return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def per_norm(params, kind):
  """Sums of a kind of array over each convolution's eight normalisations, in torch's order."""
  layers = [params["stem"]]
  for i in range(6):
    block = params[f"blocks_{i}"]
    layers += [block[name] for name in ("convs_0", "convs_1", "shortcut") if name in block]
  return [float(np.sum(layer[kind])) for layer in layers]


def searched(space, variables, architecture, indices, inputs, name):
  """A training pass; for the basic network evaluation and the gradients of CE + 2 log E_F too."""
  image = jnp.moveaxis(jnp.asarray(inputs["image"]), 1, -1)
  network = tas.SearchNetwork(space)

  def drawn(architecture):
    chosen = jnp.take_along_axis(architecture.widths, indices, -1)
    return tas.Sample(indices, jax.nn.softmax(chosen), jax.nn.softmax(architecture.depths))

  def loss(params, architecture):
    logits, updated = network.apply(
      {**variables, "params": params}, image, drawn(architecture), train=True, mutable=["batch_stats"]
    )
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), inputs["label"][:, None], -1)
    expected = tas.expected_macs(space, architecture) / 1e6
    return -chosen.mean() + 2 * jnp.log(expected), (logits, expected, updated["batch_stats"])

  out = {"found": tas.found_macs(space, architecture) / 1e6}
  if name == "bottleneck":
    _, (out["logits"], out["expected"], _) = jax.jit(loss)(variables["params"], architecture)
    return out, None
  slopes, (out["logits"], out["expected"], stats) = jax.jit(jax.grad(loss, 1, has_aux=True))(
    variables["params"], architecture
  )
  out |= {"widths_gradient": slopes.widths, "depths_gradient": slopes.depths}
  out["evaluated"] = jax.jit(network.apply)(variables, image, drawn(architecture))
  return out, stats


def test_golden():
  """Logits, costs, gradients and running statistics of search networks, and logits of derived ones."""
  basic, bottleneck = tas.resnet(14), tas.resnet(20, bottleneck=True)

  def run(state, inputs):
    out = {}
    for name, space in (("search", basic), ("bottleneck", bottleneck)):
      made = tas.from_torch(below(f"{name}.", state), space)
      found, stats = searched(space, *made, inputs[f"{name}_indices"], inputs, name)
      out |= {f"{name}_{key}": value for key, value in found.items()}
      if name == "search":
        out["search_running"] = np.array([per_norm(stats, kind) for kind in ("mean", "var")]).T
    for name, space in (("derived", basic), ("derived_bottleneck", bottleneck)):
      widths, depths = (tuple(inputs[f"{name}_{kind}"].tolist()) for kind in ("widths", "depths"))
      network = tas.DerivedNetwork(space, tas.Genotype(widths, depths))
      variables = tas.derived_from_torch(below(f"{name}.", state), space, network.genotype)
      image = jnp.moveaxis(jnp.asarray(inputs["image"]), 1, -1)
      out[f"{name}_evaluated"] = jax.jit(network.apply)(variables, image)
    pooled = []
    for width in (16, 32, 64):
      choices = tas.width_choices(width)
      pairs = np.array([(a, m) for a in choices for m in choices if m >= a])
      matrices = tas.interpolation(pairs[:, 0], pairs[:, 1], 64)
      pooled += [(matrix @ inputs["channels"])[:m] for matrix, (_, m) in zip(matrices, pairs, strict=True)]
    out["interpolated"] = np.concatenate(pooled)
    return out

  golden_rule.check("transformable_search", lambda state: state, run, atol=2e-4, rtol=2e-4)


# --------------------------------------------------------------------------------------------------- choices and costs


def test_choices():
  assert tas.width_choices(16) == (4, 6, 8, 9, 11, 12, 14, 16)
  assert tas.width_choices(32) == (9, 12, 16, 19, 22, 25, 28, 32)
  assert tas.width_choices(64) == (19, 25, 32, 38, 44, 51, 57, 64)
  depths = {2: (1, 2), 3: (1, 2, 3), 5: (1, 3, 5), 9: (1, 3, 5, 7, 9), 18: (*range(1, 18, 2), 18)}
  assert {n: tas.depth_choices(n) for n in depths} == depths


# Parameters and multiplications of the derived network, and multiplications as the search counts them.
PUBLISHED = {
  "C10-R20": (228_130, 22.444, 22.444),
  "C10-R32": (320_539, 34.945, 34.945),
  "C10-R56": (449_307, 59.858, 57.933),
  "C10-R110": (795_864, 119.259, 117.498),
  "C10-R164": (1_277_931, 178.071, 173.024),
  "C100-R20": (241_237, 22.434, 22.434),
  "C100-R32": (427_330, 42.469, 42.469),
  "C100-R56": (470_977, 61.234, 59.473),
  "C100-R110": (843_653, 119.578, 117.653),
  "C100-R164": (1_325_258, 171.144, 165.584),
}


def count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def shapes(network, *inputs):
  side = network.space.image_size
  return jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, side, side, 3)), *inputs)["params"]


def parameter_count(space, genotype):
  """Of a derived network, by the sizes of its layers; of those that are small also by tracing."""
  layer = lambda i, o, k: k * k * i * o + 2 * o
  kernels = (1, 3, 1) if space.bottleneck else (3, 3)
  width, place = genotype.widths[0], 1
  total = layer(3, width, 3)
  for stage in range(3):
    for i in range(space.blocks):
      widths = (width, *genotype.widths[place : place + len(kernels)])
      place += len(kernels)
      if i < genotype.depths[stage]:
        total += sum(layer(*pair, k) for *pair, k in zip(widths, widths[1:], kernels, strict=False))
        if stage and i == 0:
          total += widths[0] * widths[-1]
        elif widths[0] != widths[-1]:
          total += widths[0] * widths[-1] + (0 if space.bottleneck else 2 * widths[-1])
        width = widths[-1]
  total += (width + 1) * space.num_classes
  if space.blocks <= 3:
    assert count(shapes(tas.DerivedNetwork(space, genotype))) == total
  return total


def test_parameters_with_bottlenecks():
  space = tas.resnet(20, bottleneck=True)
  genotype = tas.Genotype((16, 8, 9, 64, 8, 9, 57, 9, 9, 51, 9, 9, 38, 19, 19, 76, 64, 64, 256), (2, 1, 2))
  assert parameter_count(space, genotype) < count(shapes(tas.DerivedNetwork(space, space.full)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_reference_networks(name):
  space, genotype = tas.reference(name)
  parameters, derived, found = PUBLISHED[name]
  assert round(tas.macs(space, genotype) / 1e6, 3) == derived
  assert round(tas.macs(space, genotype, connected=False) / 1e6, 3) == found
  assert parameter_count(space, genotype) == parameters
  certain = one_hot(space, genotype)
  assert tas.extract(space, certain) == genotype
  np.testing.assert_allclose(tas.found_macs(space, certain) / 1e6, found, atol=6e-4)


def test_references_are_all_there():
  assert set(tas.REFERENCES) == set(PUBLISHED)
  space, genotype = tas.reference("C10-R32")
  assert genotype.depths == (5, 5, 5) and space.num_classes == 10
  widths = "16,6,4,12,4,4,16,9,9,6,14,32,32,9,19,28,9,32,19,32,9,64,64,64,64,64,64,64,32,38,32"
  assert genotype.widths == tuple(map(int, widths.split(",")))


FULL = {  # layers: parameters of the search network, multiplications, shapes of the logits
  20: (279_089, 40.813, ((19, 8), (3, 3))),
  32: (477_305, 69.125, ((31, 8), (3, 3))),
  56: (873_743, 125.748, ((55, 8), (3, 5))),
  110: (1_765_730, 253.150, ((109, 8), (3, 10))),
}


@functools.cache
def shared_parameters(layers):
  space = tas.resnet(layers)
  depths = jnp.ones((3, len(space.depths)))
  drawn = tas.Sample(jnp.zeros((layers - 1, 2), int), jnp.ones((layers - 1, 2)), depths)
  return count(shapes(tas.SearchNetwork(space), drawn))


@pytest.mark.parametrize("layers", FULL)
def test_full_networks(layers):
  """Blocks of a stage are equal but for the first, so that parameters grow evenly with their number."""
  parameters, full, logits = FULL[layers]
  space = tas.resnet(layers)
  architecture = tas.initial(space, jax.random.key(0))
  assert (architecture.widths.shape, architecture.depths.shape) == logits
  assert round(tas.macs(space, space.full) / 1e6, 3) == full
  small, large = shared_parameters(14), shared_parameters(20)
  shared = small + (large - small) * (space.blocks - 2)
  assert shared + count(architecture) == parameters  # the official count has the logits too


def one_hot(space, genotype, size=1e4):
  widths = size * (space.table == np.array(genotype.widths)[:, None])
  depths = size * (np.array(space.depths) == np.array(genotype.depths)[:, None])
  return tas.Architecture(jnp.asarray(widths, jnp.float32), jnp.asarray(depths, jnp.float32))


def plain_cost(blocks, size, channels, widths, keep, classes, shortcuts, extra):
  """A CIFAR ResNet of basic blocks, layer by layer, in float64: E_F for probabilities, F for certain choices."""
  total, place, width, number, side = size * size * 27 * widths[0], 1, widths[0], 0, size
  for stage in range(3):
    for i in range(blocks):
      side = side // 2 if stage and i == 0 else side
      a, b = widths[place], widths[place + 1]
      cost = side * side * (9 * width * a + 9 * a * b)
      if shortcuts[number] or (extra and width != b):
        cost += side * side * width * b
      total += keep[stage][i] * cost
      place, width, number = place + 2, b, number + 1
  return total + width * classes


def test_expected_cost_and_its_gradient():
  space = tas.resnet(32, widths=(16, 10, 20, 40), image_size=16)
  rng = np.random.default_rng(0)
  logits = rng.standard_normal(space.table.shape), rng.standard_normal((3, len(space.depths)))
  table = [sorted({int(c * f / 10) for f in range(3, 11)}) for c in space.convolutions]

  def oracle(widths, depths):
    p, q = (np.exp(a) / np.exp(a).sum(1, keepdims=True) for a in (widths, depths))
    keep = [[sum(q[s][k] for k, d in enumerate(space.depths) if d > i) for i in range(space.blocks)] for s in range(3)]
    ends = [True] + [False] * (space.blocks - 1)
    return plain_cost(space.blocks, 16, 3, (p * table).sum(1), keep, 10, ends * 3, extra=False)

  expected = lambda *a: tas.expected_macs(space, tas.Architecture(*a))
  value, slopes = jax.jit(jax.value_and_grad(expected, (0, 1)))(*(jnp.asarray(a, jnp.float32) for a in logits))
  np.testing.assert_allclose(value, oracle(*logits), rtol=1e-5)
  for which in range(2):
    for row, column in [(0, 0), (1, 1), (2, 1), (-1, -1)]:
      steps = []
      for h in (1e-4, -1e-4):
        moved = [a.copy() for a in logits]
        moved[which][row, column] += h
        steps.append(oracle(*moved))
      np.testing.assert_allclose(slopes[which][row, column], (steps[0] - steps[1]) / 2e-4, rtol=1e-3, atol=1)


def test_certain_choices_cost_what_the_full_network_does():
  for space in (tas.resnet(20), tas.resnet(38, bottleneck=True)):
    certain, full = one_hot(space, space.full), tas.macs(space, space.full)
    np.testing.assert_allclose([tas.expected_macs(space, certain), tas.found_macs(space, certain)], full, rtol=1e-6)


def test_found_cost_charges_for_shortcuts_that_must_be_inserted():
  space = tas.resnet(20)
  widths = list(space.convolutions)
  widths[4], widths[10] = 9, 22  # the second block of the first two stages
  certain = one_hot(space, tas.Genotype(tuple(widths), (3, 3, 3)))
  extra = 32 * 32 * (16 * 9 + 9 * 16) + 16 * 16 * (32 * 22 + 22 * 32)
  np.testing.assert_allclose(tas.found_macs(space, certain) - tas.expected_macs(space, certain), extra, atol=8)


def test_networks_of_equal_cost():
  space = tas.resnet(20, widths=(10, 10, 20, 40), image_size=16)
  full = tas.macs(space, space.full)
  for ratio in (0.3, 0.55, 0.8):
    cost = tas.macs(space, tas.uniform(space, ratio * full)) / full
    assert ratio - 0.02 < cost <= ratio
  assert tas.uniform(space, full) == space.full
  rng = np.random.default_rng(0)
  drawn = [tas.random(space, 0.5 * full, rng, tolerance=0.02) for _ in range(3)]
  assert len(set(drawn)) == 3
  assert all(0.49 <= tas.macs(space, genotype) / full <= 0.51 for genotype in drawn)


# ------------------------------------------------------------------------------------------------------------ sampling


def pairs_law(p):
  """How often each choice is among two draws without replacement."""
  second = np.array([[p[i] * p[j] / (1 - p[i]) if i != j else 0 for j in range(len(p))] for i in range(len(p))])
  return second.sum(1) + second.sum(0)


@functools.cache
def draws():
  return jax.jit(
    lambda architecture, tau: jax.vmap(lambda key: tas.sample(architecture, key, tau))(
      jax.random.split(jax.random.key(0), 20_000)
    )
  )


LOGITS = tas.Architecture(
  jnp.array([[2.0, 1.0, 0.0, 0.0, -1.0, 0.5, 0.0, -3.0], [0.0] * 8]), jnp.array([[1.0, 0.0, -1.0]] * 3)
)


def test_two_draws_without_replacement():
  quiet = draws()(LOGITS, 0.0)  # no noise in p, which is then known
  assert np.all(quiet.indices[..., 0] != quiet.indices[..., 1])
  p = np.asarray(jax.nn.softmax(LOGITS.widths))
  for row in range(2):
    shares = np.bincount(np.asarray(quiet.indices)[:, row].ravel(), minlength=8) / 20_000
    np.testing.assert_allclose(shares, pairs_law(p[row]), atol=0.015)
    first = np.bincount(np.asarray(quiet.indices)[:, row, 0], minlength=8) / 20_000
    np.testing.assert_allclose(first, p[row], atol=0.015)
  np.testing.assert_allclose(quiet.depths, np.broadcast_to(jax.nn.softmax(LOGITS.depths), (20_000, 3, 3)), atol=1e-6)


def test_noise_of_the_weights():
  noisy, rng = draws()(LOGITS, 2.0), np.random.default_rng(0)
  a = np.asarray(jax.nn.log_softmax(LOGITS.widths[0]), np.float64)
  law = []
  for _ in range(20_000):
    p = np.exp((a + rng.gumbel(size=8)) / 2)
    law.append(pairs_law(p / p.sum()))
  shares = np.bincount(np.asarray(noisy.indices)[:, 0].ravel(), minlength=8) / 20_000
  np.testing.assert_allclose(shares, np.mean(law, 0), atol=0.015)
  np.testing.assert_allclose(noisy.weights.sum(-1), 1, atol=1e-6)
  np.testing.assert_allclose(noisy.depths.sum(-1), 1, atol=1e-6)


def test_a_low_temperature_takes_one_choice():
  largest = [float(jnp.median(draws()(LOGITS, tau).weights.max(-1))) for tau in (5.0, 1.0, 0.1, 0.01)]
  assert largest == sorted(largest) and largest[0] < 0.7 and largest[2] > 0.99 and largest[3] > 0.9999


def test_gradient_reaches_logits_by_weights_alone():
  def value(architecture):
    drawn = tas.sample(architecture, jax.random.key(1), 1.0)
    return jnp.sum(drawn.weights[:, 0] ** 2) + jnp.sum(drawn.depths[:, 0] ** 2), drawn.indices

  slopes, indices = jax.jit(jax.grad(value, has_aux=True))(LOGITS)
  for row in range(2):
    touched = np.flatnonzero(np.abs(slopes.widths[row]) > 1e-7)
    assert set(touched) == set(indices[row].tolist())
  assert np.all(slopes.depths != 0)


def test_temperature():
  tau = tas.temperature(10, 7)
  assert tau(0) == tau(6) == 5 and np.isclose(tau(70), 0.1)
  np.testing.assert_allclose(tau(23), 0.1 + 4.9 * (1 + np.cos(0.3 * np.pi)) / 2, rtol=1e-6)


def test_interpolation():
  for c, m in [(4, 16), (9, 14), (16, 16), (64, 51), (256, 179), (57, 64)]:
    matrix = np.asarray(tas.interpolation(c, m, 256))
    np.testing.assert_allclose(matrix[:m].sum(1), 1, rtol=1e-6)  # so what is constant stays so
    assert not matrix[m:].any() and not matrix[:, c:].any()
    if c == m:
      np.testing.assert_array_equal(matrix[:m, :m], np.eye(m))


# ----------------------------------------------------------------------------------------------- the network by slices


def conv(x, kernel, stride):
  k = kernel.shape[0]
  x = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), (1, 2))[:, ::stride, ::stride]
  return np.einsum("bijckl,klco->bijo", windows, kernel)


def normalize(y, scale, bias):
  return (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5) * scale + bias


def pooled(x, m):
  c = x.shape[-1]
  return np.stack([x[..., o * c // m : -(-(o + 1) * c // m)].mean(-1) for o in range(m)], -1)


def halved(x):
  return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


def mixed(x, layer, full, indices, weights, stride=1):
  """Two slices of a convolution, each with a normalisation of its own, aligned and added up."""
  choices = tas.width_choices(full)
  starts = np.cumsum((0, *choices))
  kernel = layer["conv"]["kernel"][:, :, : x.shape[-1]]
  widest, total = max(choices[j] for j in indices), 0.0
  for j, w in zip(indices, weights, strict=True):
    part = slice(starts[j], starts[j + 1])
    y = conv(x, kernel[..., : choices[j]], stride)
    total = total + w * pooled(normalize(y, layer["scale"][part], layer["bias"][part]), widest)
  return total


def added(a, b):
  wide, narrow = (a, b) if a.shape[-1] >= b.shape[-1] else (b, a)
  out = wide.copy()
  out[..., : narrow.shape[-1]] += narrow
  return out


def sliced(space, params, image, indices, weights, depths):
  """The search network with arrays of the sampled sizes."""
  relu = lambda a: np.maximum(a, 0)
  x = relu(mixed(image, params["stem"], space.widths[0], indices[0], weights[0]))
  place, number = 1, 0
  for stage in range(3):
    ends = []
    for i in range(space.blocks):
      layer, full = params[f"blocks_{number}"], space.widths[stage + 1]
      stride = 2 if stage and i == 0 else 1
      h = relu(mixed(x, layer["convs_0"], full, indices[place], weights[place], stride))
      h = mixed(h, layer["convs_1"], full, indices[place + 1], weights[place + 1])
      if "shortcut" in layer:
        x = mixed(halved(x) if stride == 2 else x, layer["shortcut"], full, indices[place + 1], weights[place + 1])
      x = relu(added(x, h))
      place, number = place + 2, number + 1
      if i + 1 in space.depths:
        ends.append(x)
    widest = max(e.shape[-1] for e in ends)
    x = sum(w * pooled(e, widest) for w, e in zip(depths[stage], ends, strict=True))
  h = x.mean((1, 2))
  return h @ params["classifier"]["kernel"][: h.shape[-1]] + params["classifier"]["bias"]


SMALL = tas.resnet(14, 5, widths=(9, 9, 10, 12), image_size=8)
NETWORK = tas.SearchNetwork(SMALL)


@functools.cache
def small():
  """Random weights (scales and biases too), an image batch, and the compiled network."""
  image = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype(np.float32)
  n = len(SMALL.convolutions)
  drawn = tas.Sample(jnp.zeros((n, 2), int), jnp.ones((n, 2)), jnp.ones((3, 2)))
  made = jax.eval_shape(NETWORK.init, jax.random.key(0), image, drawn)
  rng = np.random.default_rng(1)
  fill = lambda a: (rng.standard_normal(a.shape) * (1 / np.sqrt(np.prod(a.shape[:-1])) if a.ndim > 1 else 0.5)).astype(
    np.float32
  )
  params = jax.tree.map(fill, made["params"])
  stats = jax.tree.map(lambda a: np.ones(a.shape, np.float32), made["batch_stats"])
  run = jax.jit(lambda drawn, image: NETWORK.apply(
    {"params": params, "batch_stats": stats}, image, drawn, train=True, mutable=["batch_stats"]
  ))  # fmt: skip
  return params, image, run


@pytest.mark.parametrize("seed", range(4))
def test_masked_equals_sliced(seed):
  params, image, run = small()
  rng = np.random.default_rng(seed)
  indices = np.stack([rng.permutation(8)[:2] for _ in SMALL.convolutions])
  weights, depths = rng.dirichlet((1, 1), len(indices)), rng.dirichlet((1, 1), 3)
  drawn = tas.Sample(jnp.asarray(indices), jnp.asarray(weights, jnp.float32), jnp.asarray(depths, jnp.float32))
  logits, _ = run(drawn, image)
  np.testing.assert_allclose(logits, sliced(SMALL, params, image, indices, weights, depths), atol=1e-5, rtol=1e-5)


def test_statistics_of_sampled_choices_move():
  params, image, run = small()
  n = len(SMALL.convolutions)
  drawn = tas.Sample(jnp.tile(jnp.array([6, 2]), (n, 1)), jnp.full((n, 2), 0.5), jnp.ones((3, 2)))
  stats = run(drawn, image)[1]["batch_stats"]["stem"]
  y = conv(image, params["stem"]["conv"]["kernel"], 1).reshape(-1, 9)
  parts = np.split(np.arange(sum(tas.width_choices(9))), np.cumsum(tas.width_choices(9))[:-1])
  for k, part in enumerate(parts):
    mean, var = (y.mean(0), y.var(0, ddof=1)) if k in (6, 2) else (np.ones(9), np.ones(9))
    np.testing.assert_allclose(stats["mean"][part], 0.9 + 0.1 * mean[: len(part)], atol=1e-5)
    np.testing.assert_allclose(stats["var"][part], 0.9 + 0.1 * var[: len(part)], atol=1e-5)


def plain(space, params, image):
  """The full network without any mixture, its strided shortcuts normalised too."""
  part = lambda layer, c: (layer["scale"][-c:], layer["bias"][-c:])
  norm = lambda y, layer: normalize(y, *part(layer, y.shape[-1]))
  relu = lambda a: np.maximum(a, 0)
  x = relu(norm(conv(image, params["stem"]["conv"]["kernel"], 1), params["stem"]))
  for number in range(3 * space.blocks):
    layer, stride = params[f"blocks_{number}"], 2 if number in (space.blocks, 2 * space.blocks) else 1
    h = relu(norm(conv(x, layer["convs_0"]["conv"]["kernel"], stride), layer["convs_0"]))
    h = norm(conv(h, layer["convs_1"]["conv"]["kernel"], 1), layer["convs_1"])
    if "shortcut" in layer:
      x = norm(conv(halved(x) if stride == 2 else x, layer["shortcut"]["conv"]["kernel"], 1), layer["shortcut"])
    x = relu(x + h)
  return x.mean((1, 2)) @ params["classifier"]["kernel"] + params["classifier"]["bias"]


def test_certain_choices_give_the_plain_network():
  params, image, run = small()
  drawn = tas.sample(one_hot(SMALL, SMALL.full), jax.random.key(0), 1.0)
  logits, _ = run(drawn, image)
  np.testing.assert_allclose(logits, plain(SMALL, params, image), atol=1e-5, rtol=1e-5)


def test_certain_narrow_choices():
  """Residuals of unequal widths are added as far as both go; what a cut stage hands on is its last block's output."""
  params, image, run = small()
  rng = np.random.default_rng(3)
  index = rng.integers(8, size=len(SMALL.convolutions))
  genotype = tas.Genotype(tuple(int(row[i]) for row, i in zip(SMALL.table, index, strict=True)), (1, 2, 1))
  drawn = tas.sample(one_hot(SMALL, genotype), jax.random.key(0), 1.0)
  np.testing.assert_array_equal(drawn.indices[:, 0], index)
  logits, _ = run(drawn, image)
  # The second choice has no weight but counts for the width that both are brought to.
  indices, depths = np.asarray(drawn.indices), np.array([[1.0, 0], [0, 1], [1, 0]])
  weights = np.tile([1.0, 0.0], (len(index), 1))
  np.testing.assert_allclose(logits, sliced(SMALL, params, image, indices, weights, depths), atol=1e-5, rtol=1e-5)


def test_statistics_over_devices():
  layer = tas.MixedConv(tas.width_choices(9), 3, axis_name="device")
  x, indices, weights = jax.random.normal(jax.random.key(0), (4, 6, 6, 2)), jnp.array([1, 5]), jnp.array([0.3, 0.7])
  made = jax.eval_shape(functools.partial(layer.init, train=True), jax.random.key(1), x, indices, weights)
  variables = jax.tree.map(lambda a: np.linspace(0.5, 1, a.size, dtype=np.float32).reshape(a.shape), made)
  run = lambda layer, x: layer.apply(variables, x, indices, weights, train=True, mutable=["batch_stats"])

  @jax.jit
  def both(x):
    halves = jax.vmap(lambda x: run(layer, x), axis_name="device")(x.reshape(2, 2, 6, 6, 2))
    return halves, run(layer.clone(axis_name=None), x)

  ((many, _), stats), ((one, _), whole) = both(x)
  np.testing.assert_allclose(many.reshape(one.shape), one, atol=1e-5)
  for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(a, np.stack([b, b]), atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ learners


def test_sign_of_the_cost():
  cost = lambda found: float(tas.cost(jnp.float32(50.0), jnp.float32(found), 100.0, 5.0))
  log = float(np.log(np.float32(50.0)))
  assert [cost(f) for f in (94.9, 95.1, 100.0, 100.1)] == pytest.approx([-log, 0.0, 0.0, log])


def expected_widths(space, architecture):
  return np.sum(np.asarray(jax.nn.softmax(architecture.widths)) * space.table, -1)


def data(seed, size=8):
  rng = np.random.default_rng(seed)
  part = lambda: {
    "image": rng.standard_normal((size, 8, 8, 3)).astype(np.float32),
    "label": rng.integers(0, 5, size).astype(np.int32),
  }
  return {"weights": part(), "architecture": part()}


@functools.cache
def search(ratio):
  learner = tas.search_learner(
    NETWORK, local.sgd(0.01, weight_decay=5e-4), tas.architecture_optimizer(0.05), tas.temperature(10, 12), ratio=ratio
  )
  return learner, jax.jit(learner.step)


@functools.cache
def start():
  return jax.jit(search(0.5)[0].init)(jax.random.key(0), data(0))


@pytest.mark.parametrize("found", [0.9, 0.2])
def test_the_cost_pulls_towards_the_target(found):
  """Of the cost alone: above the target a step narrows, too far below it it widens."""
  small, target = tas.initial(SMALL, jax.random.key(0)), 0.5
  slopes = jax.jit(jax.grad(lambda a: tas.cost(tas.expected_macs(SMALL, a), jnp.float32(found), target, 0.05)))(small)
  moved = jax.tree.map(lambda a, g: a - 0.1 * g, small, slopes)
  change = expected_widths(SMALL, moved) - expected_widths(SMALL, small)
  assert np.all(change < 0) if found > target else np.all(change > 0)


def test_a_short_search_ends_at_the_target():
  ratio = 0.5
  _, step = search(ratio)
  state, ratios = start(), []
  for i in range(50):
    state, metrics = step(state, data(i % 4))
    ratios.append(float(metrics["macs"]))
  genotype = tas.extract(SMALL, state.found)
  got = tas.macs(SMALL, genotype, connected=False) / tas.macs(SMALL, SMALL.full)
  np.testing.assert_allclose(got, tas.found_macs(SMALL, state.found) / tas.macs(SMALL, SMALL.full), rtol=1e-6)
  assert abs(got - ratio) <= 0.05, ratios
  assert tas.on_target(SMALL, genotype, ratio=ratio)
  assert not tas.on_target(SMALL, SMALL.full, ratio=ratio)
  assert not tas.on_target(SMALL, genotype, ratio=got - 0.01) and not tas.on_target(SMALL, genotype, ratio=got + 0.06)


def test_a_step_is_one_of_weights_and_then_one_of_logits():
  learner, step = search(0.5)
  state, batch = start(), data(5)
  other = {**batch, "architecture": data(6)["architecture"]}
  first, second = step(state, batch)[0], step(state, other)[0]
  for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(second.params), strict=True):
    np.testing.assert_array_equal(a, b)  # weights do not see the architecture's half
  assert not np.allclose(first.architecture.widths, second.architecture.widths)
  assert first.step == 1 and not np.allclose(first.params["classifier"]["kernel"], state.params["classifier"]["kernel"])
  once = jax.jit(learner.evaluate)
  assert once(first, batch["weights"]) == once(first, batch["weights"])


def test_knowledge_transfer():
  rng = np.random.default_rng(0)
  s, t, label = rng.standard_normal((6, 5)), rng.standard_normal((6, 5)), rng.integers(0, 5, 6)
  softmax = lambda a: np.exp(a) / np.exp(a).sum(-1, keepdims=True)
  hard = -np.log(softmax(s))[np.arange(6), label].mean()
  p, q = softmax(t / 4), softmax(s / 4)
  soft = (p * np.log(p / q)).sum() / 6
  value, metrics = tas.knowledge_transfer()(jnp.asarray(s), {"label": label, "teacher": jnp.asarray(t)})
  np.testing.assert_allclose(value, 0.1 * hard + 0.9 * 16 * soft, rtol=1e-5)
  assert metrics["accuracy"] == np.mean(s.argmax(-1) == label)


class Linear(nn.Module):
  """Student and teacher."""

  @nn.compact
  def __call__(self, x, *, train=False):
    return nn.Dense(5)(x.reshape(len(x), -1)[:, :20])


def test_a_student_learns_from_its_teacher():
  batch = data(0)["weights"]
  variables = Linear().init(jax.random.key(5), batch["image"])
  learner = tas.distilled_learner(Linear(), optax.sgd(0.2), Linear(), variables, alpha=1.0)
  state = learner.init(jax.random.key(0), batch)
  step, losses = jax.jit(learner.step), []
  for _ in range(300):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.01 * losses[0]
  for a, b in zip(jax.tree.leaves(state.teacher), jax.tree.leaves(variables), strict=True):
    np.testing.assert_array_equal(a, b)
  logits = Linear().apply({"params": state.params}, batch["image"])
  right = np.mean(np.argmax(logits, -1) == batch["label"])
  assert learner.evaluate(state, batch)["accuracy"] == right
