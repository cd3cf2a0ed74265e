"""What a benchmark of a network times: a call or a training step, of a jaxlab learner and of a PyTorch module."""


def jax_call(function, *arguments):
  """Runs the compiled function."""
  import jax

  call = jax.jit(function)
  return lambda: jax.block_until_ready(call(*arguments))


def jax_step(learner, examples):
  """Runs a step of the learner on these examples."""
  import jax

  states = [jax.jit(learner.init)(jax.random.key(0), examples)]
  step = jax.jit(learner.step, donate_argnums=0)

  def run():
    states[0], _ = step(states[0], examples)
    jax.block_until_ready(states[0].params)

  return run


def autocast(dtype):
  """The context of PyTorch's forward passes: none for float32."""
  import torch

  return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")


def torch_call(model, *inputs, dtype):
  """Runs the module in evaluation."""
  import torch

  model.eval()

  def run():
    with torch.no_grad(), autocast(dtype):
      model(*inputs)

  return run


def torch_step(optimizer, forward, loss, *, dtype):
  """Runs a step: `forward()` gives outputs, `loss(outputs)` is outside of autocast."""

  def run():
    optimizer.zero_grad()
    with autocast(dtype):
      outputs = forward()
    loss(outputs).backward()
    optimizer.step()

  return run
