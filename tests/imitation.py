"""Other machines, imitated on this one."""

import contextlib
from collections.abc import Iterator

from jax.experimental.pallas import tpu as pltpu

from fpn_jax.ops.platforms import compiling_for


@contextlib.contextmanager
def forms_of(platform: str) -> Iterator[None]:
    """What is traced and run inside takes the forms of `platform`; kernels for TPUs are run by jax's interpreter.

    There, what was never written is no number, and reading outside of an array raises. Functions that were jitted
    before may be remembered in another form.
    """
    with compiling_for(platform), pltpu.force_tpu_interpret_mode() if platform == "tpu" else contextlib.nullcontext():
        yield
