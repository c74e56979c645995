"""Preparation of every process that uses torch: environment, warning filters, and the large imports.

A process calls `prepare` before anything else in it imports torch: the commands of copra-fl, Flower's server app and
Ray's workers, under a plain `flwr run` too.
"""

import functools
import gc
import os
import warnings


@functools.cache
def prepare() -> None:
    """Set the environment for torch, filter known warnings, and import the large modules; once per process."""
    # With OpenMP's default, threads spin at barriers: 10 times slower beside one other busy process
    # (experiments/LOG.md). OpenMP reads the variable once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    # peft 0.21 still calls it, in every process that trains.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

    # Disable garbage collection during imports, which create no garbage: saves 0.6 s per process.
    gc.disable()
    import copra_fl.models.adapted  # noqa: F401

    gc.freeze()
    gc.enable()
