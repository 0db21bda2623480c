#!/bin/bash
# The lab's build on two cores, from its materials to the checkpoint:
#   benchmarks/lab-build.sh RUN --speech DIR [--speech DIR ...] --librispeech DIR --whisper DIR
#
# lab/speech/README.md says how the materials are made. Encoder and decoder train side by side, a core each, on
# the teacher codec's codes; then the decoder and the language model go on with the encoder's codes, and at last the
# decoder with those that the language model predicts.
# A stage whose settings give it no steps is left out. The folder is RUN/out, the reference encoder is in
# RUN/reference.
# Ctrl-C or a lost machine loses at most 500 steps: the same command goes on. --autocast makes steps shorter on
# processors with bf16 instructions and longer on others: AUTOCAST=--no-autocast for these. With
# DEVICE=cuda CONFIG=benchmarks/lab-build-gpu.json all stages train on one GPU.
set -euo pipefail
run=${1:?usage: lab-build.sh RUN --speech DIR --librispeech DIR --whisper DIR}
shift
materials=("$@")
config=${CONFIG:-$(dirname "$0")/lab-build.json} device=${DEVICE:-cpu} autocast=${AUTOCAST:---autocast}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

build() {
    python -m lab build "$run" --out "$run/out" --encoder "$run/reference/encoder.safetensors" \
        "${materials[@]}" --config "$config" --device "$device" "$@"
}

# Speech that is complete is kept, also when the folders hold more by now: what has been learned is of this set.
if [ ! -e "$run/speech-is-complete" ]; then
    build --stage speech
    touch "$run/speech-is-complete"
fi
build --stage teacher --threads 1 "$autocast"
# The first to start caches the teacher codec's codes, the second may compute them again: both get the same.
build --stage encoder --threads 1 "$autocast" &
encoder=$!
trap 'kill -TERM $encoder 2>/dev/null || true; wait' EXIT
build --stage decoder --threads 1 "$autocast"
wait $encoder
trap - EXIT
build --stage finish --threads 1 "$autocast" &
finish=$!
trap 'kill -TERM $finish 2>/dev/null || true; wait' EXIT
build --stage language --threads 1 "$autocast"
wait $finish
trap - EXIT
build --stage tune --threads 1 "$autocast"
build --stage folder --threads 1
