"""What a step tells the host, packed on the device and unpacked on the host: one tensor, so that reading is one copy.

A row of the report is tokens (N), parents (N), path (D+1), accepted, bonus, committed, done, failed, ticket. Knows
nothing of how a step is run or when its report is read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .proposal import Proposal
from .state import DecodeState
from .trace import Event
from .verify import Verdict

_SCALARS = 6


def pack_report(state: DecodeState, proposal: Proposal, verdict: Verdict) -> Tensor:  # (B, 2N + D + 7)
    """The report of the step that has just written `verdict` to `state`."""
    scalars = [verdict.accepted, verdict.bonus, state.committed, state.done, state.failed, state.ticket]
    parents = proposal.tree.parents.expand_as(proposal.tokens)
    return torch.cat([proposal.tokens, parents, verdict.path, torch.stack(scalars, dim=1)], dim=1)


@dataclass(frozen=True, slots=True)
class RowReport:
    """One row of a step's report."""

    tokens: list[int]
    parents: list[int]
    path: list[int]
    accepted: int
    bonus: int
    committed: int
    done: bool
    failed: bool
    ticket: int

    def event(self, row: int, step: int, seconds: dict[str, float]) -> Event:
        nodes = self.path[1 : self.accepted + 1]
        event = Event(row, step, self.tokens, self.parents, nodes, self.bonus, seconds)
        event.keep(self.committed)
        return event


def unpack_report(report: Tensor, levels: int) -> list[RowReport]:
    """The rows of a report (B, 2N + D + 7) of a tree with D + 1 `levels`, root included."""
    nodes = (report.shape[1] - levels - _SCALARS) // 2
    return [_row(numbers, nodes, levels) for numbers in report.tolist()]


def _row(numbers: list[int], nodes: int, levels: int) -> RowReport:
    accepted, bonus, committed, done, failed, ticket = numbers[-_SCALARS:]
    return RowReport(
        tokens=numbers[:nodes],
        parents=numbers[nodes : 2 * nodes],
        path=numbers[2 * nodes : 2 * nodes + levels],
        accepted=accepted,
        bonus=bonus,
        committed=committed,
        done=bool(done),
        failed=bool(failed),
        ticket=ticket,
    )
