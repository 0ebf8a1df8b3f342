#!/bin/bash
# Gives each rank of a host its own GPU, and the cores, memory and network adapter that are next to it.
#
#   srun launch/bind.sh mpillama generate -m model.gguf …
#   mpirun -n 8 launch/bind.sh mpillama bench …
#
# The batch system may have done some of it: a rank that sees a single GPU keeps it. BIND_VERBOSE=1 says what was done.
set -u
sys=${BIND_SYS:-/sys}

local_rank=''
for name in SLURM_LOCALID OMPI_COMM_WORLD_LOCAL_RANK MPI_LOCALRANKID PALS_LOCAL_RANKID FLUX_TASK_LOCAL_ID PMI_LOCAL_RANK; do
    [ -z "$local_rank" ] && local_rank=${!name:-}
done
local_rank=${local_rank:-0}

# The GPUs of this job on this host, as "index bus", by what the batch system left visible.
gpu='' numa=''
if command -v nvidia-smi >/dev/null; then
    visible=CUDA_VISIBLE_DEVICES
    gpus=$(nvidia-smi --query-gpu=index,pci.bus_id --format=csv,noheader 2>/dev/null | tr -d ' ' | tr ',' ' ')
elif [ -d "$sys/class/kfd/kfd/topology/nodes" ]; then
    visible=ROCR_VISIBLE_DEVICES
    gpus=$(for node in "$sys"/class/kfd/kfd/topology/nodes/*/properties; do
        # location_id holds bus, device and function of the PCI address in 8, 5 and 3 bits.
        awk '/^simd_count/ { n = $2 } /^location_id/ { at = $2 } /^domain/ { d = $2 }
             END { if (n) printf "%04x:%02x:%02x.%x\n", d, int(at / 256), int(at % 256 / 8), at % 8 }' "$node"
    done | awk '{ print NR - 1, $1 }')
else
    visible='' gpus=''
fi
if [ -n "$gpus" ]; then
    mine=${!visible:-$(awk '{ printf "%s%s", sep, $1; sep = "," }' <<<"$gpus")}
    IFS=, read -ra list <<<"$mine"
    gpu=${list[local_rank % ${#list[@]}]}
    export "$visible=$gpu"
    # NVIDIA writes the domain with 8 digits, the kernel with 4, in small letters.
    bus=$(awk -v i="$gpu" '$1 == i { print tolower($2) }' <<<"$gpus")
    bus=${bus/#0000????:/${bus:4:4}:}
    numa=$(cat "$sys/bus/pci/devices/$bus/numa_node" 2>/dev/null)
fi
[ "${numa:--1}" -ge 0 ] 2>/dev/null || numa=

# The adapter on the same NUMA node; several ranks there take turns.
nic=''
if [ -n "$numa" ] && [ -d "$sys/class/infiniband" ]; then
    near=()
    for adapter in "$sys"/class/infiniband/*; do
        [ "$(cat "$adapter/device/numa_node" 2>/dev/null)" = "$numa" ] && near+=("${adapter##*/}")
    done
    if [ ${#near[@]} -gt 0 ]; then
        nic=${near[local_rank % ${#near[@]}]}
        export UCX_NET_DEVICES=${UCX_NET_DEVICES:-$nic:1} NCCL_IB_HCA=${NCCL_IB_HCA:-$nic}
    fi
fi

[ -z "${BIND_VERBOSE:-}" ] || echo "$(hostname) rank $local_rank: GPU ${gpu:-none} NUMA ${numa:-any} NIC ${nic:-any}" >&2
if [ -n "$numa" ] && command -v numactl >/dev/null; then
    # Memory is only preferred there: a full node is no reason to fail.
    exec numactl --cpunodebind="$numa" --preferred="$numa" -- "$@"
fi
exec "$@"
