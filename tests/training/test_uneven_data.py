"""Data of any length on any number of ranks are the training of one rank; a rank whose data fail ends all."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import disttrain as dt
from disttrain.comm import threads
from disttrain.data import Batches
from disttrain.errors import CommError
from tests.training import worlds

pytestmark = pytest.mark.timeout(900)

CASES = [12, pytest.param(500, marks=pytest.mark.long)]
LENGTHS = {
    "samples": st.integers(1, 40),
    "batch_size": st.integers(1, 20),
    "world_size": st.integers(2, 5),
    "shards": st.integers(1, 6),
}
SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def train(samples, batch_size, reproducible):
    """Return what a rank ends with: the digest of its model, and the losses."""
    x, y = worlds.blobs(samples)
    model = worlds.dense_net("adam", ["accuracy"], dropout=0.2)
    history = model.fit(
        x, y, batch_size, 2, validation_data=(x[:3], y[:3]), verbose=0, reproducible=reproducible
    )  # fmt: skip
    return dt.state_digest(model), history.history


def checked(examples, claim, **more):
    settings(max_examples=examples, **SETTINGS)(given(**LENGTHS, **more)(claim))()


@pytest.mark.parametrize("examples", CASES)
def test_any_lengths_train_as_one_rank_to_the_bit(examples):
    """Ranks without a sample, in the last batch or in all, are among them: there are more ranks than samples."""

    def claim(samples, batch_size, world_size, shards):
        one = worlds.alone(lambda comm: train(samples, batch_size, shards))
        assert threads.run(world_size, lambda comm: train(samples, batch_size, shards)) == [one] * world_size

    checked(examples, claim)


class DataError(Exception):
    """What a rank's data raise."""


@pytest.mark.parametrize("examples", CASES)
def test_data_that_fail_on_one_rank_end_all(monkeypatch, examples):
    """At any item, of training or validation; in `threads.run`, as in a job, the first error is what is raised."""
    batch, state = Batches.batch, {}

    def failing(self, epoch, step):
        if self.rank == state["rank"]:
            state["left"] -= 1
            if state["left"] == 0:
                raise DataError
        return batch(self, epoch, step)

    monkeypatch.setattr(Batches, "batch", failing)

    def claim(samples, batch_size, world_size, shards, place):
        items = 2 * (-(-samples // batch_size) + -(-min(3, samples) // batch_size))
        state.update(rank=place % world_size, left=1 + place % items)
        reproducible = shards if place % 2 else False
        ended = []

        def work(comm):
            try:
                train(samples, batch_size, reproducible)
            except (DataError, CommError) as error:
                ended.append(type(error))
                raise

        with pytest.raises(DataError):
            threads.run(world_size, work)
        assert sorted(each.__name__ for each in ended) == ["CommError"] * (world_size - 1) + ["DataError"]

    checked(examples, claim, place=st.integers(0, 10**6))


@pytest.mark.parametrize("examples", CASES)
def test_ranks_that_hold_other_numbers_of_samples_are_told(examples):
    def claim(samples, batch_size, world_size, shards, odd, more):
        def work(comm):
            train(samples + (more if comm.rank == odd % world_size else 0), batch_size, shards)

        found = worlds.errors(world_size, work)
        assert None not in found, found
        assert len({str(each) for each in found}) == 1, found

    checked(examples, claim, odd=st.integers(0, 4), more=st.integers(1, 20))
