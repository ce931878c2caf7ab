"""How the entry point ends."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT

REFUSED_WITH_THREADS = """
import threading, time
from pretrain_pints import leave
threading.Thread(target=time.sleep, args=(600,)).start()  # an interpreter's own end would wait for it
print("said", end="")
leave(2)
"""


def test_leave_with_threads_running_ends_at_once_with_the_code_and_what_was_said():
    done = subprocess.run(
        [sys.executable, "-c", REFUSED_WITH_THREADS], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "said", "")
