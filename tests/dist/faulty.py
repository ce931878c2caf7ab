"""Train with planted faults: `python faulty.py FAULTS CONFIG …`, the rest as for pretrain_pints.py.

FAULTS is a JSON object; each fault belongs to samples, so that it is met whenever they are trained on:
    nan       [k, …]  the loss of an iteration that holds one of these samples is NaN
    inf       [k, …]  its gradient overflows, and its loss is as it should be
    spike     [k, …]  its loss is three times what it should be
    die       "before record" or "after record": the run ends as if killed, at the first bad iteration that is recorded
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pretrain_pints  # noqa: E402


def plant(faults: dict[str, Any], *, wrap: Callable[..., None] = setattr, end: Callable[[], Any] | None = None) -> None:
    """Wrap what the faults are planted in.

    Args:
        faults: as described above.
        wrap: sets an attribute of an object, or of a class.
        end: what "die" does.
    """
    import torch

    from megatron_ext.data.loader import Loader
    from megatron_ext.parallel import groups
    from megatron_ext.training import step
    from megatron_ext.training.bad_iterations import BadIterations

    now = range(0)
    begin, loss_function, record = Loader.iteration, step._masked_loss, BadIterations.record

    def iteration(self, first, *, global_batch_size, limit=None):
        nonlocal now
        now = range(first, first + global_batch_size) if limit is None else range(0)  # not in a validation
        return begin(self, first, global_batch_size=global_batch_size, limit=limit)

    def masked_loss(loss_mask, token_losses):
        def has(fault):
            return any(k in now for k in faults.get(fault, ()))

        loss_sum, num_tokens, store = loss_function(loss_mask, token_losses)
        if has("nan") or has("spike"):
            factor = torch.nan if has("nan") else 3.0
            loss_sum = loss_sum * factor
            store["loss"][0] *= factor
        if has("inf"):
            loss_sum = loss_sum * 1e38 * 1e38
        return loss_sum, num_tokens, store

    def record_and_die(self, *args, **kwargs):
        if faults["die"] == "after record":
            record(self, *args, **kwargs)
        groups.any_rank(False)  # none ends before all have come here
        end() if end is not None else os._exit(9)

    wrap(Loader, "iteration", iteration)
    wrap(step, "_masked_loss", masked_loss)
    if "die" in faults:
        wrap(BadIterations, "record", record_and_die)


if __name__ == "__main__":
    plant(json.loads(sys.argv.pop(1)))
    sys.exit(pretrain_pints.main())
