"""Ledgers of checkpoints, looked at from outside: what `disttrain ckpt audit` finds."""

from collections import Counter
from typing import Any

from disttrain.checkpoint.inspection import Entry
from disttrain.data.ledger import Account, Order, audit
from disttrain.errors import LedgerError


def audited(entry: Entry, key: bytes) -> dict[str, Any] | None:
    """Return what the ledger of a checkpoint says, None where that is not of a training.

    Args:
        entry: the checkpoint.
        key: of ledgers; empty: none.
    """
    values = entry.manifest.values if entry.manifest else None
    training = values.get("training") if isinstance(values, dict) else None
    if not isinstance(training, dict):
        return None
    try:
        account = _account(training, key)
    except LedgerError as error:
        return {"name": entry.name, "in_order": False, "words": str(error)}
    return {
        "name": entry.name,
        "in_order": True,
        "words": _words(account, training["samples"]),
        "epochs": [account.epochs.start, account.epochs.stop],
        "begun": account.begun,
        "world_sizes": list(account.world_sizes),
    }


def _account(training: dict[str, Any], key: bytes) -> Account:
    try:
        order = Order(**{name: training[name] for name in ("samples", "batch_size", "shuffle", "seed")})
        epoch, step = int(training["epoch"]), int(training["step"])
        end = (epoch + 1, 0) if step == order.steps else (epoch, step)
        ledger = training["ledger"]
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise LedgerError(f"the state of the training lacks what an audit needs: {error!r}") from error
    return audit(order, ledger, end, key)


def _words(account: Account, samples: int) -> str:
    epochs = account.epochs
    text = "no epoch is complete"
    if len(epochs):
        which = f"epoch {epochs[0]}" if len(epochs) == 1 else f"epochs {epochs[0]} to {epochs[-1]}"
        text = f"each of {samples} samples exactly once in {which}"
    if account.begun:
        text += f", {account.begun} samples of epoch {epochs.stop}, none twice"
    workers = Counter(account.world_sizes)
    parts = ", ".join(f"{count} on {size} worker{'s' * (size > 1)}" for size, count in sorted(workers.items()))
    return f"{text}; uninterrupted parts: {parts}"
