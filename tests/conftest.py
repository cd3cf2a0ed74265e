"""Settings that must precede the first import of JAX, and fixtures of the whole suite."""

import os

# Parallel forms are tested on eight virtual devices. Test processes share the cores, so each stays with few threads.
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import hypothesis

# Compiling inside a property makes its first example slow; deadlines would only measure that.
hypothesis.settings.register_profile("jaxlab", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.load_profile("jaxlab")
