#!/bin/bash
# Runs mpillama on the hosts named in a file, one a line, without a batch system: by MPICH's or Open MPI's mpirun.
#
#   launch/hostfile.sh hosts.txt 4 mpillama generate -m /shared/model.gguf -p "Once upon a time"
#
# starts 4 ranks on each host. Hosts are reached by ssh without a password; the program and the model have the same
# paths on all of them. MPIRUN names another launcher than the mpirun on PATH.
set -eu
[ $# -ge 3 ] || {
    echo "usage: $0 HOSTFILE RANKS_PER_HOST COMMAND..." >&2
    exit 2
}
file=$1 ppn=$2
shift 2
mpirun=${MPIRUN:-mpirun}
hosts=$(grep -cvE '^[[:space:]]*(#|$)' "$file") || {
    echo "$0: $file names no host" >&2
    exit 2
}
n=$((hosts * ppn))

case $("$mpirun" --version 2>&1) in
*"Open MPI"* | *OpenRTE* | *PRRTE*)
    # Slots say how many ranks a host takes; without --bind-to none each rank would get a single core. Variables that
    # the ranks need are passed on with -x.
    slots=$(mktemp)
    trap 'rm -f "$slots"' EXIT
    grep -vE '^[[:space:]]*(#|$)' "$file" | awk -v n="$ppn" '{ print $1, "slots=" n }' >"$slots"
    "$mpirun" --hostfile "$slots" -n "$n" --map-by "ppr:$ppn:node" --bind-to none -x PATH "$@"
    ;;
*)
    # MPICH, MVAPICH, Intel MPI (hydra); the environment goes along by itself.
    exec "$mpirun" -f "$file" -ppn "$ppn" -n "$n" "$@"
    ;;
esac
