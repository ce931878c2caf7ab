"""A real Slurm of two nodes on this machine: munged, slurmctld, two slurmd, in one folder, on ports of their own.

Any user can run it. Nothing of the machine's own Slurm or munge is read, used or changed: key, sockets, state and logs
lie in the folder.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT, child_environment

# Debian puts the daemons where a user's PATH does not look.
PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin"))
NEEDED = ("munged", "munge", "slurmctld", "slurmd", "sinfo", "squeue", "srun", "sbatch", "scontrol", "scancel")
START_SECONDS = 90
JOB_SECONDS = 240
STOP_SECONDS = 60
GOING_ON = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")

# The first node bears the machine's own name, so that rank 0 is found under its node's name as on a cluster.
# cred_expire: a requeued job waits until its credential has expired, two minutes by default.
# FirstJobId: rank 0's port follows from the job's number, and two clusters may share this machine (pytest -n 2).
# sched_interval: the scheduler looks once a minute by default, and a requeued job waits for it.
# SlurmdTimeout: a node is given up after this many seconds without an answer, five minutes by default.
# config_overrides: a node has the CPUs that are written here, on a machine of one core too.
CONFIGURATION = """
ClusterName=megapints
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
FirstJobId={ports[0]}00
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
MpiDefault=none
KillWait=5
SlurmdTimeout=6
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=500
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=500
PartitionName=debug Nodes={nodes[0]},{nodes[1]} Default=YES MaxTime=INFINITE State=UP
"""

# Arguments: the nodes. Runs the daemons in the foreground until its input ends: when the fixture closes it, and also
# when the process of the tests is dead, however it died. Jobs go first: left alone, their tasks outlive the daemons.
# A node that it reads is one whose daemon is to be started again.
DAEMONS = """
exec >log/bash.out 2>&1
munged --foreground --force --socket="$PWD/munge.socket" --key-file="$PWD/munge.key" --seed-file="$PWD/munge.seed" \
    --pid-file="$PWD/munged.pid" --log-file="$PWD/log/munged.log" >log/munged.out 2>&1 &
munged=$!
for _ in {1..100}; do
    if munge --no-input --output=/dev/null --socket="$PWD/munge.socket" 2>log/munge.out; then break; fi
    sleep 0.1
done
slurmctld -D >log/slurmctld.out 2>&1 &
daemons=($!)
start() { # start NODE
    slurmd -D -N "$1" >>"log/slurmd-$1.out" 2>&1 &
    daemons+=($!)
}
for node; do start "$node"; done
while read -r node; do start "$node"; done

for _ in {1..40}; do
    [ -n "$(squeue --noheader)" ] || break
    scancel --user="$(id -u)"
    sleep 0.5
