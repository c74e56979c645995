"""How every process of a run begins: what has to be settled before torch is imported, then the large imports.

Imported first by clients.handlers and server.runs, so that it holds in Ray's workers and under a plain `flwr run` too.
"""

import gc
import os
import warnings

# With OpenMP's default, threads spin at barriers: 10 times slower beside one other busy process (experiments/LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# peft 0.21 still calls it, in every process that trains.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

# The collector would walk again and again through what imports make, none of which is garbage: 0.6 s a process.
gc.disable()
import copra_fl.models.adapted  # noqa: E402, F401

gc.freeze()
gc.enable()
