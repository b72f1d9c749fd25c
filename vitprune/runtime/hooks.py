"""Forward hooks of modules while a context is open."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]  # module, inputs, output -> another output, or None


@contextmanager
def forward_hooks(hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Call hooks after the forward passes of modules while the context is open.

    Args:
        hooks: Modules, each with its hook.
    """
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        yield
