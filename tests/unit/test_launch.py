"""Ranks from every launcher's variables. The Slurm environments are what Slurm 22.05 was seen to set."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.errors import LaunchError
from megatron_ext.parallel import launch as launch_module
from megatron_ext.parallel.launch import (
    Job,
    Launch,
    cuda_is_visible,
    expand_nodelist,
    expand_tasks_per_node,
    find_job,
    find_launch,
    free_port,
    launched,
    read_launch,
    recorded_environment,
    runtime_defaults,
    slurm_port,
)

ROOT = Path(__file__).resolve().parents[2]

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node-a",
    "MASTER_PORT": "29500",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
PALS = {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2"}
SALLOC = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "3",
    "SLURM_TASKS_PER_NODE": "2,1",
}
BATCH = SALLOC | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = BATCH | {
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "4",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "n[1-2]",
}
ONE_TASK_STEP = STEP | {
    "SLURM_PROCID": "0",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_STEP_NODELIST": "n1",
}
SOLE = Launch(
    rank=0,
    world_size=1,
    local_rank=0,
    local_world_size=1,
    master_addr="127.0.0.1",
    master_port=0,
    launcher="bare",
)


def test_torchrun_variables_give_rank_and_address():
    assert read_launch(TORCHRUN) == Launch(
        rank=5,
        world_size=8,
        local_rank=1,
        local_world_size=4,
        master_addr="node-a",
        master_port=29500,
        launcher="torchrun",
    )


@pytest.mark.parametrize("missing", sorted(TORCHRUN))
def test_torchrun_variable_missing_is_named(missing):
    environment = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(LaunchError, match=rf"half set: .*, {missing} missing"):
        read_launch(environment)


def test_master_address_alone_is_a_bare_process():
    # Cluster profiles export it for everybody.
    assert read_launch({"MASTER_ADDR": "login1", "MASTER_PORT": "29500"}) == SOLE


def test_no_variables_is_a_bare_process():
    assert read_launch({}) == SOLE


@pytest.mark.parametrize("environment", [OPEN_MPI, HYDRA, PALS], ids=["open-mpi", "hydra", "pals"])
def test_mpiexec_variables_give_rank_and_leave_the_address_open(environment):
    assert read_launch(environment) == Launch(
        rank=3,
        world_size=4,
        local_rank=1,
        local_world_size=2,
        master_addr="",
        master_port=0,
        launcher="mpiexec",
    )


def test_mpiexec_with_both_master_variables_takes_them():
    launch = read_launch(OPEN_MPI | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4000"})
    assert (launch.master_addr, launch.master_port) == ("10.0.0.7", 4000)


@pytest.mark.parametrize("given, missing", [("MASTER_ADDR", "MASTER_PORT"), ("MASTER_PORT", "MASTER_ADDR")])
def test_mpiexec_with_one_master_variable_names_the_other(given, missing):
    with pytest.raises(LaunchError, match=f"{missing} is missing"):
        read_launch(OPEN_MPI | {given: "4000"})


@pytest.mark.parametrize("missing", sorted(OPEN_MPI))
def test_open_mpi_variable_missing_is_named(missing):
    environment = {name: value for name, value in OPEN_MPI.items() if name != missing}
    with pytest.raises(LaunchError, match=f"{missing} missing"):
        read_launch(environment)


def test_pmi_rank_without_local_rank_is_refused():
    with pytest.raises(LaunchError, match="MPI_LOCALRANKID, MPI_LOCALNRANKS missing"):
        read_launch({"PMI_RANK": "0", "PMI_SIZE": "2"})


def test_srun_step_gives_rank_and_first_node():
    assert read_launch(STEP) == Launch(
        rank=2,
        world_size=3,
        local_rank=0,
        local_world_size=1,
        master_addr="n1",
        # 12000 + (17 * 101 + 4) mod 20000, by hand
        master_port=13721,
        launcher="srun",
    )


def test_srun_step_on_one_node_needs_no_name():
    assert read_launch(ONE_TASK_STEP).master_addr == "127.0.0.1"


def test_srun_step_counts_its_own_tasks_not_the_jobs():
    assert ONE_TASK_STEP["SLURM_NTASKS"] == "3"
    assert read_launch(ONE_TASK_STEP).world_size == 1


def test_srun_step_with_master_address_takes_it():
    launch = read_launch(STEP | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4000"})
    assert (launch.master_addr, launch.master_port) == ("10.0.0.7", 4000)


@pytest.mark.parametrize("missing", sorted(set(STEP) - set(SALLOC) - {"SLURM_STEP_ID"}) + ["SLURM_JOB_ID"])
def test_srun_variable_missing_is_named(missing):
    environment = {name: value for name, value in STEP.items() if name != missing}
    with pytest.raises(LaunchError, match=f"{missing} missing"):
        read_launch(environment)


def test_srun_task_without_step_id_is_not_taken_for_a_bare_process():
    environment = {name: value for name, value in STEP.items() if not name.startswith("SLURM_STEP")}
    with pytest.raises(LaunchError, match="SLURM_STEP_ID is missing"):
        read_launch(environment)


@pytest.mark.parametrize("environment", [SALLOC, BATCH], ids=["salloc", "sbatch"])
def test_process_in_an_allocation_without_srun_is_bare(environment):
    assert read_launch(environment) == SOLE


@pytest.mark.parametrize("step", ["4294967291", "4294967290", "4294967292", "batch", "interactive"])
def test_batch_or_interactive_step_id_is_bare(step):
    assert read_launch(BATCH | {"SLURM_STEP_ID": step}) == SOLE


@pytest.mark.parametrize(
    "inner, launcher",
    [(TORCHRUN, "torchrun"), (OPEN_MPI, "mpiexec"), (HYDRA, "mpiexec")],
    ids=["torchrun", "open-mpi", "hydra"],
)
def test_launcher_inside_an_srun_step_wins(inner, launcher):
    assert read_launch(STEP | inner).launcher == launcher


def test_srun_with_pmi_stays_srun():
    # srun --mpi=pmi2 sets these too, without a local rank.
    assert read_launch(STEP | {"PMI_RANK": "2", "PMI_SIZE": "3"}).launcher == "srun"


@pytest.mark.parametrize("value", ["two", "-1", "1.5", "²"])
def test_rank_that_is_no_number_is_named_with_its_value(value):
    with pytest.raises(LaunchError, match=rf"RANK \('{value}'\) must be a number"):
        read_launch(TORCHRUN | {"RANK": value})


def test_rank_beyond_world_size_is_refused():
    with pytest.raises(LaunchError, match=r"rank \(8, from torchrun\) must be below the world size \(8\)"):
        read_launch(TORCHRUN | {"RANK": "8"})


def test_local_rank_beyond_local_world_size_is_refused():
    with pytest.raises(LaunchError, match="must be below the local world size"):
        read_launch(TORCHRUN | {"LOCAL_RANK": "4"})


def test_local_world_size_beyond_world_size_is_refused():
    with pytest.raises(LaunchError, match="at most the world size"):
        read_launch(TORCHRUN | {"LOCAL_WORLD_SIZE": "9"})


@pytest.mark.parametrize("port", ["0", "65536"])
def test_port_out_of_range_is_refused(port):
    with pytest.raises(LaunchError, match=f"MASTER_PORT .{port}. must be between 1 and 65535"):
        read_launch(TORCHRUN | {"MASTER_PORT": port})


def test_node_id_beyond_the_task_list_is_refused():
    with pytest.raises(LaunchError, match="SLURM_NODEID .2. must be below"):
        read_launch(STEP | {"SLURM_NODEID": "2"})


@pytest.mark.parametrize(
    "nodelist, names",
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[01-04,07]", ["n01", "n02", "n03", "n04", "n07"]),
        ("n[008-011]", ["n008", "n009", "n010", "n011"]),
        ("a,b,c", ["a", "b", "c"]),
        ("gpu-[1,3]-ib,login.site.org", ["gpu-1-ib", "gpu-3-ib", "login.site.org"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("a[1-2],b[5,9]", ["a1", "a2", "b5", "b9"]),
    ],
)
def test_nodelist_is_written_out(nodelist, names):
    assert expand_nodelist(nodelist) == names


@pytest.mark.parametrize(
    "nodelist", ["", "n[1-2", "n]1[", "n[]", "n[3-1]", "n[1-2-3]", "n[-1]", "a,,b", "a b", "n[a-c]"]
)
def test_nodelist_that_is_none_is_refused(nodelist):
    with pytest.raises(LaunchError, match="node list"):
        expand_nodelist(nodelist)


@pytest.mark.parametrize("counts, tasks", [("2,1", [2, 1]), ("8(x3)", [8, 8, 8]), ("4(x2),3", [4, 4, 3]), ("1", [1])])
def test_tasks_per_node_are_written_out(counts, tasks):
    assert expand_tasks_per_node(counts) == tasks


@pytest.mark.parametrize("counts", ["", "x2", "4(x)", "4,,3", "(x2)"])
def test_tasks_per_node_of_another_form_are_refused(counts):
    with pytest.raises(LaunchError, match="tasks per node"):
        expand_tasks_per_node(counts)


def test_slurm_ports_of_neighbouring_jobs_and_steps_differ():
    ports = {slurm_port(job, step) for job in range(5000, 5100) for step in range(20)}
    assert len(ports) == 100 * 20


def test_slurm_ports_stay_below_the_ephemeral_range():
    assert all(1024 < slurm_port(job, 3) < 32768 for job in (0, 1, 197, 198, 10**6, 2**31))


def test_free_port_can_be_bound():
    port = free_port()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        assert listener.getsockname()[1] == port


def test_bare_process_finds_a_port(monkeypatch):
    clear_launch_variables(monkeypatch)
    launch = find_launch()
    assert (launch.rank, launch.world_size, launch.master_addr) == (0, 1, "127.0.0.1")
    assert launch.master_port > 0


def test_launched_of_a_bare_process_is_none(monkeypatch):
    clear_launch_variables(monkeypatch)
    assert launched() is None


def test_launched_world_size_is_the_launchers(monkeypatch):
    clear_launch_variables(monkeypatch)
    for name, value in OPEN_MPI.items():
        monkeypatch.setenv(name, value)
    assert launched().world_size == 4


def test_single_mpiexec_rank_needs_no_agreement(monkeypatch):
    clear_launch_variables(monkeypatch)
    monkeypatch.setattr(launch_module, "_agree_over_mpi", None)
    for name, value in {"RANK": "0", "SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    assert find_launch().master_addr == "127.0.0.1"


@pytest.mark.mpi
def test_mpiexec_ranks_agree_on_an_address():
    lines = run_mpi("-n", "3", sys.executable, "-c", PRINT_LAUNCH).stdout.split("\n")
    seen = sorted(line.split() for line in lines if line.startswith("launch"))
    assert [row[1:3] for row in seen] == [["0", "3"], ["1", "3"], ["2", "3"]]
    assert len({tuple(row[3:]) for row in seen}) == 1 and seen[0][3] == "127.0.0.1"


@pytest.mark.mpi
def test_mpi_library_of_another_launcher_is_told():
    # Variables of an mpiexec that this Python's MPI library knows nothing of: it comes up alone.
    environment = {name: value for name, value in os.environ.items() if not is_launch_variable(name)} | HYDRA
    done = subprocess.run(
        [sys.executable, "-c", PRINT_LAUNCH], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert "LaunchError: mpiexec says 4 processes, mpi4py's library sees 1" in done.stderr


PRINT_LAUNCH = (
    "from megatron_ext.parallel.launch import find_launch; found = find_launch(); "
    "print(f'launch {found.rank} {found.world_size} {found.master_addr} {found.master_port}\\n', end='')"
)


def run_mpi(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not is_launch_variable(name)}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    mpiexec = Path(sys.executable).parent / "mpiexec"
    done = subprocess.run(
        [str(mpiexec), "--oversubscribe", *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


def is_launch_variable(name: str) -> bool:
    return name in TORCHRUN or name.startswith(("OMPI_", "PMI", "PMIX_", "SLURM_", "MPI_LOCAL"))


def clear_launch_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if is_launch_variable(name)]:
        monkeypatch.delenv(name)


def test_defaults_on_cuda_order_kernel_launches():
    defaults = runtime_defaults({}, cuda=True, cores=8)
    assert defaults == {"TOKENIZERS_PARALLELISM": "false", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def test_defaults_on_the_cpu_leave_the_compiler_out():
    defaults = runtime_defaults({}, cuda=False, cores=8)
    assert defaults == {"TOKENIZERS_PARALLELISM": "false", "TORCH_COMPILE_DISABLE": "1"}


def test_defaults_leave_what_is_set_alone():
    environment = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "8",
        "OMP_NUM_THREADS": "3",
        "TOKENIZERS_PARALLELISM": "true",
    }
    assert runtime_defaults(environment | OPEN_MPI, cuda=True, cores=8) == {}


DETERMINISTIC = {
    "NCCL_ALGO": "Ring",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "TORCHINDUCTOR_DETERMINISTIC": "1",
}


def test_deterministic_run_on_cuda_has_the_libraries_repeat_themselves():
    plain = runtime_defaults({}, cuda=True, cores=8)
    assert runtime_defaults({}, cuda=True, cores=8, deterministic=True) == plain | DETERMINISTIC


def test_deterministic_run_on_the_cpu_needs_nothing_of_the_environment():
    plain = runtime_defaults({}, cuda=False, cores=8)
    assert runtime_defaults({}, cuda=False, cores=8, deterministic=True) == plain


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_run_refuses_a_variable_that_is_set_otherwise(name):
    with pytest.raises(LaunchError, match=f"{name} \\(x\\) must be {DETERMINISTIC[name]}"):
        runtime_defaults({name: "x"}, cuda=True, cores=8, deterministic=True)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_run_accepts_a_variable_that_is_set_rightly(name):
    set_already = {name: DETERMINISTIC[name]}
    assert name not in runtime_defaults(set_already, cuda=True, cores=8, deterministic=True)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_variables_of_a_deterministic_run_are_recorded(name):
    assert recorded_environment({name: "x"}) == {name: "x"}


@pytest.mark.parametrize("cores, threads", [(8, "4"), (9, "4"), (1, "1")])
def test_several_local_ranks_share_the_cores(cores, threads):
    assert runtime_defaults(OPEN_MPI, cuda=False, cores=cores)["OMP_NUM_THREADS"] == threads


def test_one_local_rank_keeps_all_cores():
    assert "OMP_NUM_THREADS" not in runtime_defaults(STEP, cuda=False, cores=8)


def test_srun_tasks_take_their_own_cores():
    environment = STEP | {"SLURM_NODEID": "0", "SLURM_CPUS_PER_TASK": "6"}
    assert runtime_defaults(environment, cuda=False, cores=6)["OMP_NUM_THREADS"] == "6"


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_devices_are_not_visible(monkeypatch, hidden):
    monkeypatch.setattr(launch_module.Path, "exists", lambda self: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert not cuda_is_visible()


def test_recorded_environment_keeps_what_bears_on_a_run():
    kept = {"NCCL_DEBUG": "INFO", "SLURM_JOB_ID": "3", "RANK": "0", "TOKENIZERS_PARALLELISM": "false"}
    assert recorded_environment(kept | {"HOME": "/home/a", "EDITOR": "vi"}) == kept


def test_recorded_environment_leaves_secrets_out():
    secrets = {"WANDB_API_KEY": "x", "HF_TOKEN": "x", "SLURM_JWT_TOKEN": "x", "HF_HUB_PASSWORD": "x"}
    assert recorded_environment(secrets) == {}


def test_launch_module_does_not_import_torch():
    code = "import sys, megatron_ext.parallel.launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_job_is_found_in_what_slurm_and_its_batch_script_say(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1800000000")
    monkeypatch.setenv("MEGAPINTS_JOB_RECORD", "/runs/.job-17")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("MEGAPINTS_PREVIOUS_END", "srun ended with signal KILL")
    assert find_job() == Job(1.8e9, Path("/runs/.job-17"), "17", 2, "srun ended with signal KILL")


@pytest.mark.parametrize("end_time", [None, "", "Unknown", "NONE"])
def test_job_without_an_end_has_none(end_time, monkeypatch):
    names = "MEGAPINTS_JOB_RECORD SLURM_JOB_END_TIME SLURM_JOB_ID SLURM_RESTART_COUNT MEGAPINTS_PREVIOUS_END"
    for name in names.split():
        monkeypatch.delenv(name, raising=False)
    if end_time is not None:
        monkeypatch.setenv("SLURM_JOB_END_TIME", end_time)
    assert find_job() == Job()


def test_free_port_is_below_those_of_outgoing_connections():
    assert {12000 <= free_port() < 32000 for _ in range(50)} == {True}
