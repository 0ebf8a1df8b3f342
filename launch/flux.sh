#!/bin/bash
# Runs mpillama on all tasks of a Flux job, and submits itself again if it left work to do.
#
#   flux batch launch/flux.sh generate -m model.gguf -p "Once upon a time" -n 256
#
# flux: --job-name=mpillama
# flux: --nodes=2
# flux: --nslots=8
# flux: --cores-per-slot=4
# flux: --time-limit=1h
# flux: --output=mpillama-{{id}}.out
# flux: --signal=SIGUSR1@2m
set -u

# module load mpich
# source $HOME/mpillama/bin/activate

read -ra program <<<"${MPILLAMA:-mpillama}"
read -ra options <<<"${FLUX_OPTIONS:-}"
# Flux speaks the PMI of MPICH; for Open MPI 5 add -o pmi=pmix (the plugin of flux-pmix).
# exit-timeout=none would let ranks wait for one that died.
flux run -N "${NODES:-2}" -n "${RANKS:-8}" -o exit-timeout=10s "${options[@]}" "${program[@]}" "$@"
code=$?
if [ "$code" = 75 ]; then
    echo "mpillama left work to do; submitting again"
    flux batch --nodes="${NODES:-2}" --nslots="${RANKS:-8}" "$0" "$@"
fi
exit "$code"
