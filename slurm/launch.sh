# shellcheck shell=bash
# What the batch scripts share; they source it, in the checkout. It reads these variables:
#
#   MEGAPINTS_PYTHON     the Python to use; else the activated virtual environment, the checkout's .venv, python3
#   MEGAPINTS_CONTAINER  an image to run in; none: no container. Python is then the image's python3
#   MEGAPINTS_RUNTIME    what runs the image: pyxis (srun's plug-in for enroot; the default) or apptainer
#   MEGAPINTS_MOUNTS     SRC:DST[,SRC:DST...]: folders to see in it besides the checkout, which keeps its path
#   DRY_RUN=1            print the command line instead of running it
#
# and sets nodes, cpus and gpus (of a node), python (the words that start it) and step (the options of srun).
# shellcheck disable=SC2034

fail() {
    echo "error: $*" >&2
    exit 2
}

for name in SLURM_JOB_ID SLURM_JOB_NUM_NODES SLURM_JOB_NODELIST SLURM_CPUS_ON_NODE; do
    [ -n "${!name:-}" ] || fail "no $name: this is a batch script, submit it with sbatch (see slurm/README.md); for" \
        "DRY_RUN=1 outside of Slurm, set it"
done
nodes=$SLURM_JOB_NUM_NODES
cpus=$SLURM_CPUS_ON_NODE
gpus=${SLURM_GPUS_ON_NODE:-0}
# sbatch --export=NONE would have srun keep what is exported here from the tasks.
step=(--export=ALL)

choose_python() {
    local container=${MEGAPINTS_CONTAINER:-} mounts="$PWD:$PWD${MEGAPINTS_MOUNTS:+,$MEGAPINTS_MOUNTS}"
    if [ -n "$container" ]; then
        python=("${MEGAPINTS_PYTHON:-python3}")
        case ${MEGAPINTS_RUNTIME:-pyxis} in
        pyxis)
            step+=("--container-image=$container" "--container-mounts=$mounts" "--container-workdir=$PWD")
            ;;
        apptainer)
            local options=(--bind "$mounts" --pwd "$PWD")
            [ "$gpus" -eq 0 ] || options=(--nv "${options[@]}")
            python=(apptainer exec "${options[@]}" "$container" "${python[@]}")
            ;;
        *) fail "MEGAPINTS_RUNTIME ($MEGAPINTS_RUNTIME) must be pyxis or apptainer" ;;
        esac
    elif [ -n "${MEGAPINTS_RUNTIME:-}${MEGAPINTS_MOUNTS:-}" ]; then
        fail "MEGAPINTS_RUNTIME and MEGAPINTS_MOUNTS need an image to run: set MEGAPINTS_CONTAINER, or unset them"
    elif [ -n "${MEGAPINTS_PYTHON:-}" ]; then
        python=("$MEGAPINTS_PYTHON")
    elif [ -n "${VIRTUAL_ENV:-}" ]; then
        python=("$VIRTUAL_ENV/bin/python")
    elif [ -x .venv/bin/python ]; then
        python=("$PWD/.venv/bin/python")
    else
        python=(python3)
    fi
}
choose_python

# show_if_dry WORD...: under DRY_RUN=1 print the command, as it could be typed, and leave
show_if_dry() {
    [ -n "${DRY_RUN:-}" ] || return 0
    printf '%q ' "$@" | sed 's/ $/\n/'
    exit 0
}
