"""What a result of training was made with: the versions of everything that may change it."""

from importlib.metadata import version

from ..spec import provenance


def versions() -> dict[str, str | None]:
    return {**provenance.versions(), "accelerate": version("accelerate"), "git_commit": provenance.git_commit()}
