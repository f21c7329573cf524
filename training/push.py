"""The command `paceline push`: uploads the files of a drafter folder (`KEPT`), and no others, to the model hub."""

from pathlib import Path

from ..drafters.folder import PICKLES, read_folder
from ..spec.console import one_line, waiting

KEPT = ("*.safetensors", "acceptance.json", "config.json", "training.json", "prompts.sha256", "README.md")
KEPT += ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template.jinja")
KEPT += ("generation_config.json",)


def push(args) -> None:
    """Upload the drafter in a folder, with its model card.

    Raises ValueError for a folder that is no drafter, lacks a card or holds pickles, and where the hub refuses."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    folder = Path(args.folder)
    files = check(folder)
    if get_token() is None:
        raise ValueError("there is no access token for the model hub; run hf auth login, or set HF_TOKEN")
    api = HfApi()
    try:
        api.create_repo(args.hub_id, private=args.private, exist_ok=True, repo_type="model")
        # A glob alone would reach into folders, such as a trainer's.
        with waiting(f"uploading {len(files)} files"):
            api.upload_folder(
                repo_id=args.hub_id, folder_path=folder, allow_patterns=files, ignore_patterns=["*/*"],
                commit_message=f"Upload drafter {folder.name}",
            )  # fmt: skip
    except HFValidationError as error:
        raise ValueError(f"hub id {args.hub_id!r} is none ({error}); write it as owner/name") from error
    except HfHubHTTPError as error:
        detail = one_line(error)
        raise ValueError(f"the model hub refused {args.hub_id} ({detail}); check the token and the name") from error
    except Exception as error:  # whatever the hub's client raises where there is no network
        raise ValueError(
            f"the model hub cannot be reached ({type(error).__name__}: {error}); check the network"
        ) from error
    print(f"{len(files)} files of {folder} are at {args.hub_id}")


def check(folder: Path) -> list[str]:
    """The names of the files to upload. Raises ValueError for a folder that is not to be uploaded."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give a drafter folder")
    drafter = read_folder(folder)
    if drafter is None:
        raise ValueError(f"{folder} is no drafter folder: its config.json names no paceline_drafter; train one first")
    drafter.tensors()
    if pickles := sorted(file.name for file in folder.rglob("*") if file.suffix in PICKLES):
        raise ValueError(f"{folder} holds {pickles[0]}, a pickle, which can run code; remove it first")
    if not (folder / "README.md").is_file():
        raise ValueError(f"{folder} has no README.md; paceline evaluate writes the model card")
    return sorted({file.name for pattern in KEPT for file in folder.glob(pattern) if file.is_file()})
