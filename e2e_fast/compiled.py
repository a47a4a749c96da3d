"""torch.compile of a language model's blocks, and the proof that it is active.

Blocks are compiled one by one, whole or not at all (``fullgraph``): a graph break is an error. Blocks of one kind share
their graphs, so a model of 12 layers compiles as often as one of 2. The first batch shape has static graphs, one with
and one without gradients for each kind of block. All other shapes (a last smaller batch, evaluation) share graphs of
dynamic size, so that they neither add up nor slow the first one down; there torch.compile also tells apart streams that
are views, sequence lengths once they vary, and batches of one sequence.

torch.compile runs eagerly, without a word, where it is switched off. So the compiled graphs count their own runs, and a
block that ran without its graph raises.

>>> blocks = CompiledBlocks([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)], "aot_eager")
>>> with torch.no_grad():
...     y = blocks(1, blocks(0, torch.ones(2, 4)))
>>> blocks.graphs, blocks.runs
(1, 2)
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

RECOMPILE_LIMIT = 64
"""Graphs of one function that torch.compile may keep; its own default, 8, is too few for layers of several kinds."""


class CompiledBlocks:
    """Blocks behind torch.compile with a backend ("inductor", or "aot_eager" for tests)."""

    backend: str
    graphs: int
    """Compiled so far."""
    runs: int
    """Calls of a compiled graph."""

    def __init__(self, blocks: Iterable[nn.Module], backend: str = "inductor") -> None:
        blocks = list(blocks)
        self.backend = backend
        self.graphs = self.runs = 0
        self._first: torch.Size | None = None
        # Two backends of our own, so that torch.compile keeps two sets of graphs.
        static, dynamic = self._counted(), self._counted()
        self._static: list[Any] = [torch.compile(b, backend=static, fullgraph=True, dynamic=False) for b in blocks]
        self._dynamic: list[Any] = [torch.compile(b, backend=dynamic, fullgraph=True) for b in blocks]

    def __call__(self, layer: int, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The output of a block. Raises RuntimeError where torch.compile did not run its graph."""
        if self._first is None:
            self._first = x.shape
        block = (self._static if x.shape == self._first else self._dynamic)[layer]
        before = self.runs
        config = torch._dynamo.config
        usual, config.recompile_limit = config.recompile_limit, RECOMPILE_LIMIT
        try:
            output = block(x, *args, **kwargs)
        finally:
            config.recompile_limit = usual
        if self.runs != before + 1:
            raise RuntimeError(
                f"compile: block {layer} ran without its compiled graph. Is torch.compile switched off "
                "(TORCHDYNAMO_DISABLE, torch.compiler.set_stance, a TorchDispatchMode around the pass)?"
            )
        return output

    def _counted(self) -> Callable[[Any, list[Any]], Callable[..., Any]]:
        compiler = torch._dynamo.lookup_backend(self.backend)

        def compile_graph(module: Any, inputs: list[Any]) -> Callable[..., Any]:
            graph = compiler(module, inputs)
            self.graphs += 1

            def run(*arguments: Any) -> Any:
                self.runs += 1
                return graph(*arguments)

            return run

        return compile_graph
