"""`disttrain bench allreduce`: its columns, and a run of it."""

import json

import click
import pytest

from benchmarks import allreduce
from launch.bench import _bytes

ROW = {"size": 4096, "count": 1024, "type": "float", "redop": "sum", "time_us": 2.0, "algbw": 2.048, "busbw": 3.072}


def test_the_columns_are_those_of_nccl_tests():
    rows = [
        {"method": "disttrain", "wrong": 0, "ratio": 1.0, **ROW},
        {"method": "x", "wrong": None, "ratio": 9.5, **ROW},
    ]
    assert allreduce.in_words(rows, ["gap: y: not installed"], 4).splitlines()[1:] == [
        "# method     size       count   type  redop  time   algbw   busbw  #wrong  ratio",
        "#             (B)  (elements)                (us)  (GB/s)  (GB/s)               ",
        "  disttrain  4096        1024  float    sum  2.00    2.05    3.07       0   1.00",
        "  x          4096        1024  float    sum  2.00    2.05    3.07     N/A   9.50",
        "gap: y: not installed",
    ]


@pytest.mark.parametrize(("text", "size"), [("4K", 4096), (" 1m", 1 << 20), ("100M", 100 << 20), ("12", 12)])
def test_sizes_are_bytes_with_or_without_a_unit(text, size):
    assert _bytes(text) == size


@pytest.mark.parametrize("text", ["", "K", "5", "0", "-4K", "4G", "1.5M"])
def test_what_is_no_size_of_an_array_is_refused(text):
    with pytest.raises(click.BadParameter, match="4096, 4K or 1M"):
        _bytes(text)


@pytest.mark.usefixtures("mpi")
def test_a_run_keeps_a_row_for_each_size_and_method_and_nothing_is_wrong(program):
    done = program.run("bench", "allreduce", "--rounds", "1", "--sizes", "4K,1M", "--json", "found.json")
    assert done.exit_code == 0, done.err
    found = json.loads((program.folder / "found.json").read_text())
    ours = [row for row in found["rows"] if row["method"] == "disttrain"]
    assert [row["size"] for row in ours] == [4096, 1 << 20]
    for row in found["rows"]:
        assert row["wrong"] == (None if row["method"] in allreduce.NO_SUMS else 0)
        assert row["busbw"] == pytest.approx(row["algbw"]) == pytest.approx(row["size"] / row["time_us"] / 1e3)
    assert {"MPI_Allreduce", "disttrain over MPI", "disttrain over TCP", *allreduce.NO_SUMS} < {
        row["method"] for row in found["rows"]
    }
    assert f"{len(found['rows']) + 3 + len(found['gaps'])}" == f"{len(done.out.splitlines())}"
