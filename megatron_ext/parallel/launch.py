"""Which rank this process is: asked of torchrun, srun, mpiexec, or nobody. The only door to `os.environ`.

Nothing here imports torch, so that the ranks are known, and the environment set, before torch starts.

Precedence, because launchers nest: torchrun is often started by srun, and mpiexec within a Slurm
allocation starts its daemons as a Slurm step, so that their children see SLURM_PROCID as well:
torchrun > Open MPI > Hydra (MPICH, Intel MPI) and PALS > srun > a bare process.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_ext.errors import LaunchError

# Slurm numbers a job's own steps from 0; the batch script, an interactive shell and the external step
# carry ids above this (SLURM_MAX_NORMAL_STEP_ID of slurm/slurm.h) and have no tasks of ours.
_LAST_STEP_ID = 0xFFFFFFF0
# Ports for rendezvous: above most services that clusters run, below Linux's ephemeral range (32768).
_FIRST_PORT, _NUM_PORTS = 12000, 20000
_LOOPBACK = "127.0.0.1"
# What a run on CUDA needs to repeat itself bit for bit: sums between ranks in the order of a ring (a tree may differ
# from job to job), cuBLAS with fixed workspaces, Transformer Engine's attention without atomics, kernels of
# torch.compile chosen without timing them. The first three are what megatron/training/determinism.py (2026) asks for.
_DETERMINISTIC = {
    "NCCL_ALGO": "Ring",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "TORCHINDUCTOR_DETERMINISTIC": "1",
}
_RECORDED = re.compile(
    r"(CUDA|NCCL|NVTE|TORCH(?:INDUCTOR)?|PYTORCH|OMP|MKL|GLOO|UCX|OMPI_COMM_WORLD|PMI|SLURM|WANDB|HF|MASTER|NVIDIA|CUBLAS)_"
    r"|(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|TOKENIZERS_PARALLELISM)\Z"
)
_SECRET = re.compile(r"KEY|TOKEN(?!IZERS)|SECRET|PASS|CREDENTIAL|AUTH|COOKIE", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One process among those of a run."""

    rank: int
    world_size: int
    local_rank: int
    """Rank among the processes of this node."""
    local_world_size: int
    """Processes on this node."""
    master_addr: str
    """Where rank 0 listens. Empty: still to be agreed (`find_launch` does)."""
    master_port: int
    """Port that rank 0 listens on. 0: still to be chosen."""
    launcher: Literal["torchrun", "srun", "mpiexec", "bare"]


class Job(NamedTuple):
    """What the scheduler's job says of itself to the ranks in it."""

    end_time: float | None = None
    """When the scheduler will end it, in seconds since 1970; None: it has no limit, or nobody says."""
    record: Path | None = None
    """Where its batch script reads how the run ended; None: nobody asks."""
    number: str | None = None
    """Slurm's; None: there is no job."""
    restarts: int = 0
    """How often Slurm has started it again."""
    previous_end: str = ""
    """How its former start ended, as far as its batch script could see."""


def find_job() -> Job:
    """Read what Slurm or `slurm/pretrain.sbatch` say of the job; an empty one outside of Slurm."""
    end_time, record = os.environ.get("SLURM_JOB_END_TIME", ""), os.environ.get("MEGAPINTS_JOB_RECORD")
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")
    return Job(
        end_time=float(end_time) if end_time.isdigit() else None,
        record=Path(record) if record else None,
        number=os.environ.get("SLURM_JOB_ID"),
        restarts=int(restarts) if restarts.isdigit() else 0,
        previous_end=os.environ.get("MEGAPINTS_PREVIOUS_END", ""),
    )


def find_launch() -> Launch:
    """Find this process's place in its run. Every rank calls it, once.

    Under mpiexec the ranks agree on an address and a port through mpi4py, and leave MPI again: a second
    call in one process would fail there.

    Raises:
        LaunchError: the launcher's variables are half set or contradict each other, or mpi4py is missing or
            belongs to another MPI than the mpiexec used.
    """
    launch = read_launch()
    if launch.master_addr and launch.master_port:
        return launch
    if launch.world_size == 1:
        return replace(launch, master_addr=_LOOPBACK, master_port=launch.master_port or free_port())
    return _agree_over_mpi(launch)


def launched() -> Launch | None:
    """Say what a launcher told this process, before the ranks have agreed on anything; None without a launcher.

    Raises:
        LaunchError: the launcher's variables are half set.
    """
    launch = read_launch(os.environ)
    return None if launch.launcher == "bare" else launch


