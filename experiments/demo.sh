#!/usr/bin/env bash
# The main job, end to end, on the embedded data set: every line is a command that a real run uses, too.
#   bash experiments/demo.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python="${1:-python}"
began=$SECONDS
run() {
    printf '\n\033[1m[%4ds] python -m src.%s\033[0m\n' "$((SECONDS - began))" "$*"
    "$python" -m "src.$@"
}
run prepare dataset=synthetic weights=i3d
run train +experiment=demo_autoencoder
run encode model=runs/demo_autoencoder/model dataset=synthetic dataset.num_frames=16 clips_per_video=2 output=runs/demo_autoencoder/latents machine=cpu
run train +experiment=demo
run sample model=runs/demo/model num_samples=12 sampler.num_sampling_steps=25
run sample model=runs/demo/model num_samples=1 num_frames=128 plan.num_given=2 output=runs/demo/long sampler.num_sampling_steps=25
run evaluate model=runs/demo/model dataset=synthetic protocol=quick protocol.num_real=32 protocol.num_generated=32 num_reconstructed=32 compare_untrained=true sampler.num_sampling_steps=25
run report 'runs=[runs/demo_autoencoder,runs/demo]' output=runs/demo/report.html
printf '\n[%4ds] done: open runs/demo/report.html, or: tensorboard --logdir runs\n' "$((SECONDS - began))"
