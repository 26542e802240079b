"""Feature pyramid detectors in JAX: see README.md for the commands and fpn_jax/types.py for the letters."""

__version__ = "0.1.0"
