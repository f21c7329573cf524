"""The subject of a check: a model on a device, the executors to check, and the drafters made for it.

All parts share one object, which also passes measurements of earlier parts on to later ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..engines.executors import EXECUTORS, choose
from ..proposal import Drafter
from ..stream.budget import free_bytes
from ..target.weights import stored_bytes
from .budget import NotHere

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
COMPILED = ("compiled", "cuda_graph_compiled")  # executors that take tens of seconds to make a step


@dataclass(slots=True)
class Subject:
    """`make_drafter(kind, model)` makes a drafter that needs no training; `executors` are those to check, in order."""

    name: str
    model: "PreTrainedModel"
    executors: list[str]
    make_drafter: Callable[[str, "PreTrainedModel"], Drafter]
    bandwidth: float | None = None  # bytes a second, once probed
    compile_seconds: float | None = None  # of the last step that was compiled
    drafters: dict[str, Drafter] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def vocabulary(self) -> int:
        return self.model.config.get_text_config().vocab_size

    @property
    def layers(self) -> int:
        return self.model.config.get_text_config().num_hidden_layers

    @property
    def has_experts(self) -> bool:
        """Whether the model has mixture-of-experts layers, in which each token uses only some experts."""
        config = self.model.config.get_text_config()
        return any(getattr(config, name, None) for name in _EXPERTS)

    @property
    def free_bytes(self) -> int:
        return free_bytes(self.device)

    def why_not(self, executor: str) -> str | None:
        """Why `executor` cannot run here; None where it can."""
        try:
            choose(executor, self.model, 0, capturable=True, compiled_before=False)
        except ValueError as reason:
            return str(reason)
        return None

    @property
    def running(self) -> list[str]:
        """The executors that can run here."""
        return [name for name in self.executors if self.why_not(name) is None]

    def drafter(self, kind: str) -> Drafter:
        """The drafter of a kind, made on first use. Raises NotHere where memory is too small for it."""
        if kind not in self.drafters:
            weights = stored_bytes(self.model)
            if kind == "draft model" and 1.1 * weights > self.free_bytes:
                raise NotHere(
                    f"a copy of the target to draft with takes {weights / 1e9:.1f} GB and "
                    f"{self.free_bytes / 1e9:.1f} GB are free"
                )
            self.drafters[kind] = self.make_drafter(kind, self.model)
        return self.drafters[kind]

    def expected_compile(self) -> float:
        """Expected seconds of compiling a step: as for the last one; before the first, 10 and 2.5 per layer."""
        return self.compile_seconds or 10.0 + 2.5 * self.layers


def all_executors(names: str) -> list[str]:
    """The executors that `--executors` names, in the order in which they are checked: cheap ones first."""
    known = sorted(EXECUTORS, key=lambda name: name in COMPILED)
    if names == "all":
        return known
    asked = [name.strip() for name in names.split(",")]
    for name in asked:
        if name not in known:
            raise ValueError(f"--executors {names!r} has {name!r}, which is none; choose of {', '.join(known)}, or all")
    return list(dict.fromkeys(asked))
