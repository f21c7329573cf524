"""Embeddings that stay on the disk: a forward reads the rows of its tokens.

The module that looks tokens up is not changed: it is given a table of just the rows that are asked for. Knows nothing
of models.
"""

import copy
import os
import weakref
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .layout import Stored, torch_dtype
from .reader import OpenFile
from .record import StreamError, Uncopied

_KEPT = "row_file"  # the attribute of a module that looks its rows up in a file


class RowFile(Uncopied):
    """A matrix (N, K) in a file of `size` bytes."""

    def __init__(self, path: Path, size: int, stored: Stored):
        self.path, self.stored = path, stored
        self.file = OpenFile(path, size, direct=False)
        weakref.finalize(self, self.file.close)

    def rows(self, ids: Tensor) -> Tensor:  # (n,) -> (n, K)
        """Some rows, on the device of `ids`. Raises IndexError for rows that there are not, and StreamError where they
        cannot be read, or the file has changed."""
        (count, width), dtype = self.stored.shape, torch_dtype(self.stored.dtype)
        if len(ids) and not 0 <= ids.min() <= ids.max() < count:
            raise IndexError(f"index out of range: tokens are numbers from 0 to {count - 1}")
        self.file.check()
        made, size = torch.empty(len(ids), width, dtype=dtype), width * dtype.itemsize
        view = memoryview(made.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        for index, row in enumerate(ids.tolist()):
            self._read(view[index * size : (index + 1) * size], self.stored.start + row * size)
        return made.to(ids.device)

    def _read(self, into: memoryview, start: int) -> None:
        try:
            count = os.preadv(self.file.descriptor, [into], start)
        except OSError as error:
            raise StreamError(f"{self.path} cannot be read ({error.strerror or error}); check the disk") from error
        if count != len(into):
            raise self.file.changed()


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
