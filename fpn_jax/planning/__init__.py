"""What a training step will need, known from its compiled program alone: `python -m fpn_jax.plan`."""
