"""Paceline: lossless speculative decoding for Hugging Face causal language models.

The public names load on first use, so that importing the package is instant and
`paceline --help` does not wait for torch.
"""

from importlib import import_module

_PUBLIC = {
    "generate": ".spec.generate",
    **dict.fromkeys(("patch", "unpatch"), ".spec.patch"),
    "generate_many": ".spec.serve.many",
    "TextRequest": ".spec.serve.text_request",
    "load_target": ".spec.target.load",
    "load_drafter": ".drafters",
    "export_drafter": ".drafters.formats.export",
    "PromptCache": ".spec.engines.reuse",
    "TreeShape": ".spec.tree",
    "Trace": ".spec.trace",
}

__all__ = list(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
