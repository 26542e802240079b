"""One operation in several forms, each the fastest on some platform; all compute the same, up to rounding."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax

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
