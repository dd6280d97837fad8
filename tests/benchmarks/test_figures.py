"""Figures from made-up values."""

import pytest

from benchmarks import tasks
from benchmarks.figures import quartiles, rows
from benchmarks.measure import Sample, drop_other_models
from benchmarks.show import gaps, table

STEP = tasks.get("step")


def sample(system, *values, workload="W1", workers=1, precision="float32", losses=(3.0, 1.0), samples=1):
    ready = {"precision": precision, "variant": "only", "losses": list(losses), "versions": {}, "samples": samples}
    return Sample(workload=workload, system=system, workers=workers, ready=ready, values=list(values))


def gap(system, workload="W1"):
    return Sample(workload=workload, system=system, gap="torch is not installed")


def by_system(samples):
    return {row["system"]: row for row in rows(STEP, samples)}


def test_median_and_quartiles_are_those_of_all_values_in_the_unit_of_the_task():
    assert quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)
    assert quartiles([2.0]) == (2.0, 2.0, 2.0)
    (row,) = rows(STEP, [sample("disttrain", 0.005, 0.001, 0.002, 0.004, 0.003)])
    assert (row["median"], row["spread"], row["unit"]) == (pytest.approx(3.0), pytest.approx(2.0), "ms")
    assert row["values"] == 5
    (row,) = rows(tasks.get("memory"), [sample("disttrain", 3 * 2**20)])
    assert (row["median"], row["unit"]) == (3.0, "MiB")


def test_ratios_are_to_the_best_peer_of_the_same_workload():
    found = by_system([sample("disttrain", 0.002), sample("jax", 0.004), sample("torch", 0.003)])
    assert {row["best_peer"] for row in found.values()} == {"torch"}
    ratios = {system: row["ratio_to_best_peer"] for system, row in found.items()}
    assert ratios == pytest.approx({"disttrain": 1.5, "jax": 0.75, "torch": 1.0})
    first, second, *_ = rows(
        STEP, [sample("disttrain", 0.002), sample("disttrain", 1.0, workload="W2"), sample("jax", 0.001)]
    )
    assert (first["best_peer"], second["best_peer"], second["ratio_to_best_peer"]) == ("jax", None, None)


def test_a_form_of_disttrain_is_no_peer_and_neither_is_one_of_less_precision():
    found = by_system(
        [
            sample("disttrain", 0.004),
            sample("disttrain:high", 0.001, precision="high"),
            sample("torch", 0.002),
            sample("torch_bf16", 0.0001, precision="bfloat16"),
        ]
    )
    assert {row["best_peer"] for row in found.values()} == {"torch"}
    assert found["disttrain:high"]["ratio_to_best_peer"] == pytest.approx(2.0)


def test_a_gap_has_the_keys_of_a_figure_and_no_figure():
    found = by_system([sample("disttrain", 0.002), gap("torch"), sample("jax", 0.002)])
    assert list(found["torch"]) == list(found["jax"])
    assert found["torch"]["gap"] == "torch is not installed"
    assert [found["torch"][key] for key in ("median", "spread", "ratio_to_best_peer")] == [None] * 3
    assert found["torch"]["best_peer"] == "jax"


def test_without_a_peer_there_is_no_ratio():
    found = by_system([sample("disttrain", 0.002), gap("torch")])
    assert found["disttrain"]["ratio_to_best_peer"] is None
    assert found["disttrain"]["best_peer"] is None


@pytest.mark.parametrize(("losses", "word"), [((3.1, 1.0), "first"), ((3.0, 2.0), "last")])
def test_a_system_with_other_losses_than_the_rest_is_a_failure(losses, word):
    samples = [sample("disttrain"), sample("jax"), sample("torch", losses=losses), gap("tensorflow")]
    drop_other_models(samples)
    assert [each.is_failure for each in samples] == [False, False, True, False]
    assert f"its {word} loss is" in samples[2].gap


def test_of_two_that_disagree_neither_is_believed():
    samples = [sample("disttrain"), sample("torch", losses=(3.1, 1.0))]
    drop_other_models(samples)
    assert [each.is_failure for each in samples] == [True, True]


def test_rounding_is_no_disagreement():
    samples = [sample("disttrain"), sample("torch", losses=(3.0001, 1.01))]
    drop_other_models(samples)
    assert [each.gap for each in samples] == ["", ""]


def test_several_workers_are_compared_with_one_of_the_same_system_by_samples_per_second():
    scaling = tasks.get("scaling")
    found = rows(
        scaling,
        [
            sample("disttrain", 0.010, samples=100),
            sample("disttrain", 0.0125, workers=2, samples=200),
            sample("torch", 0.020, workers=2, samples=200),
        ],
    )
    assert [row["workers"] for row in found] == [1, 2, 2]
    assert [row["samples_per_s"] for row in found] == pytest.approx([10_000, 16_000, 10_000])
    assert [row["ratio_to_one_worker"] for row in found] == [None, pytest.approx(1.6), None]
    assert [row["ratio_to_best_peer"] for row in found] == [None, pytest.approx(1.6), 1.0]


@pytest.mark.parametrize("name", tasks.names())
def test_a_row_has_what_the_table_of_its_task_shows(name):
    task = tasks.get(name)
    found = rows(task, [sample("disttrain", 0.002), gap("torch")])
    assert {*task.columns, task.ratio} <= set(found[0])
    assert list(found[0]) == list(found[1])
    shown = table(task, found)
    assert [list(column.cells)[1] for column in shown.columns][-1] == "-"
    assert [text.plain for text in gaps(found)] == ["gap: W1 torch: torch is not installed"]
