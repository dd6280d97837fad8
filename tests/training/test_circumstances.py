"""What bits depend on is written beside a checkpoint, and who goes on under other circumstances is told."""

import logging

import pytest
from threadpoolctl import threadpool_info

import disttrain as dt
from disttrain.training import fit
from disttrain.training.circumstances import circumstances, differences
from tests.training import worlds

pytestmark = pytest.mark.timeout(60)


def train(backup, epochs, **how):
    model = worlds.dense_net()
    x, y = worlds.blobs()
    worlds.alone(lambda comm: model.fit(x, y, epochs=epochs, verbose=0, callbacks=[backup], **how))


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_run_that_goes_on_as_it_was_says_nothing(tmp_path, caplog):
    for epochs in (1, 2):
        train(dt.callbacks.BackupAndRestore(tmp_path), epochs)
    assert warnings(caplog) == []


def test_one_warning_names_all_that_is_not_as_it_was(tmp_path, caplog, monkeypatch):
    train(dt.callbacks.BackupAndRestore(tmp_path), 1)
    here = circumstances()
    other = {**here, "NumPy": "0.1", "kernels": "others"}
    monkeypatch.setattr(fit, "circumstances", lambda: other)
    train(dt.callbacks.BackupAndRestore(tmp_path), 2)
    (text,) = warnings(caplog)
    assert f"NumPy was {here['NumPy']} and is 0.1, kernels was {here['kernels']} and is others" in text
    assert "not to the same bits" in text
    assert str(tmp_path) in text


def test_what_was_not_written_down_counts_as_other():
    here = circumstances()
    assert differences(here, here) == ""
    assert differences({}, {"BLAS": "x"}) == "BLAS was not written down and is x"


def test_blas_has_one_thread_in_a_reproducible_fit():
    seen = []

    class Look(dt.callbacks.Callback):
        def on_train_batch_end(self, batch, logs):
            seen.append({each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"})

    before = threadpool_info()
    train(Look(), 1, reproducible=True)
    assert seen == [{1}]
    assert threadpool_info() == before
