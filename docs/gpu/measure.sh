#!/usr/bin/env bash
# What a GPU has to tell, in one go of up to twelve minutes: docs/gpu/measure.sh OUT [DEVICE [PART...]]
# Parts are machine, tests, tests-compiled, check-qwen3-0.6b, check-llama-3.1-8b, check-compiled, profile; all by default.
# Every part has a time limit of its own and writes as it goes, so that one that hangs does not take the rest along.
# Run it from the root of the repository; the root is the package, so nothing needs to be installed but torch,
# transformers, accelerate, datasets, pytest, pytest-xdist and hypothesis.
set -u
out=${1:?give a folder for the results}
device=${2:-cuda}
parts=" ${*:3} "
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir -p "$out"
ln -s "$PWD" "$site/paceline"
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=2 # of each of the processes that test
paceline="env -u OMP_NUM_THREADS -u TORCHINDUCTOR_COMPILE_THREADS python3 -m paceline.spec.cli"

part() { # seconds, name, command...
    local seconds=$1 name=$2
    shift 2
    [[ $parts == "  " || $parts == *" $name "* ]] || return 0
    timeout "$seconds" "$@" >"$out/$name.txt" 2>&1
    echo "$name: exit code $?"
}

part 20 machine nvidia-smi
tests="python3 -m pytest -p no:benchmark -n 8 -rf --tb=short --durations=8 --maxfail=40 tests/engines/test_cuda.py"
part 150 tests $tests -m "slow or not slow" -k "not compiled"
part 150 tests-compiled $tests -m "slow or not slow" -k compiled
part 75 check-qwen3-0.6b $paceline check --shape qwen3-0.6b --device "$device" --budget 60 \
    --executors eager,cuda_graph_eager -o "$out/check-qwen3-0.6b.json"
part 120 check-llama-3.1-8b $paceline check --shape llama-3.1-8b --device "$device" --budget 100 \
    --executors eager,cuda_graph_eager -o "$out/check-llama-3.1-8b.json"
part 140 check-compiled $paceline check --shape qwen3-0.6b --device "$device" --budget 120 \
    --executors cuda_graph_eager,cuda_graph_compiled -o "$out/check-compiled.json"
part 60 profile python3 docs/gpu/costs.py "$device"
tail -n 3 "$out"/*.txt
