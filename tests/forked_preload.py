"""What the tests' fork server imports, once for all ranks that it forks."""

import gc

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import reliability_faults
import torch._dynamo
import torch._inductor.compile_fx  # noqa: F401

import training.loop  # noqa: F401

reliability_faults.skip_report()
gc.collect()
gc.freeze()  # what is shared is not searched again in every rank
