#!/bin/bash
# The lab's build on two cores: benchmarks/lab-build.sh RUN LIBRISPEECH
#
# Decoder and language model learn side by side, a core each, from the codes of the finished encoder; the folder
# is RUN/out, the reference encoder is in RUN/reference. Ctrl-C or a lost machine loses nothing: the same command goes
# on. --autocast makes the language model's steps shorter on processors with bf16 instructions, longer on others:
# AUTOCAST=--no-autocast for these. With DEVICE=cuda CONFIG=benchmarks/lab-build-gpu.json both learn on one GPU.
set -euo pipefail
run=${1:?RUN LIBRISPEECH} librispeech=${2:?RUN LIBRISPEECH} config=${CONFIG:-$(dirname "$0")/lab-build.json}
device=${DEVICE:-cpu} autocast=${AUTOCAST:---autocast}
if [ "$device" = cpu ]; then codec=--no-autocast; else codec=$autocast; fi
export OMP_NUM_THREADS=1

build() {
    python -m lab build "$run" --out "$run/out" --encoder "$run/reference/encoder.safetensors" \
        --librispeech "$librispeech" --config "$config" --device "$device" "$@"
}

build --stage speech
build --stage teacher --stage encoder --threads 1 "$codec"
build --stage language --threads 1 "$autocast" &
language=$!
trap 'kill -TERM $language 2>/dev/null || true; wait' EXIT
# The codes that both learn from are made once, by the language model's command; the last of them are these.
until compgen -G "$run/encoder/language-codes-*-validation.cache" >/dev/null; do
    if ! kill -0 $language 2>/dev/null; then
        wait $language
        break
    fi
    sleep 1
done
build --stage decoder --threads 1 "$codec"
wait $language
trap - EXIT
build --stage folder --threads 1
