"""Some of the ranks of a job as a communicator: messages of the job's transport, with tags of the group's own."""

from collections.abc import Sequence
from typing import NoReturn

from disttrain.comm.base import GROUP_TAGS, Communicator
from disttrain.comm.pending import HostArray, Request


class GroupCommunicator(Communicator):
    """A rank of a group, over a transport whose tags have 64 bits; made by `Communicator.split`.

    Args:
        job: the communicator of all ranks.
        job_ranks: the ranks of the group, by their ranks in the job.
        number: of the group: no other one that has any of its ranks has the same.
    """

    def __init__(self, job: Communicator, job_ranks: Sequence[int], number: int) -> None:
        super().__init__(rank=job_ranks.index(job.rank), world_size=len(job_ranks), local_rank=0)
        self._job, self.job_ranks = job, job_ranks
        self._shift = number * GROUP_TAGS

    def _isend(self, array: HostArray, dest: int, tag: int) -> Request:
        return self._job._isend(array, self.job_ranks[dest], self._shift + tag)

    def _irecv(self, array: HostArray, source: int, tag: int, *, up_to: bool = False) -> Request:
        return self._job._irecv(array, self.job_ranks[source], self._shift + tag, up_to=up_to)

    def abort(self, exit_code: int) -> NoReturn:
        """End all ranks of the job, not of the group alone."""
        self._job.abort(exit_code)
