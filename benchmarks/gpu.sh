#!/usr/bin/env bash
# Everything that wants a GPU, in one command:
#
#     benchmarks/gpu.sh CIFAR_DIR [OUT] [EPOCHS]
#
# CIFAR_DIR holds CIFAR-10 as an image folder (train/ and test/, a folder a class). First the cost
# of a penalised step on three networks, and whether the data keeps up; then ResNet-18 without a
# penalty and with one for as many epochs, and without one for as long.
set -euo pipefail
cifar=$1 out=${2:-gpu-results} epochs=${3:-30}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
for network in "small-cnn --image 8 --channels 1" "resnet18" "wrn-16-4"; do
    # shellcheck disable=SC2086 # the words are options
    python "$here/step_cost.py" --grid --batch-size 128 --rounds 20 --model $network |
        tee "$out/step-cost-${network%% *}.md"
done
for size in "--image-size 32" "--workers 0 2 8 14"; do # held on the device, and read from files
    # shellcheck disable=SC2086
    python "$here/data.py" --dataset "imagefolder:$cifar" --model resnet18 $size
done | tee "$out/data.md"
train() { # name, epochs, further flags
    hesstrace train --model resnet18 --dataset "imagefolder:$cifar" --image-size 32 \
        --augment crop-flip --batch-size 128 --lr 0.1 --precision bf16 --channels-last \
        --num-workers 8 --val-fraction 0 --out "$out/$1" --epochs "$2" "${@:3}"
}
train none "$epochs" --reg none
train trace "$epochs" --reg trace=0.001
longer=$(python - "$out" "$epochs" <<'PYTHON'
import json, sys
out, epochs = sys.argv[1], int(sys.argv[2])
seconds = [json.load(open(f"{out}/{name}/summary.json"))["seconds"] for name in ("none", "trace")]
print(max(1, round(epochs * seconds[1] / seconds[0])))
PYTHON
)
train none-as-long "$longer" --reg none
hesstrace compare "$out/none" "$out/trace"
hesstrace estimate-trace "$out"/{none,trace,none-as-long}/last.pt --num-examples 5000 --report
