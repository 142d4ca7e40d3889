#!/bin/sh
# One run on two machines, each with the same number of GPUs. Start it on both, the first machine's address as the second argument:
#   first machine:   configs/two-nodes.sh 0 10.0.0.1 RUN.toml runs/mine
#   second machine:  configs/two-nodes.sh 1 10.0.0.1 RUN.toml runs/mine
# Both need the same sdlora, and must see config, pictures, base and run folder under the same paths (a shared disk); the first one writes.
# The port must be reachable. GPUS is the number per machine, 1 if not given. Not measured on two machines with GPUs.
set -eu
if [ "$#" -ne 4 ]; then
    echo "usage: [GPUS=1] [PORT=29500] two-nodes.sh 0|1 ADDRESS RUN.toml RUN_FOLDER" >&2
    exit 2
fi
exec accelerate launch --multi_gpu --num_machines 2 --num_processes $((2 * ${GPUS:-1})) --machine_rank "$1" \
    --main_process_ip "$2" --main_process_port "${PORT:-29500}" -m sdlora train "$3" --out "$4"
