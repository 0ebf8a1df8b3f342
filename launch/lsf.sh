#!/bin/bash
# Runs mpillama on all ranks of an LSF job; LSF itself runs it again if it left work to do.
#
#   bsub -env "all, ARGS=generate -m $SCRATCH/model.gguf -n 256 -f prompt.txt" < launch/lsf.sh
#
# ARGS is split at spaces; prompts go into files.
#
#BSUB -J mpillama
#BSUB -n 8
#BSUB -R "span[ptile=4]"
##BSUB -gpu "num=4"
#BSUB -W 1:00
#BSUB -o mpillama-%J.out
# USR1 two minutes before the end; the job is queued again if it ends with 75 (EX_TEMPFAIL).
#BSUB -wt 2
#BSUB -wa USR1
#BSUB -r
#BSUB -Q 75
set -u

# module load openmpi
# source $HOME/mpillama/bin/activate

read -ra arguments <<<"${ARGS:?give mpillama\'s command line with bsub -env \"all, ARGS=...\"}"
read -ra program <<<"${MPILLAMA:-mpillama}"

# LSF signals this shell, which hands it on (not with Open MPI 5, whose mpirun would end the job).
mpirun "${program[@]}" "${arguments[@]}" &
job=$!
trap 'kill -USR1 "$job" 2>/dev/null' USR1
wait "$job"
code=$?
# A signal ends wait early.
while kill -0 "$job" 2>/dev/null; do
    wait "$job"
    code=$?
done
exit "$code"
