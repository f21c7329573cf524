"""`export_drafter` and the command `paceline export`: a drafter in the form that an inference engine reads.

Each kind of drafter has a module that says what is written and what an engine cannot run. What was written is read
again.
"""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...spec.cli.commands import load_model
from ...spec.files import check_absent, new_folder
from ...spec.target.load import NAMED
from ..folder import read_folder
from ..kinds import KINDS
from ..shipped import shipped_folder
from .engines import Advice, advise, engine_named
from .export_draft_lm import draft_lm_export
from .export_eagle import eagle_export
from .export_heads import heads_export
from .export_order import Export, Order, weights_read

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Exported:
    """What was written: `serve` is the command that starts the engine with it, with `tokens` draft tokens; `notes` say
    how that number was found, what an engine does not run, and what is lost there."""

    folder: Path
    serve: str
    tokens: int
    notes: tuple[str, ...]


def export_drafter(
    drafter: str | Path,
    target: "PreTrainedModel",
    to: str,
    folder: str | Path,
    tokenizer: Any = None,
    target_name: str | None = None,
) -> Exported:
    """Write a trained drafter to a new `folder` in the form that an engine reads.

    `drafter` is a drafter folder, a hub id, or the name of one that ships; `target` the model that it is for, and
    `tokenizer` the target's, which is written beside a draft model. `to` is "vllm", "sglang", "speculators" (a folder
    that vLLM serves by itself), "transformers" or, for Medusa heads, "tgi". `target_name` is the target's hub id or
    folder, as the engine will find it (default: the name that the model was loaded by).

    What was written is read again, and its logits are compared. Raises ValueError, in one sentence, for what the engine
    cannot run, for a folder that is there already, and where the drafter cannot be loaded or does not fit the target.
    """
    from ...spec.arguments import check_model

    engine = engine_named(to)
    check_absent(folder)
    target, name = check_model(target, "target"), str(drafter)
    if name in KINDS and not KINDS[name].weights:
        raise ValueError(f"drafter {name!r} has no weights to export; engines have prompt lookup of their own")
    if name == "auto" or ("+" in name and not Path(name).exists()):
        raise ValueError(f"drafter {name!r} is not one drafter; name one with weights, by its folder or hub id")
    source = str(shipped_folder(name) or name)
    found = None if source in NAMED else read_folder(source)
    known_as = target_name or str(getattr(target.config, "_name_or_path", "") or "TARGET")
    order = Order(name, source, found, target, known_as, tokenizer, engine)
    export = _export(order)
    share = export.weights / weights_read(target)
    advice = advise(None if found is None else found.rates(), share, export.deepest)
    notes = (*export.notes, advice.why, order.engine.lost)
    with new_folder(folder) as work:
        export.write(work, advice.tokens)
        serve = _command(order, export, Path(folder).name, advice)
        (work / "README.md").write_text(_readme(order, serve, notes), encoding="utf-8")
        for file in work.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # engines often run as another user
        export.check(work)
    return Exported(Path(folder), _command(order, export, str(folder), advice), advice.tokens, notes)


def _export(order: Order) -> Export:
    """Raises ValueError for what has no form for this engine."""
    from .. import load_drafter

    if order.folder is not None and order.folder.kind == "draft_lm":
        return draft_lm_export(order)
    drafter: Any = load_drafter(order.source, order.target)
    if drafter.traits.kind == "eagle":
        return eagle_export(order, drafter.network)
    if drafter.traits.kind == "medusa":
        return heads_export(order, drafter.heads)
    if drafter.traits.kind == "draft_lm":
        raise ValueError(f"{order.name} is an ordinary model, which engines load as it is; give it to them")
    raise ValueError(f"{order.name} is of a kind that {order.engine.title} does not run; decode it with Paceline")


def _command(order: Order, export: Export, folder: str, advice: Advice) -> str:
    return order.engine.command(order.engine.methods[export.method], order.target_name, folder, advice.tokens)


def _readme(order: Order, serve: str, notes: tuple[str, ...]) -> str:
    lines = "\n".join(f"* {note}" for note in notes)
    return f"""# {Path(order.name).name} for {order.engine.title}

A drafter for {order.target_name}, exported by Paceline.

    {serve}

{lines}
"""


def export(args: Namespace) -> None:
    """The command `paceline export`."""
    engine_named(args.to)
    check_absent(args.output)
    model, tokenizer = load_model(args)
    name = NAMED[args.model].hub_id if args.model in NAMED else str(args.model)
    done = export_drafter(args.drafter, model, args.to, args.output, tokenizer, name)
    print(f"{args.drafter} is in {done.folder}, and gives the same logits when read again. Start it with\n")
    print(f"    {done.serve}\n")
    for note in done.notes:
        print(f"* {note}")
