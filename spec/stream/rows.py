"""Embeddings that stay on the disk: a forward reads the rows of its tokens.

The module that looks tokens up is not changed: it is given a table of just the rows that are asked for. Knows nothing
of models.
"""

import copy
import os
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .layout import Stored, torch_dtype
from .record import StreamError, Uncopied

_KEPT = "row_file"  # the attribute of a module that looks its rows up in a file


class RowFile(Uncopied):
    """A matrix (N, K) in a file."""

    def __init__(self, path: Path, stored: Stored):
        self.path, self.stored = path, stored
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise StreamError(f"{path} cannot be opened ({error.strerror or error}); load the model again") from error

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def rows(self, ids: Tensor) -> Tensor:  # (n,) -> (n, K)
        """Some rows, on the device of `ids`. Raises StreamError where they cannot be read."""
        width, dtype = self.stored.shape[1], torch_dtype(self.stored.dtype)
        made, size = torch.empty(len(ids), width, dtype=dtype), width * dtype.itemsize
        view = memoryview(made.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        for index, row in enumerate(ids.tolist()):
            self._read(view[index * size : (index + 1) * size], self.stored.start + row * size)
        return made.to(ids.device)

    def _read(self, into: memoryview, start: int) -> None:
        try:
            count = os.preadv(self.descriptor, [into], start)
        except OSError as error:
            raise StreamError(f"{self.path} cannot be read ({error.strerror or error}); check the disk") from error
        if count != len(into):
            raise StreamError(f"{self.path} is shorter than it was; delete {self.path.parent}, and it is made anew")


def look_up(embeddings: nn.Embedding, file: RowFile) -> None:
    """Let a module, of which only the shape of its weight is known, look its rows up in a file."""

    setattr(embeddings, _KEPT, file)
    embeddings.forward = partial(_looked_up, embeddings)  # type: ignore[method-assign]


def _looked_up(embeddings: nn.Embedding, ids: Tensor) -> Tensor:
    asked, index = torch.unique(ids, return_inverse=True)
    part = copy.copy(embeddings)  # the same module, but for its weight
    part._parameters, part.padding_idx = {"weight": getattr(embeddings, _KEPT).rows(asked)}, None
    return type(embeddings).forward(part, index)


def row_file(module: nn.Module | None) -> RowFile | None:
    """The file that a module looks its rows up in; None for embeddings in memory."""
    return None if module is None else vars(module).get(_KEPT)
