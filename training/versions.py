"""The versions of all software that a training result depends on."""

from importlib.metadata import version

from ..spec import provenance


def versions() -> dict[str, str | None]:
    return {**provenance.versions(), "accelerate": version("accelerate"), "git_commit": provenance.git_commit()}
