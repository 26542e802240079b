"""One operation in several forms, each the fastest on some platform; all compute the same, up to rounding."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata

_TARGET: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def by_platform(*args: Any, default: Callable[..., Any], **forms: Callable[..., Any]) -> Any:
    """`forms[platform](*args)`, or `default(*args)`: "cpu" and "tpu" are the platforms that have forms of their own.

    Inside of `compiling_for` only the form of its platform is traced; elsewhere all are, and whoever lowers the program
    for a platform takes its form, as `jax.lax.platform_dependent` does it.
    """
    platform = _TARGET.get()
    if platform is None:
        return jax.lax.platform_dependent(*args, default=default, **forms)
    return forms.get(platform, default)(*args)


def apart(function: Callable[..., Any], static_argnums: Sequence[int] = ()) -> Callable[..., Any]:
    """`function` as a call that XLA's CPU backend must not look into. For forms of "cpu".

    It fuses more than is good for it (benchmarks/LOG.md): slices whose place only a loop knows, zeros around them and
    reshaped results are computed number by number then, and it takes optimization barriers away before it decides.
    """
    jitted = jax.jit(function, static_argnums=tuple(static_argnums))

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with set_xla_metadata(inlineable="false"):
            return jitted(*args)

    return call


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """What is traced inside is for devices of this `platform` alone: tracing a training step takes half the time.

    For the inside of a function that is jitted anew for each platform. A jitted function that is shared between
    programs, and remembers how it was traced, must not call `by_platform`.
    """
    token = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(token)
