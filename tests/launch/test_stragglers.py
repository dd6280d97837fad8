"""Stragglers, on records made up: which rank is named, for what, how soon, how often; and who is left alone."""

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.progress import Phase, Record, Spent
from launch.stragglers import FIRST_STEPS, LOST, QUIET, WINDOWS, Part, Stragglers, judge
from launch.watch import LOOK_S

MS = 1_000_000
KINDS = ["data", "compute", "callbacks", "network"]
USUAL = Spent(data=2 * MS, compute=15 * MS, callbacks=1 * MS, network=2 * MS)
SOON = max(WINDOWS) + FIRST_STEPS + 1  # steps, where each takes as long as a look


class Job:
    """Ranks that take steps together; what each spends on its part of one is made up, and the clock is."""

    def __init__(self, ranks=3, samples=None):
        self.stragglers = Stragglers()
        self.records = {
            rank: Record(
                rank=rank, world_size=ranks, pid=rank, host="h", run=1, step=None, phase=Phase.FORWARD, number=0,
                call=(0, "", "float32", 0), peer=None, is_waiting=False, waits=0,
            )
            for rank in range(ranks)
        }  # fmt: skip
        self.samples = samples or dict.fromkeys(range(ranks), 8)
        self.said = []
        self._now_s = self._looked_s = 0.0

    def step(self, parts, shared=0):
        """Have all take a step: `parts` by rank, where it is not USUAL, and `shared` nanoseconds of communication."""
        parts = {rank: parts.get(rank, USUAL) for rank in self.records}
        longest = max(map(sum, parts.values())) + shared
        for rank, record in self.records.items():
            spent = parts[rank]._replace(waiting=longest - sum(parts[rank]))
            self.records[rank] = dataclasses.replace(
                record,
                step=0 if record.step is None else record.step + 1,
                samples=record.samples + self.samples[rank],
                spent=Spent(*map(sum, zip(record.spent, spent, strict=True))),
            )
        self._now_s += longest / 1e9
        if self._now_s >= self._looked_s + LOOK_S:
            self._looked_s = self._now_s
            self.look()

    def look(self):
        self.said += self.stragglers.look(self.records)

    def named(self):
        """Return, and forget, whom it has named, and for what."""
        said = [(each.rank, each.kind) for each in self.said]
        self.said.clear()
        return said

    def train(self, steps, parts=None, shared=0):
        for _ in range(steps):
            self.step(parts or {}, shared)


def slower(kind, times):
    """Return the part of a rank that takes so many times as long as USUAL, all of it for `kind`."""
    return USUAL._replace(**{kind: getattr(USUAL, kind) + round((times - 1) * sum(USUAL))})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_rank_ten_times_slower_is_named_within_twenty_steps(kind, ranks):
    job = Job(ranks)
    job.train(50)
    assert job.named() == []
    slow = {1: slower(kind, 12)}
    job.train(20, slow)
    assert job.named() == [(1, kind)]
    job.train(500, slow)
    assert job.named() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_slow_from_the_beginning_is_named_as_soon(kind):
    job = Job()
    job.train(20, {1: slower(kind, 12)})
    assert job.named() == [(1, kind)]


@settings(deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    times=st.floats(1.8, 100),
    ranks=st.integers(2, 9),
    who=st.integers(1, 8),
    size=st.floats(0.01, 100),
    seed=st.integers(0, 99),
)
def test_whoever_is_slow_is_named_for_what_it_is_and_nobody_else(kind, times, ranks, who, size, seed):
    noise, job = random.Random(seed), Job(ranks)
    who %= ranks
    if who == 0 and kind == "callbacks":
        who = 1

    def part(rank):
        made = slower(kind, times) if rank == who else USUAL
        return Spent(*(round(size * ns * noise.uniform(0.95, 1.05)) for ns in made))

    while not job.said:
        job.step({rank: part(rank) for rank in range(ranks)})
        # by the word: so many slices of a look, or of a step where that takes longer
        limit = max(SOON, (max(WINDOWS) + FIRST_STEPS + 1) * (LOOK_S * 1e9 / (size * times * sum(USUAL)) + 2))
        assert job.records[0].step <= limit
    assert job.named() == [(who, kind)]
    job.train(100, {who: part(who)}) if size == 1 else None
    assert job.named() == []


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_where_all_are_slow_now_and_then_nobody_is(ranks, seed):
    """As where ranks share cores: what a step costs each of them varies by a factor of twenty."""
    noise, job = random.Random(seed), Job(ranks)
    for _ in range(5_000):
        times = [noise.lognormvariate(0, 0.75) for _ in range(ranks)]
        job.step({rank: Spent(*(round(ns * times[rank] / 4) for ns in USUAL)) for rank in range(ranks)})
    assert job.named() == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step_ms", [1, 20, 500])
