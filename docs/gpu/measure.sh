#!/usr/bin/env bash
# What a GPU has to tell, in one go of up to eleven minutes: docs/gpu/measure.sh OUT [DEVICE [PART...]]
# Parts are machine, tests, tests-compiled, check-qwen3-0.6b, check-llama-3.1-8b, check-compiled, profile; all by default.
# Every part has a time limit of its own and writes as it goes, so that one that hangs does not take the rest along.
# Run it from the root of the repository; the root is the package, so nothing needs to be installed but torch,
# transformers, accelerate, pytest and hypothesis.
set -u
out=${1:?give a folder for the results}
device=${2:-cuda}
parts=" ${*:3} "
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir -p "$out"
ln -s "$PWD" "$site/paceline"
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
paceline="python3 -m paceline.spec.cli"

part() { # seconds, name, command...
    local seconds=$1 name=$2
    shift 2
    [[ $parts == "  " || $parts == *" $name "* ]] || return 0
    timeout "$seconds" "$@" >"$out/$name.txt" 2>&1
    echo "$name: exit code $?"
}

part 20 machine nvidia-smi
part 150 tests python3 -m pytest -q --maxfail=20 -k "(cuda or gpu) and not compiled" tests
part 150 tests-compiled python3 -m pytest -q --maxfail=20 -k "(cuda or gpu) and compiled" tests
part 75 check-qwen3-0.6b $paceline check --shape qwen3-0.6b --device "$device" --budget 60 \
    --executors eager,cuda_graph_eager -o "$out/check-qwen3-0.6b.json"
part 120 check-llama-3.1-8b $paceline check --shape llama-3.1-8b --device "$device" --budget 100 \
    --executors eager,cuda_graph_eager -o "$out/check-llama-3.1-8b.json"
part 140 check-compiled $paceline check --shape qwen3-0.6b --device "$device" --budget 120 \
    --executors cuda_graph_eager,cuda_graph_compiled -o "$out/check-compiled.json"
part 60 profile python3 docs/gpu/costs.py "$device"
tail -n 3 "$out"/*.txt