def read_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """Read the place of a process from environment variables, by default its own.

    Opens no socket and enters no MPI, so it may be called at any time and repeatedly; address and port may be
    left open (see `Launch`).

    Raises:
        LaunchError: the variables of a launcher are half set, or contradict each other.
    """
    environment = os.environ if environment is None else environment
    if any(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return _checked(_read_torchrun(environment))
    if "OMPI_COMM_WORLD_RANK" in environment or "OMPI_COMM_WORLD_SIZE" in environment:
        return _checked(_read_open_mpi(environment))
    hydra = "MPI_LOCALRANKID" in environment or "PMI_LOCAL_RANK" in environment
    if hydra or ("PMI_RANK" in environment and not _is_slurm_step(environment)):
        return _checked(_read_pmi(environment))
    if _is_slurm_step(environment):
        return _checked(_read_srun(environment))
    if environment.get("SLURM_PROCID", "0") != "0":
        # A container or sudo passed on some of Slurm's variables only. Taken for a bare process, each task
        # would train a model of its own into the same directory.
        raise LaunchError(
            f"environment: srun's variables are half set: SLURM_PROCID is {environment['SLURM_PROCID']}, but "
            "SLURM_STEP_ID is missing; pass all SLURM_* variables into the container, or unset this one"
        )
    return _alone(port=0)


def single_process() -> Launch:
    """A run of this process alone, whatever a launcher says."""
    return _alone(port=free_port())


def _alone(*, port: int) -> Launch:
    return Launch(
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        master_addr=_LOOPBACK,
        master_port=port,
        launcher="bare",
    )


def _read_torchrun(environment: Mapping[str, str]) -> Launch:
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    _require(environment, needed, "torchrun")
    return Launch(
        rank=_integer(environment, "RANK"),
        world_size=_integer(environment, "WORLD_SIZE"),
        local_rank=_integer(environment, "LOCAL_RANK"),
        local_world_size=_integer(environment, "LOCAL_WORLD_SIZE"),
        master_addr=environment["MASTER_ADDR"],
        master_port=_given_port(environment),
        launcher="torchrun",
    )


def _read_open_mpi(environment: Mapping[str, str]) -> Launch:
    names = tuple(f"OMPI_COMM_WORLD_{part}" for part in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    _require(environment, names, "Open MPI's mpiexec")
    return _mpi_launch(environment, names)


def _read_pmi(environment: Mapping[str, str]) -> Launch:
    """Hydra (MPICH, Intel MPI) names the node-local rank in one way, PALS in another."""
    local = ("PMI_LOCAL_RANK", "PMI_LOCAL_SIZE")
    if "PMI_LOCAL_RANK" not in environment:
        local = ("MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    names = ("PMI_RANK", "PMI_SIZE", *local)
    _require(environment, names, "mpiexec (PMI)")
    return _mpi_launch(environment, names)


def _mpi_launch(environment: Mapping[str, str], names: tuple[str, ...]) -> Launch:
    rank, world_size, local_rank, local_world_size = (_integer(environment, name) for name in names)
    addr, port = environment.get("MASTER_ADDR", ""), _given_port(environment)
    if bool(addr) != bool(port) and world_size > 1:
        # One of the two alone would be dropped in silence for what the ranks agree on.
        raise LaunchError(
            "environment: MASTER_ADDR and MASTER_PORT must be set together under mpiexec, or neither "
            f"(the ranks then agree by themselves); {'MASTER_PORT' if addr else 'MASTER_ADDR'} is missing"
        )
    return Launch(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_addr=addr,
        master_port=port,
        launcher="mpiexec",
    )


def _is_slurm_step(environment: Mapping[str, str]) -> bool:
    """Say whether srun started this process as a task.

    An sbatch script and an salloc shell have SLURM_JOB_ID and SLURM_NTASKS too, and the script even
    SLURM_PROCID=0 (seen with 22.05), but no step id, or one of those above the ordinary ones.
    """
    step = environment.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < _LAST_STEP_ID


def _read_srun(environment: Mapping[str, str]) -> Launch:
    needed = (
        "SLURM_JOB_ID",
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_NODEID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_STEP_NODELIST",
    )
    _require(environment, needed, "srun")
    nodes = expand_nodelist(environment["SLURM_STEP_NODELIST"])
    tasks_per_node = expand_tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    node = _integer(environment, "SLURM_NODEID")
    if node >= len(tasks_per_node):
        raise LaunchError(
            f"environment: SLURM_NODEID ({node}) must be below the number of nodes in "
            f"SLURM_STEP_TASKS_PER_NODE ({environment['SLURM_STEP_TASKS_PER_NODE']!r}); start it with srun"
        )
    job, step = _integer(environment, "SLURM_JOB_ID"), _integer(environment, "SLURM_STEP_ID")
    # Rank 0 runs on the step's first node. A name need not resolve where all tasks share one node.
    addr = environment.get("MASTER_ADDR") or (nodes[0] if len(nodes) > 1 else _LOOPBACK)
    return Launch(
        rank=_integer(environment, "SLURM_PROCID"),
        world_size=_integer(environment, "SLURM_STEP_NUM_TASKS"),
        local_rank=_integer(environment, "SLURM_LOCALID"),
        local_world_size=tasks_per_node[node],
        master_addr=addr,
        master_port=_given_port(environment) or slurm_port(job, step),
        launcher="srun",
    )


def slurm_port(job_id: int, step_id: int) -> int:
    """Choose a port that all tasks of a Slurm step derive alike, neighbouring jobs and steps differently."""
    # 101 is coprime to the range: jobs with neighbouring ids, on one node, stay 101 ports (steps) apart.
    return _FIRST_PORT + (job_id * 101 + step_id) % _NUM_PORTS


def expand_nodelist(nodelist: str) -> list[str]:
    """Write out Slurm's compressed node list: `n[01-02,07],gpu` is n01, n02, n07, gpu.

    Raises:
        LaunchError: the text is not a node list.
    """
    if not re.fullmatch(r"(?:[\w.-]|\[[\d,-]+\])+(?:,(?:[\w.-]|\[[\d,-]+\])+)*", nodelist):
        raise LaunchError(f"environment: node list {nodelist!r} is not of the form n[01-04,07],m1")
    names: list[str] = []
    for entry in re.split(r",(?![^\[]*\])", nodelist):
        pieces = [
            list(_expand_ranges(piece[1:-1], nodelist)) if piece.startswith("[") else [piece]
            for piece in re.findall(r"\[[^\]]*\]|[^\[\]]+", entry)
        ]
        names.extend("".join(combination) for combination in itertools.product(*pieces))
    return names


def _expand_ranges(ranges: str, nodelist: str) -> Iterable[str]:
    """Numbers of `01-04,07`, with the width of the first."""
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise LaunchError(f"environment: node list {nodelist!r}: {part!r} is no number or rising range")
        first, last = match[1], match[2] or match[1]
        for number in range(int(first), int(last) + 1):
            yield str(number).zfill(len(first))


def expand_tasks_per_node(counts: str) -> list[int]:
    """Write out Slurm's tasks per node: `4(x2),3` is 4, 4, 3.

    Raises:
        LaunchError: the text is not of that form.
    """
    tasks: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise LaunchError(f"environment: tasks per node {counts!r} is not of the form 4(x2),3")
        tasks.extend([int(match[1])] * int(match[2] or 1))
    return tasks


def _require(environment: Mapping[str, str], names: Iterable[str], launcher: str) -> None:
    names = tuple(names)
    missing = [name for name in names if not environment.get(name)]
    if missing:
        present = [name for name in names if name not in missing]
        raise LaunchError(
            f"environment: {launcher}'s variables are half set: {', '.join(present) or 'none of them'} "
            f"{'is' if len(present) == 1 else 'are'} there, {', '.join(missing)} missing; "
            "start with torchrun, srun or mpiexec, or unset the former for a single process"
        )


def _integer(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not text.isascii() or not text.isdigit():
        raise LaunchError(f"environment: {name} ({text!r}) must be a number, 0 or more; set or unset it")
    return int(text)


def _given_port(environment: Mapping[str, str]) -> int:
    """MASTER_PORT, or 0 where it is not set."""
    if not environment.get("MASTER_PORT"):
        return 0
    port = _integer(environment, "MASTER_PORT")
    if not 0 < port < 65536:
        raise LaunchError(f"environment: MASTER_PORT ({port}) must be between 1 and 65535")
    return port


def _checked(launch: Launch) -> Launch:
    if not launch.rank < launch.world_size:
        raise LaunchError(
            f"environment: rank ({launch.rank}, from {launch.launcher}) must be below the world size "
            f"({launch.world_size}); start all ranks with one command"
        )
    if not launch.local_rank < launch.local_world_size <= launch.world_size:
        raise LaunchError(
            f"environment: local rank ({launch.local_rank}, from {launch.launcher}) must be below the local "
            f"world size ({launch.local_world_size}), and that at most the world size ({launch.world_size}); "
            "start all ranks with one command"
        )
    return launch


def free_port() -> int:
    """Choose a TCP port that nobody listens on now, below those that the system gives to outgoing connections.

    One of those would be taken by somebody's connection now and then before rank 0 listens on it.

    Raises:
        LaunchError: none was found.
    """
    for port in random.SystemRandom().sample(range(_FIRST_PORT, _FIRST_PORT + _NUM_PORTS), 100):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            return port
    raise LaunchError(
        f"no free port between {_FIRST_PORT} and {_FIRST_PORT + _NUM_PORTS - 1} was found in 100 attempts; "
        "set MASTER_PORT"
    )


def _agree_over_mpi(launch: Launch) -> Launch:
    """Take rank 0's address and a free port of its node, through one MPI broadcast, and leave MPI."""
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
        from mpi4py import MPI

        MPI.Init()
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"mpiexec started this process, but mpi4py does not load ({error}); install it "
            "(it is in requirements.txt), pass MASTER_ADDR and MASTER_PORT on to the ranks (mpiexec -x), or "
            "start with torchrun"
        ) from None
    try:
        world = MPI.COMM_WORLD
        if world.size != launch.world_size:
            raise LaunchError(
                f"mpiexec says {launch.world_size} processes, mpi4py's library sees {world.size}: they "
                "belong to different MPIs; use the mpiexec that lies beside this Python, or torchrun"
            )
        one_node = launch.local_world_size == launch.world_size
        offer = (_LOOPBACK if one_node else socket.gethostname(), free_port()) if launch.rank == 0 else None
        addr, port = world.bcast(offer, root=0)
    finally:
        # The run's traffic goes over NCCL or gloo; an MPI left open would hold its progress threads and,
        # at exit, wait for ranks that died.
        MPI.Finalize()
    return replace(launch, master_addr=addr, master_port=port)


def cuda_is_visible() -> bool:
    """Say, without torch, whether this process may use an NVIDIA device."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return Path("/dev/nvidiactl").exists() and visible not in ("", "-1")


def set_runtime_environment(*, cuda: bool, deterministic: bool = False) -> None:
    """Set what libraries read from the environment when they start, where the person has not set it.

    Call it before torch is imported; a child process inherits it.

    Raises:
        LaunchError: a variable is set to what a deterministic run must not have.
    """
    defaults = runtime_defaults(os.environ, cuda=cuda, cores=_usable_cores(), deterministic=deterministic)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def runtime_defaults(
    environment: Mapping[str, str], *, cuda: bool, cores: int, deterministic: bool = False
) -> dict[str, str]:
    """Choose the defaults that `set_runtime_environment` sets. Pure; `cores` is what this process may use.

    Raises:
        LaunchError: a variable is set to what a deterministic run must not have.
    """
    # The tokenizers library warns and turns its threads off at a fork after use, as data workers do.
    defaults = {"TOKENIZERS_PARALLELISM": "false"}
    if cuda:
        # Tensor- and context-parallel overlap counts on kernels starting in the order they were queued, up to
        # Hopper (megatron/training/arguments.py of core_v0.16.1 asserts it).
        defaults["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
        if deterministic:
            _check_deterministic(environment)
            defaults |= _DETERMINISTIC
    else:
        # Megatron decorates small functions with torch.compile, which would need a C++ compiler on the CPU.
        defaults["TORCH_COMPILE_DISABLE"] = "1"
    local_world_size = read_launch(environment).local_world_size
    if local_world_size > 1 and "OMP_NUM_THREADS" not in environment:
        per_task = environment.get("SLURM_CPUS_PER_TASK", "")
        # srun binds each task to its own cores, so `cores` is already this rank's share there.
        threads = int(per_task) if per_task.isdigit() else cores // local_world_size
        defaults["OMP_NUM_THREADS"] = str(max(1, threads))
    return {name: value for name, value in defaults.items() if name not in environment}


def _check_deterministic(environment: Mapping[str, str]) -> None:
    for name, value in _DETERMINISTIC.items():
        if environment.get(name, value) != value:
            raise LaunchError(
                f"environment: {name} ({environment[name]}) must be {value} with reliability.deterministic, or a run "
                "could not be repeated; unset it, or switch that off."
            )


def _usable_cores() -> int:
    """Cores that the scheduler lets this process use, where the system says so."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def recorded_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Pick the variables that bear on a run, for its record; names that look like secrets are left out."""
    source = os.environ if environment is None else environment
    return {name: value for name, value in sorted(source.items()) if _RECORDED.match(name) and not _SECRET.search(name)}