done
stop() { # stop PID...: end these children, at the latest after ten seconds
    kill "$@"
    for _ in {1..100}; do
        kill -0 "$@" || break
        sleep 0.1
    done
    kill -KILL "$@"
    wait "$@"
}
stop "${daemons[@]}"
stop $munged
"""


@dataclass(frozen=True)
class Job:
    """A batch job that ended."""

    state: str
    exit_code: str
    """EXIT:SIGNAL, as Slurm writes it."""
    restarts: int
    log: str


@dataclass(frozen=True)
class Slurm:
    """A running cluster, and how to use it."""

    folder: Path
    nodes: tuple[str, str]
    environment: dict[str, str]
    """Of every command that speaks to this cluster, and so of its jobs."""
    daemons: subprocess.Popen[bytes] | None = None

    def run(self, *command: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run srun, sbatch or another of Slurm's commands to its end."""
        return subprocess.run(
            command, capture_output=True, text=True, timeout=280, cwd=cwd, env=self.environment | variables
        )

    def submit(self, *command: str, log: Path, **variables: str) -> Job:
        """Give sbatch this command line in the checkout, wait until the job has ended, and read its log."""
        return self.finish(self.start(*command, log=log, **variables), log=log)

    def start(self, *command: str, log: Path, **variables: str) -> str:
        """Give sbatch this command line in the checkout, and return the job's number."""
        submitted = self.run("sbatch", "--parsable", f"--output={log}", *command, **variables)
        assert submitted.returncode == 0, submitted.stderr
        return submitted.stdout.strip()

    def finish(self, number: str, *, log: Path) -> Job:
        """Wait until a job has ended for good, and read its log."""
        # `sbatch --wait` would look every ten seconds only.
        self.wait_until(lambda: self._job(number)["JobState"] not in GOING_ON, log=log)
        job = self._job(number)
        return Job(job["JobState"], job["ExitCode"], int(job["Restarts"]), log.read_text() if log.exists() else "")

    def wait_until(self, condition: Callable[[], bool], *, log: Path) -> None:
        """Wait for something that a job does."""
        deadline = time.monotonic() + JOB_SECONDS
        while not condition():
            said = log.read_text() if log.exists() else ""
            assert time.monotonic() < deadline, f"waited for {JOB_SECONDS} s\n{said}\n{self.logs()}"
            time.sleep(0.3)

    def _job(self, number: str) -> dict[str, str]:
        shown = self.run("scontrol", "--oneliner", "show", "job", number)
        assert shown.returncode == 0, shown.stderr
        return dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word)

    def wait_until_idle(self) -> None:
        """Wait until both nodes take jobs."""
        deadline = time.monotonic() + START_SECONDS
        while (answer := self.run("sinfo", "--noheader", "--states=idle", "--format=%D")).stdout.strip() != "2":
            if time.monotonic() > deadline:
                pytest.fail(f"Slurm did not start: sinfo answers {answer}\n{self.logs()}", pytrace=False)
            time.sleep(0.2)

    def kill_node(self, node: str) -> None:
        """End a node as a power cut does: its daemon, and all that runs on it."""
        daemon = int((self.folder / f"slurmd-{node}.pid").read_text())
        mine = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()
        running = list(_processes())
        tasks = [process for process in running if {mine, f"SLURMD_NODENAME={node}".encode()} <= process.variables]
        parents = {process.parent for process in tasks}
        steps = [process for process in running if process.pid in parents and process.name == "slurmstepd"]
        for pid in (daemon, *(process.pid for process in (*steps, *tasks))):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start_node(self, node: str) -> None:
        """Start the daemon of a node again."""
        assert self.daemons is not None and self.daemons.stdin is not None
        self.daemons.stdin.write(f"{node}\n".encode())
        self.daemons.stdin.flush()

    def state_of(self, node: str) -> str:
        """Ask how Slurm sees a node: idle, mixed, down, …; a mark such as * is left out."""
        shown = self.run("sinfo", "--noheader", f"--nodes={node}", "--format=%T").stdout
        return "".join(letter for letter in shown if letter.isalpha())

    def logs(self) -> str:
        """Show the end of what each daemon said."""
        texts = {path.name: path.read_text(errors="replace") for path in sorted(self.folder.glob("log/*"))}
        return "\n".join(f"--- {name}\n{text[-1500:]}" for name, text in texts.items())


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A Slurm of two nodes, idle at the start; it ends with the tests, and all its jobs with it."""
    missing = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
    if missing:
        pytest.skip(f"Slurm is not installed (no {', '.join(missing)}): apt-get install slurm-wlm munge")
    cluster = _configure(tmp_path_factory.mktemp("slurm"))
    daemons = subprocess.Popen(
        ["bash", "-c", DAEMONS, "daemons", *cluster.nodes],
        cwd=cluster.folder, env=cluster.environment, stdin=subprocess.PIPE,
        # Not in the terminal's group: Ctrl-C ends the tests, and the daemons then in their order.
        start_new_session=True,
    )  # fmt: skip
    try:
        cluster.wait_until_idle()
        yield replace(cluster, daemons=daemons)
    finally:
        assert daemons.stdin is not None
        daemons.stdin.close()
        daemons.wait(STOP_SECONDS)


def _configure(folder: Path) -> Slurm:
    """Write the configuration and a munge key into an empty folder."""
    for name in ("state", "spool", "log"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    host = socket.gethostname().partition(".")[0]
    nodes = (host, f"{host}-second")
    user = pwd.getpwuid(os.geteuid()).pw_name
    text = CONFIGURATION.format(host=host, nodes=nodes, ports=_free_ports(3), user=user, folder=folder)
    (folder / "slurm.conf").write_text(text.lstrip())
    environment = {**child_environment(), "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    if not _resolves(host):
        environment["MASTER_ADDR"] = "127.0.0.1"  # what slurm/README.md says for such a cluster
    return Slurm(folder, nodes, environment)


class Process(NamedTuple):
    """One that runs on this machine."""

    name: str
    pid: int
    parent: int
    variables: set[bytes]
    """NAME=VALUE of its environment."""


def _processes() -> Iterator[Process]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            status = dict(
                line.split(":\t", 1) for line in (folder / "status").read_text().splitlines() if ":\t" in line
            )
            variables = set((folder / "environ").read_bytes().split(b"\0"))
            yield Process(status["Name"], int(folder.name), int(status["PPid"]), variables)


def _free_ports(number: int) -> list[int]:
    """Find TCP ports that nobody listens on now, all different."""
    with contextlib.ExitStack() as held:
        listeners = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [listener.getsockname()[1] for listener in listeners]


def _resolves(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False
