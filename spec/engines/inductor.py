"""How torch's compiler is used: one graph without guards, kept on disk, with the rounding of eager code.

Knows nothing of what is compiled.
"""

import os
import threading
import types
from collections.abc import Callable
from typing import Any

import torch

from ..files import cache_folder
from ..kernels.merge import MergeLinears


def compiled(function: Callable[[], Any]) -> Callable[[], Any]:
    """`function`, to be compiled when it is first called. Its buffers, shapes and modules never change, so there is
    nothing to guard against."""
    return torch.compile(
        _with_its_own_code(function),
        fullgraph=True,
        dynamic=False,
        options={
            "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
            "size_asserts": False,  # a few hundred checks a step
            # Round where eager code does, however kernels are fused, so that all tree sizes give the same numbers.
            "emulate_precision_casts": True,
            "post_grad_custom_pre_pass": MergeLinears(),
            # Else the sum over a row's numbers is shared by threads where there is a single row, and only there.
            "cpp.min_chunk_size": 1 << 14,
        },
    )


def _with_its_own_code(function: Callable[[], Any]) -> Callable[[], Any]:
    """The same function with a code object of its own: torch finds what it has compiled by the code object, and with
    no guards would take the step of another engine."""
    return types.FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)


def prepare() -> None:
    """Let torch keep compiled code in our cache folder, for later processes, if it can be written; and let it try out
    the C++ compiler (seconds, where the folder is new) while the step is traced."""
    folder = cache_folder() / "inductor"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        pass  # torch then uses a temporary folder
    else:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        # Torch names its own folder there when it is imported: one that is gone when the machine starts again.
        if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, os.path.abspath(default_cache_dir())):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    threading.Thread(target=_try_compiler, daemon=True).start()


def _try_compiler() -> None:
    """Torch keeps the result; whatever fails here fails again, with its reason, where it matters."""
    try:
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        pick_vec_isa()
    except Exception:
        pass
