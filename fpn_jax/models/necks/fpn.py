"""The feature pyramid network (Lin et al., arXiv 1612.03144, section 3), and what is left when parts of it are off."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fpn_jax.errors import UserError
from fpn_jax.models.layers import conv_norm, lecun_uniform, relu
from fpn_jax.models.resampling import Upsample

# Ways to bring the upsampled map and the lateral one together.
MERGES = ("sum", "concat")
ACTIVATIONS = {"none": lambda x: x, "relu": relu}


class FPN(nn.Module):
    """{l: C_l [b h w c]} -> {l: P_l [b h w channels]} for the same levels and one coarser one.

    Top-down pathway: M_l = 1x1(C_l) + upsample(M_{l+1}); P_l = 3x3(M_l); the coarsest M has no second term. There is
    no non-linearity in these layers. The extra level subsamples the coarsest P by 2 (section 4.1).

    Attributes:
        channels: d of the paper, of every output.
        levels: of the bottom-up pathway that are read; () reads all that the backbone gives.
        outputs: which P's to give, of `levels`; () gives all. (2,) is row (f) of the paper's tables.
        lateral: False leaves the 1x1 connections out but at the coarsest level, where the pathway begins: row (e).
        top_down: False leaves the second term out: row (d), a pyramid of the bottom-up maps.
        smooth: False leaves the 3x3 out.
        upsampling: "nearest" as in the paper, "bilinear", or "transposed", a learnt convolution that begins bilinear.
        merge: "sum" as in the paper, or "concat", followed by a 1x1 that gives `channels` again.
        activation: "none" as in the paper, or "relu", behind every convolution.
        extra_level: whether to append the subsampled level (P6), which only the RPN reads.
        norm: "none" as in the paper, or "frozen_bn", "bn", "gn" behind every convolution, in place of its bias.
    """

    channels: int = 256
    levels: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    lateral: bool = True
    top_down: bool = True
    smooth: bool = True
    upsampling: str = "nearest"
    merge: str = "sum"
    activation: str = "none"
    extra_level: bool = True
    norm: str = "none"
    norm_eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: dict[int, jax.Array], train: bool = False) -> dict[int, jax.Array]:
        def layer(x: jax.Array, name: str, level: int, kernel: int, above: jax.Array | None = None) -> jax.Array:
            names = f"{name}{level}", f"{name}_norm{level}"
            how = {"norm": self.norm, "eps": self.norm_eps, "dtype": self.dtype, "init": lecun_uniform, "above": above}
            return ACTIVATIONS[self.activation](conv_norm(x, names, self.channels, kernel, train, **how))

        features = {level: features[level] for level in self.levels or features}
        outputs = self.outputs or tuple(features)
        merged: dict[int, jax.Array] = {}
        above = None
        # The paper's step is one operation, which some platforms have a form of their own for.
        as_in_paper = self.lateral and self.top_down
        as_in_paper &= (self.upsampling, self.merge, self.activation) == ("nearest", "sum", "none")
        needed = [x for x in features if x in outputs or (self.top_down and x > min(outputs))]
        for level in sorted(needed, reverse=True):
            if as_in_paper and above is not None:
                merged[level] = above = layer(features[level], "lateral", level, 1, above)
                continue
            terms = []
            if self.lateral or level == max(features):
                terms.append(layer(features[level], "lateral", level, 1))
            if self.top_down and above is not None:
                size = features[level].shape[1:3]
                terms.append(Upsample(self.upsampling, dtype=self.dtype, name=f"upsample{level}")(above, size))
            if len(terms) == 2:
                joined = jnp.concatenate(terms, -1) if self.merge == "concat" else terms[0] + terms[1]
                terms = [layer(joined, "merge", level, 1) if self.merge == "concat" else joined]
            merged[level] = above = terms[0]
        pyramid = {
            level: layer(merged[level], "smooth", level, 3) if self.smooth else merged[level] for level in outputs
        }
        if self.extra_level:
            top = max(pyramid)
            pyramid[top + 1] = pyramid[top][:, ::2, ::2]
        return pyramid

    def output_levels(self, received: Sequence[int]) -> tuple[int, ...]:
        """The levels of the outputs for a backbone that gives `received`.

        Raises `UserError` naming the key of `config.model.neck` that asks for what cannot be.
        """
        levels = self.levels or tuple(received)
        _check_levels("levels", levels, received, "the backbone gives")
        outputs = self.outputs or levels
        _check_levels("outputs", outputs, levels, "model.neck.levels has")
        gaps = [level for level in range(min(levels), max(levels)) if level not in levels]
        if gaps and self.top_down:
            raise UserError(
                f"model.neck.levels is {levels} without level {gaps[0]}, and top_down only doubles the size; add it, "
                "or set model.neck.top_down=False"
            )
        if not self.top_down and not self.lateral and outputs != (max(levels),):
            raise UserError(
                "model.neck.lateral and model.neck.top_down are both False: nothing leads from a C to its P; "
                "switch one of them on, or set model.neck.name=none for the maps as the backbone gives them"
            )
        for name, default in (("upsampling", "nearest"), ("merge", "sum")):
            value = getattr(self, name)
            if not self.top_down and value != default:
                raise UserError(
                    f"model.neck.{name} is {value!r}, which model.neck.top_down=False has no use for; remove that line"
                )
        if self.merge == "concat" and not self.lateral:
            raise UserError(
                "model.neck.merge is 'concat', and model.neck.lateral=False leaves nothing to join; remove one of them"
            )
        return (*outputs, max(outputs) + 1) if self.extra_level else tuple(outputs)


class Bare(nn.Module):
    """The backbone's maps as they are: a single one (figure 1b), or a pyramidal feature hierarchy (figure 1c).

    {l: C_l [b h w c]} -> {l: C_l [b h w c]}, with as many channels as each has.

    Attributes:
        levels: which; () gives all.
    """

    levels: tuple[int, ...] = ()
    dtype: Any = jnp.float32  # not read; every neck is told it

    def __call__(self, features: dict[int, jax.Array], train: bool = False) -> dict[int, jax.Array]:
        return {level: features[level] for level in self.levels or features}

    def output_levels(self, received: Sequence[int]) -> tuple[int, ...]:
        """As `FPN.output_levels`."""
        levels = self.levels or tuple(received)
        _check_levels("levels", levels, received, "the backbone gives")
        return levels


def _check_levels(name: str, wanted: Sequence[int], there: Sequence[int], who: str) -> None:
    for level in wanted:
        if level not in there:
            raise UserError(f"model.neck.{name} is {tuple(wanted)}: {who} {tuple(there)}, no level {level}")
    if len(set(wanted)) < len(wanted):
        raise UserError(f"model.neck.{name} is {tuple(wanted)}; name each level once")
