#!/usr/bin/env bash
# Everything that a GPU must show, and all that is measured on one. Run it on every new kind of GPU, then commit what it
# changed: kernels/blocks.json, kernels/convolutions.json, benchmarks/*.
#
#     benchmarks/gpu.sh                        # all stages: reckon with an hour
#     benchmarks/gpu.sh builds tests           # some of them
#     SECONDS_EACH=540 STYLEGAN3=../stylegan3 OUT=/tmp/rows benchmarks/gpu.sh kernels
#
# builds   compiles every kernel on all cores, which fills Triton's cache for the stages behind it
# tests    every test of a kernel, on the GPU in place of the interpreter
# train    the quickstart on the GPU, with fp16, path length, mixing and ADA, then resumed
# tune     block sizes and convolutions, into the two tables
# kernels  every op beside eager PyTorch and NVIDIA's at the layers of shapes.yaml, then beside torch.compile (minutes)
# steps    whole training steps, as published, with tf32 and in half precision throughout
#
# STYLEGAN3: a checkout that becomes a rival, if it imports and its CUDA compiles; else that is a failure, said at once,
# and ours is timed alone.
# SECONDS_EACH: a stage gets SIGINT after so long, and keeps what it has. OUT: where rows go. A stage that fails does not
# stop the others; the exit code is the number of those that did.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export TRITON_INTERPRET=0 PYTHONUNBUFFERED=1
python="${PYTHON:-python}" limit="${SECONDS_EACH:-86400}" out="${OUT:-benchmarks}"
rival=(${STYLEGAN3:+--stylegan3 "$STYLEGAN3"})
run() { timeout -s INT -k 30 "$limit" "$@"; }

builds() { run "$python" tools/kernel_builds.py --target "$target" --dtype float16; }
tests() { run "$python" -m pytest tests -n "$(nproc)" -q --maxfail=20 -k "triton or backends or cuda"; }
train() {
    local folder kimg
    folder="$(mktemp -d)"
    for kimg in 4 8; do
        run "$python" engine/train.py recipes/quickstart.yaml run_dir="$folder/run" kimg=$kimg device=cuda \
            precision=fp16 path_length.weight=2 generator.mixing_prob=0.9 augment.mode=ada || return 1
    done
    grep -h "cuda_graphs: off" "$folder/run/log.jsonl" && return 1 # a graph that could not be recorded says so there
    rm -rf "$folder"
}
tune() { run "$python" tools/tune_kernels.py; }
kernels() {
    local failed=0 bench=(tools/bench_kernels.py --shapes benchmarks/shapes.yaml)
    run "$python" "${bench[@]}" --provider "hsrgan,library,gemm,eager${rival:+,nvidia}" --out "$out/kernels_$name" \
        "${rival[@]}" || failed=1
    run "$python" "${bench[@]}" --provider hsrgan,compiled --mode forward,backward --out "$out/compiled_$name" \
        --op bias_act,upfirdn2d,fir_bias_act,bias_act_fir,to_rgb,feature_match || failed=1
    return $failed
}
steps() {
    local failed=0 model
    for model in ffhq1024 ffhq256; do
        step "published_$model" --model $model
        step "tf32_$model" --model $model --tf32
        step "half_$model" --model $model --num-fp16-res 9
    done
    return $failed
}
step() {
    local rows="$out/train_${name}_$1"
    run "$python" tools/bench_train.py "${@:2}" --turns 5 --out "$rows" "${rival[@]}" || failed=1
}

read -r name target < <("$python" - <<'EOF'
import sys
import torch
if not torch.cuda.is_available():
    sys.exit(1)
from hsrgan.kernels import launch
from hsrgan.kernels.builds import TARGETS
x = torch.empty(0, device="cuda")
chip = launch.chip(x)
print(torch.cuda.get_device_name().lower().replace(" ", "_").replace("/", "_"), chip if chip in TARGETS else "sm_90")
EOF
) || { echo "no GPU here: nothing was run" >&2; exit 1; }

failed=0
[ -z "${STYLEGAN3:-}" ] || "$python" - "$STYLEGAN3" <<'EOF' || { rival=() failed=1; }
import sys
from pathlib import Path
from hsrgan.engine.errors import user_errors
from hsrgan.tools import train_gpu, train_stylegan3
with user_errors():
    train_stylegan3.ready(Path(sys.argv[1]), "fp16", train_gpu.Gpu())
EOF
for stage in "${@:-builds tests train tune kernels steps}"; do
    for each in $stage; do
        echo "==> $each on $name"
        "$each" || { echo "==> $each: exit code $?" >&2; failed=$((failed + 1)); }
    done
done
exit "$failed"
