"""A real Slurm of two nodes on this machine: munged, slurmctld, two slurmd, in one folder, on ports of their own.

Nothing of the machine's own Slurm or munge is read, used or changed: key, sockets, state and logs lie in the folder.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import ROOT, child_environment

# Debian puts the daemons where a user's PATH does not look.
_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin"))
_NEEDED = ("munged", "slurmctld", "slurmd", "sinfo", "squeue", "srun", "sbatch", "scontrol", "scancel")
_START_SECONDS = 90
_JOB_SECONDS = 240
_STOP_SECONDS = 20

# cred_expire: a requeued job waits until its credential has expired, two minutes by default.
# config_overrides: a node has the CPUs that are written here, on a machine of one core too.
# RealMemory is what a node must have at least; nothing enforces it with these plugins.
_CONF = """
ClusterName=megapints
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
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
ReturnToService=2
MpiDefault=none
KillWait=5
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=500
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=500
PartitionName=debug Nodes={nodes[0]},{nodes[1]} Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Job:
    """A batch job that ended."""

    state: str
    exit_code: str
    """EXIT:SIGNAL, as Slurm writes it."""
    log: str


@dataclass
class Slurm:
    """A running cluster, and how to use it."""

    folder: Path
    nodes: tuple[str, str]
    environment: dict[str, str]
    """Of every command that shall speak to this cluster, and so of its jobs."""
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, *command: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run srun, sbatch or another of Slurm's commands to its end."""
        return subprocess.run(
            command, capture_output=True, text=True, timeout=280, cwd=cwd, env=self.environment | variables
        )

    def submit(self, *command: str, log: Path, cwd: Path = ROOT, **variables: str) -> Job:
        """Give sbatch this command line, wait until the job has ended, and read its log.

        (`sbatch --wait` looks every ten seconds only.)
        """
        submitted = self.run("sbatch", "--parsable", f"--output={log}", *command, cwd=cwd, **variables)
        assert submitted.returncode == 0, submitted.stderr
        job = submitted.stdout.strip()
        deadline = time.monotonic() + _JOB_SECONDS
        while time.monotonic() < deadline:
            words = self.run("scontrol", "--oneliner", "show", "job", job).stdout.split()
            values = dict(word.split("=", 1) for word in words if "=" in word)
            if values.get("JobState", "PENDING") not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
                return Job(values["JobState"], values["ExitCode"], log.read_text())
            time.sleep(0.3)
        pytest.fail(f"job {job} is {values} after {_JOB_SECONDS} s\n{self.logs()}", pytrace=False)

    def start(self, *command: str) -> None:
        """Start a daemon in the foreground, with its messages in the log folder.

        It is told to end if this process dies before it could do so.
        """
        log = self.folder / "log" / f"daemon-{len(self.daemons)}-{command[0]}.log"
        with log.open("wb") as stream:
            self.daemons.append(
                subprocess.Popen(
                    ["setpriv", "--pdeathsig", "TERM", *command],
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    env=self.environment,
                    cwd=self.folder,
                    # Not in the terminal's group: Ctrl-C ends the tests, and these then in their order.
                    start_new_session=True,
                )  # fmt: skip
            )

    def wait(self, *command: str, answer: str) -> None:
        """Wait until a command gives this answer."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            done = self.run(*command)
            if done.returncode == 0 and done.stdout.strip() == answer:
                return
            ended = [daemon.args for daemon in self.daemons if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                pytest.fail(
                    f"Slurm did not start: {' '.join(command)} answers {done.stdout + done.stderr!r}; "
                    f"daemons that ended: {ended}\n{self.logs()}",
                    pytrace=False,
                )
            time.sleep(0.2)

    def stop(self) -> None:
        """End the jobs, then the daemons, whatever state they are in."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._end_jobs()
        # The last started first: munged is needed by the others to the end.
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _end_jobs(self) -> None:
        """Cancel what is left, and wait until its tasks are gone: they outlive the slurmd that started them."""
        deadline = time.monotonic() + _STOP_SECONDS
        while self.run("squeue", "--noheader").stdout.strip() and time.monotonic() < deadline:
            self.run("scancel", "--user", _user())
            time.sleep(0.5)

    def logs(self) -> str:
        """Show the end of each daemon's log."""
        texts = {path.name: path.read_text(errors="replace") for path in sorted(self.folder.glob("log/*.log"))}
        return "\n".join(f"--- {name}\n{text[-1500:]}" for name, text in texts.items())


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A Slurm of two nodes, idle at the start; it ends with the tests, and all its jobs with it."""
    missing = [name for name in _NEEDED if shutil.which(name, path=_PATH) is None]
    if missing:
        pytest.skip(f"Slurm is not installed (no {', '.join(missing)}): apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    cluster = _configure(folder)
    try:
        cluster.start(
            "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key",
            f"--pid-file={folder}/munged.pid", f"--log-file={folder}/log/munged.log", f"--seed-file={folder}/seed",
        )  # fmt: skip
        cluster.wait("munge", "--no-input", "--output=/dev/null", f"--socket={folder}/munge.socket", answer="")
        cluster.start("slurmctld", "-D")
        for node in cluster.nodes:
            cluster.start("slurmd", "-D", "-N", node)
        cluster.wait("sinfo", "--noheader", "--states=idle", "--format=%D", answer="2")
        yield cluster
    finally:
        cluster.stop()


def _configure(folder: Path) -> Slurm:
    """Write the configuration and a munge key into an empty folder."""
    for name in ("state", "spool", "log"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    # The first node bears the machine's name, so that rank 0 is found under it as on a cluster.
    host = socket.gethostname().partition(".")[0]
    nodes = (host, f"{host}-second")
    ports = _free_ports(3)
    conf = folder / "slurm.conf"
    conf.write_text(_CONF.format(host=host, nodes=nodes, ports=ports, user=_user(), folder=folder).lstrip())
    environment = {**child_environment(), "PATH": _PATH, "SLURM_CONF": str(conf)}
    if not _resolves(host):
        environment["MASTER_ADDR"] = "127.0.0.1"  # what slurm/README.md says for such a cluster
    return Slurm(folder, nodes, environment)


def _user() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name


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
