"""pretrain_pints.py on a rank whose files may not grow: FULL_DISK_RANK FULL_DISK_AFTER (saves) of the environment.

Saves before that one succeed; from it on, no file of that rank may have more than 4 kB, as on a full disk.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pretrain_pints
from megatron_ext.checkpoint import save_load

saves = 0
write = save_load.Writing


def limited(*args, **kwargs):
    global saves
    saves += 1
    if os.environ["RANK"] == os.environ["FULL_DISK_RANK"] and saves > int(os.environ["FULL_DISK_AFTER"]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return write(*args, **kwargs)


save_load.Writing = limited

if __name__ == "__main__" and (code := pretrain_pints.main()):
    pretrain_pints.leave(code)
