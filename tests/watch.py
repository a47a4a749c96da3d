"""What a piece of work asks of torch's dispatcher."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """Every operator that runs, with its arguments, by its name: ``{"aten::add.Tensor": [(x, y), …], …}``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.setdefault(func.name(), []).append(args)
        return func(*args, **(kwargs or {}))
