"""The tables of `paceline plan` and `paceline profile`. Knows nothing of how the numbers were made."""

from collections.abc import Sequence

from ..console import table
from ..plan.calibration import Calibrated
from ..plan.curves import Curves
from ..plan.trees import Plan, Rates
from ..proposal import Drafter
from ..tree import DynamicShape, TreeShape


def show_target(measured: Curves) -> None:
    plain = measured.target[1]
    rows = [[str(n), f"{seconds * 1e3:.1f}", f"{seconds / plain:.2f}"] for n, seconds in measured.target.items()]
    print(table(["nodes", "step ms", "of plain"], rows))


def show_draft(name: str, measured: Curves, number: int) -> None:
    """The seconds of drafting by drafter `number`: by width too, where it grows dynamic trees."""
    plain = measured.target[1]
    grown = measured.grown[number] if measured.grown else {}
    for width, costs in grown.items() if len(grown) > 1 else [(1, measured.drafts[number])]:
        rows = [[str(depth), f"{seconds * 1e3:.1f}", f"{seconds / plain:.2f}"] for depth, seconds in costs.items()]
        title = f"{name}, trees of width {width}" if len(grown) > 1 else name
        print(f"\n{title}\n" + table(["draft levels", "ms", "of plain"], rows))


def show_plan(names: list[str], rates: list[Rates], measured: Curves, planned: Plan, by_nodes: Sequence[Plan]) -> None:
    show_target(measured)
    for number, name in enumerate(names):
        show_draft(name, measured, number)
        if number < len(rates):
            _show_rates(rates[number])
    if by_nodes:
        _show_by_nodes(by_nodes)
    shape = planned.shape
    tree = f"parents {list(shape.parents)}" if isinstance(shape, TreeShape) else f"--tree {shape.text}"
    print(
        f"\n{len(shape)} nodes, depth {shape.max_depth}: {planned.tokens_per_step:.2f} tokens per step expected, "
        f"{planned.speedup:.2f} times plain decoding\n{tree}"
    )


def _show_rates(rates: Rates) -> None:
    width = max((len(row) for row in rates), default=0)
    rows = [[str(depth + 1), *(f"{p:.3f}" for p in row), *[""] * (width - len(row))] for depth, row in enumerate(rates)]
    print("\n" + table(["p: depth", *(f"rank {rank}" for rank in range(width))], rows))


def _show_by_nodes(plans: Sequence[Plan]) -> None:
    """The best dynamic tree of each size."""
    rows = []
    for plan in plans:
        assert isinstance(plan.shape, DynamicShape), "others are planned from p"
        rows.append(
            [
                str(plan.shape.nodes), str(plan.shape.max_depth), str(plan.shape.width),
                f"{plan.tokens_per_step:.2f}", f"{plan.seconds_per_step * 1e3:.0f}", f"{plan.speedup:.2f}",
            ]
        )  # fmt: skip
    print("\n" + table(["nodes", "depth", "width", "tokens per step", "step ms", "of plain"], rows))


def show_weights(drafter: Drafter, own: tuple[Calibrated, Curves], dense: tuple[Calibrated, Curves]) -> None:
    """What the weights of the first drafter, which has some, cost in acceptance and save in time, on the same texts."""
    rows = []
    for name, (found, measured) in ((drafter.name, own), ("with weights in 16 bits", dense)):
        level = max(measured.drafts[0])
        first = found.first_guess
        rows.append(
            [
                name, "-" if first is None else f"{first:.3f}", f"{found.plan.tokens_per_step:.2f}",
                f"{measured.drafts[0][level] / level * 1e3:.2f}", f"{found.plan.speedup:.2f}",
            ]
        )  # fmt: skip
    print("\n" + table(["drafter", "p of its first guess", "tokens per step", "ms a level", "of plain"], rows))
