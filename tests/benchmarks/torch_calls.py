"""Calls of torch that compute or copy something, counted with their bytes while a piece of code runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TorchCalls(TorchDispatchMode):
    """count: calls but for views and conversions to the dtype that a tensor has.

    bytes: of the tensors that they read and write; of a table whose rows are looked up or replaced, these rows.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation for it
        self.count = 0
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = function(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        name = str(function).split(".")[1]
        held = {tensor.untyped_storage().data_ptr() for tensor in given}
        view = bool(made) and all(tensor.untyped_storage().data_ptr() in held for tensor in made)
        if name != "detach_" and (name.endswith("_") or not view):
            self.count += 1
            rows = {"index_select": made, "embedding": made, "index_copy_": given[-1:]}.get(name)
            self.bytes += sum(tensor.nbytes for tensor in (rows * 2 if rows else (*given, *made)))
        return result
