#!/bin/bash
# Runs mpillama on all ranks of a PBS job (PBS Professional, OpenPBS), and again if it left work to do.
#
#   qsub -v ARGS="generate -m $SCRATCH/model.gguf -n 256 -f prompt.txt" launch/pbs.sh
#
# ARGS is split at spaces; prompts go into files.
#
#PBS -N mpillama
#PBS -l select=2:ncpus=32:mpiprocs=4
#PBS -l walltime=01:00:00
#PBS -j oe
#PBS -r y
set -u
cd "${PBS_O_WORKDIR:?run this with qsub}" || exit 1

# module load openmpi
# source $HOME/mpillama/bin/activate

read -ra arguments <<<"${ARGS:?give mpillama\'s command line with qsub -v ARGS=...}"
read -ra program <<<"${MPILLAMA:-mpillama}"

# PBS has no signal before the end. This one comes two minutes early, and mpirun hands it on to the ranks.
# (Open MPI 5 ends the job instead: use its mpirun only without the timer, WARN_AT=0.)
mpiexec "${program[@]}" "${arguments[@]}" &
job=$!
warn_at=${WARN_AT:-3480}
[ "$warn_at" = 0 ] || (sleep "$warn_at" && kill -USR1 "$job" 2>/dev/null) &
timer=$!
wait "$job"
code=$?
kill "$timer" 2>/dev/null

# 75 (EX_TEMPFAIL): there is work left.
if [ "$code" = 75 ]; then
    echo "mpillama left work to do; running job $PBS_JOBID again"
    qrerun "$PBS_JOBID"
fi
exit "$code"