def test_a_pause_is_no_slowness(kind, step_ms):
    job = Job()
    usual = Spent(*(ns * step_ms // 20 for ns in USUAL))
    everyone = dict.fromkeys(range(3), usual)
    long = usual._replace(**{kind: 3000 * MS})
    for _ in range(5):
        job.train(max(SOON, 8000 // step_ms), everyone)
        job.step({**everyone, 1: long})
    assert job.named() == []


def test_the_first_steps_of_a_fit_may_take_long_on_one_rank():
    job = Job(2)
    for run in (1, 2, 3):
        job.records = {rank: dataclasses.replace(record, run=run) for rank, record in job.records.items()}
        job.look()
        job.train(4, {1: slower("compute", 1000)})  # that at which it is first looked at, and three
        job.train(50)
    assert job.named() == []


def test_rank_0_writes_for_all_in_its_callbacks():
    job = Job()
    job.train(200, {0: slower("callbacks", 10)})
    assert job.named() == []
    job.train(200, dict.fromkeys(range(3), slower("callbacks", 10)))
    assert job.named() == []
    job.train(200, {0: slower("compute", 10)})
    assert job.named() == [(0, "compute")]


def test_more_samples_take_longer():
    two = slower("compute", 2)
    job = Job(3, samples={0: 16, 1: 8, 2: 8})
    job.train(200, {0: two})
    assert job.named() == []
    job = Job(3)
    job.train(200, {0: two})
    assert job.named() == [(0, "compute")]


def test_a_rank_without_samples_is_compared_with_nobody():
    job = Job(2, samples={0: 1, 1: 0})
    job.train(200, {0: slower("compute", 10)})
    assert job.named() == []
    job.train(200, {1: slower("compute", 10)})
    assert job.named() == [(1, "compute")]


@pytest.mark.parametrize(("lost", "named"), [(LOST - 0.02, []), (LOST + 0.02, [(1, "compute")])])
def test_what_costs_a_step_little_is_not_worth_a_word(lost, named):
    job, slow = Job(2), slower("compute", 4)
    more = sum(slow) - sum(USUAL)
    job.train(100, {1: slow}, shared=round(more / lost) - sum(slow))
    assert job.named() == named


@pytest.mark.parametrize(("times", "named"), [(1.4, []), (1.6, [(2, "data")])])
def test_half_as_long_again_is_slow(times, named):
    job = Job()
    job.train(500, {2: slower("data", times)})
    assert job.named() == named


def test_most_of_them_cannot_be_slow():
    job = Job(4)
    job.train(500, {rank: slower("compute", 10) for rank in (0, 1, 2)})
    assert job.named() == []
    job.train(500, {rank: slower("compute", 10) for rank in (0, 3)})
    assert sorted(job.named()) == [(0, "compute"), (3, "compute")]


def test_it_is_said_again_when_it_changes_and_when_it_comes_back():
    job = Job()
    job.train(200, {1: slower("data", 10)})
    assert job.named() == [(1, "data")]
    job.train(200, {1: slower("compute", 10)})
    assert job.named() == [(1, "compute")]
    job.train(200, {2: slower("compute", 10)})
    assert job.named() == [(2, "compute")]
    job.train(QUIET // 2 * 10)  # ten of these steps are a slice
    job.train(100, {2: slower("compute", 10)})
    assert job.named() == []  # soon after
    job.train(QUIET * 20)
    job.train(100, {2: slower("compute", 10)})
    assert job.named() == [(2, "compute")]


def test_a_rank_that_is_slow_in_all_that_it_does_is_named_once():
    job = Job()
    for data, compute in [(60, 40), (40, 60)] * 5:
        job.train(200, {1: USUAL._replace(data=USUAL.data + data * MS, compute=USUAL.compute + compute * MS)})
    assert job.named() == [(1, "data")]


def test_a_rank_that_computes_slowly_is_not_named_for_those_that_cannot_send_to_it():
    job = Job(3)
    blocked = USUAL._replace(network=USUAL.network + round(9 * sum(USUAL)))
    job.train(200, {1: slower("compute", 10), 0: blocked})
    assert job.named() == [(1, "compute")]


def test_survivors_go_on_without_the_lost_rank():
    job = Job(4)
    job.train(50)
    gone = job.records.pop(3)
    job.records = {
        rank: dataclasses.replace(each, world_size=3, step=each.step - 1) for rank, each in job.records.items()
    }
    job.look()
    step = job.step

    def with_the_lost(parts, shared=0):
        step(parts, shared)
        job.said += job.stragglers.look({**job.records, 3: gone})

    job.step = with_the_lost
    job.train(200, {2: slower("compute", 10)})
    assert job.named() == [(2, "compute")]


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    parts=st.lists(
        st.builds(
            Part,
            samples=st.floats(0, 1e6),
            spent=st.tuples(*[st.sampled_from([0.0, 1.0, 1e6, 1e9]) | st.floats(0, 1e12)] * len(Spent._fields)),
        ),
        min_size=2,
        max_size=6,
    ),
    kinds=st.sampled_from([3, 4]),
)
def test_whatever_ranks_have_noted_is_judged(parts, kinds):
    """And who is named for a kind has spent more on it than at least half of the others."""
    for rank in range(len(parts)):
        found = judge(dict(enumerate(parts)), rank, 1.5, kinds)
        if found is not None:
            place = Spent._fields.index(found.kind)
            mine, *others = (part.spent[place] for part in [parts[rank], *parts[:rank], *parts[rank + 1 :]])
            assert sum(mine > each for each in others) >= len(others) / 2
            assert 0 < found.share <= 1
            assert found.part_s > found.usual_s


def test_a_rank_that_is_slow_in_nothing_of_all_is_not_named():
    spent = [(8e6, 8e6, 0.0), (9e6, 0.0, 0.0), (0.0, 9e6, 0.0), (9e6, 9e6, 0.0)]
    parts = {rank: Part(samples=8, spent=(*each, 0.0, 0.0)) for rank, each in enumerate(spent)}
    assert judge(parts, 0, 1.5, 3) is None


def test_one_rank_alone_is_not_slow():
    job = Job(1)
    job.train(200)
    assert job.named() == []


def test_it_says_who_where_how_much_in_what_and_what_to_try():
    job = Job(4)
    job.train(100, {2: USUAL._replace(data=42 * MS)})
    (slow,) = job.said
    said = slow.words(job.records[2])
    assert said.startswith(
        "disttrain: rank 2 of 4 is slow, on host h, pid 2, at step 99: its part of a step takes 3.2 "
    )
    assert (
        "58 ms instead of 18 ms, 100% of the difference in data; they wait for it, and training goes on\nTry: " in said
    )
