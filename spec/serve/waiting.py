"""The jobs that wait for a lane: tenants take turns, and the jobs of one go in the order in which they came."""

from collections import deque
from collections.abc import Iterator

from .job import Job


class Waiting:
    """Queues of jobs, one for each tenant; the first tenant is the next to be served."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Job]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Job]:
        return (job for queue in self._queues.values() for job in queue)

    def add(self, job: Job, first: bool = False) -> None:
        """Put a job behind its tenant's others, or before them."""
        queue = self._queues.setdefault(job.asked.tenant, deque())
        queue.appendleft(job) if first else queue.append(job)

    def remove(self, job: Job) -> None:
        queue = self._queues[job.asked.tenant]
        queue.remove(job)
        if not queue:
            del self._queues[job.asked.tenant]

    def take(self, most: int) -> list[Job]:
        """The next job, with up to `most` - 1 of its tenant whose prompts are about as long, to be read with it."""
        if not self._queues:
            return []
        tenant, queue = next(iter(self._queues.items()))
        first = queue.popleft()
        alike = [first, *(job for job in queue if _alike(first, job))][:most]
        rest = deque(job for job in queue if job not in alike)
        del self._queues[tenant]
        if rest:
            self._queues[tenant] = rest  # behind the others
        return alike


def _alike(first: Job, job: Job) -> bool:
    """Whether reading the two together needs little padding."""
    shorter, longer = sorted(len(each.request.tokens) for each in (first, job))
    return longer <= 1.25 * shorter + 8
