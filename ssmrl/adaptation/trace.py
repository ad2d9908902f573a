"""Traces: a pure function of tensors, recorded once for given shapes and replayed without Python or functorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torchopt import pytree

__all__ = ["Traced", "check_compile"]

_LIBRARY = torch.library.Library("ssmrl", "FRAGMENT")
_LIBRARY.define("stored(Tensor x) -> Tensor")
_LIBRARY.impl("stored", torch.clone, "CompositeExplicitAutograd")
torch.library.register_fake("ssmrl::stored", torch.empty_like, lib=_LIBRARY)


class Traced:
    """Calls a pure function of pytrees of tensors through a trace of it.

    The first call with arguments of a new structure, or of tensors with new shapes, dtypes or devices, runs the
    function once and records its tensor operations, through `grad` and `vmap`; later calls replay them. The numbers are
    the same up to rounding. What the function reads that is not an argument is recorded as it was: it must not change.

    Args:
        function: the function.
        inductor: compile what is recorded with TorchInductor, which fuses elementwise operations into kernels and calls
            all of them from C++; it needs a C++ compiler. Else the operations are replayed one by one.
    """

    def __init__(self, function: Callable[..., Any], *, inductor: bool = False) -> None:
        self.function = function
        self.inductor = inductor
        self._traces: dict[Any, tuple[Callable[..., Any], Any]] = {}

    @torch.no_grad()
    def __call__(self, *arguments: Any) -> Any:
        leaves: list[Tensor]
        leaves, structure = pytree.tree_flatten(arguments)  # type: ignore[arg-type]
        # What is recorded or compiled is of one layout in memory, a view of a contiguous tensor for instance.
        leaves = [leaf.contiguous() for leaf in leaves]
        key = (structure, tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves))
        if key not in self._traces:
            self._traces[key] = self._trace(leaves, structure)
        replay, result_structure = self._traces[key]
        return pytree.tree_unflatten(result_structure, replay(*leaves))

    def _trace(self, leaves: list[Tensor], structure: Any) -> tuple[Callable[..., Any], Any]:
        result_structure = None

        def flat(*leaves: Tensor) -> list[Tensor]:
            nonlocal result_structure
            results: list[Tensor]
            results, result_structure = pytree.tree_flatten(self.function(*pytree.tree_unflatten(structure, leaves)))
            return results

        # A tensor object each: one that is passed twice would be one input to the trace.
        graph = make_fx(flat)(*[leaf.detach() for leaf in leaves])
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return (_compile(graph, leaves) if self.inductor else graph), result_structure


def _compile(graph: torch.fx.GraphModule, leaves: list[Tensor]) -> Callable[..., Any]:
    from torch import _inductor  # slow to import

    for node in graph.graph.nodes:
        node.meta.clear()  # its notes on shapes are of another trace than the one that the compiler makes
        if node.target is torch.ops.aten.pow.Scalar:
            _store(node)
    graph.recompile()
    # The code is for a number of threads. What calls the kernels is built apart from them, without optimisation, which
    # would take as long as theirs and gain nothing.
    options: dict[str, Any] = {"cpp_wrapper": True, "cpp.threads": torch.get_num_threads()}
    if hasattr(_inductor.config, "cpp_wrapper_build_separate"):
        options["cpp_wrapper_build_separate"] = True
    try:
        with _cached():
            compiled: Callable[..., Any] = _inductor.compile(graph, [leaf.detach() for leaf in leaves], options=options)
    except Exception as error:
        if "InvalidCxxCompiler" in repr(error):
            raise RuntimeError(
                'compile=True needs a C++ compiler, and none was found; install one, or take compile="trace".'
            ) from error
        raise
    return compiled


@contextmanager
def _cached() -> Iterator[None]:
    """Within it TorchInductor keeps on disk what it compiles, and finds it again.

    It looks for the guards of shapes in a tracing context, and keeps nothing where there is none. The operations of
    this library are names in a graph; so the library's version is part of the key.
    """
    if torch.__version__ < "2.8":  # a TorchVersion; older ones fail where they find something
        yield
        return
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode
    from torch.compiler import config
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # imports sympy

    from ssmrl import __version__

    tag = f"{config.cache_key_tag} ssmrl {__version__}"
    shapes = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    with config.patch(cache_key_tag=tag), tracing(TracingContext(shapes)):  # type: ignore[attr-defined]
        yield


def _store(node: torch.fx.Node) -> None:
    """Keep a power, such as Adam's bias correction, from being computed anew for every element that it scales."""
    with node.graph.inserting_after(node):
        stored = node.graph.call_function(torch.ops.ssmrl.stored.default, (node,))
    node.replace_all_uses_with(stored, delete_user_cb=lambda user: user is not stored)


def check_compile(compile: Any) -> bool | Literal["trace"]:
    """Refuse what is not one of the three ways to run."""
    if not (compile is True or compile is False or compile == "trace"):
        raise ValueError(f'compile must be True, False or "trace"; got {compile!r}.')
    result: bool | Literal["trace"] = compile
    return result
