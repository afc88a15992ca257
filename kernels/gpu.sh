#!/usr/bin/env bash
# All tests of the kernels on this machine's GPU, then every benchmark, in ten minutes; everything goes to the folder OUT.
# A PYTHON with torch and triton that sees the GPU is used as it is, with nothing of this project installed; otherwise
# the virtual environment is made. BENCH has more flags for bench.py, PYTEST_ADDOPTS for pytest.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}
TEST_S=${TEST_S:-200} # that tests may take
ALL_S=${ALL_S:-590}   # that everything may take

if ! "$PYTHON" -c 'import torch, triton; assert torch.cuda.is_available()' 2>/dev/null; then
    make install PYTHON="$PYTHON" || exit
    PYTHON=.venv/bin/python
    SECONDS=0 # what installing takes does not count
fi
mkdir -p "$OUT"
log=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$log"' EXIT
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

names=() pids=()
start() { # NAME COMMAND...: beside the others, its output in a file of its own
    timeout -k 10 "$TEST_S" "${@:2}" >"$log/$1" 2>&1 &
    names+=("$1") pids+=($!)
}

# Three files need no GPU: they compile for others, and run on the CPU.
files=()
for file in tests/test_kernels_*.py; do
    [[ $file == *_aot.py || $file == *_bench.py || $file == *_tune.py ]] || files+=("$file")
done
# What the tests do most is compile, so they are shared out among processes. One that hangs, or breaks the GPU for its
# process, leaves the others alone.
n=$(($(nproc) / 2))
n=$((n < 1 ? 1 : n > 8 ? 8 : n))
for ((i = 0; i < n; i++)); do
    start "tests-$i" "$PYTHON" -m pytest -vv --durations 5 --shard "$i/$n" "${files[@]}"
done
# Meanwhile everything is compiled for this GPU: the benchmarks find it in Triton's cache.
arch=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null) &&
    start aot "$PYTHON" kernels/aot.py --arch "$arch"

failed=0
for i in "${!names[@]}"; do
    wait "${pids[i]}"
    code=$?
    ((code == 0)) || failed=$((failed + 1))
    ((code == 124)) && echo "stopped after $TEST_S s" >>"$log/${names[i]}"
    echo "${names[i]} ended with $code: $(tail -n 1 "$log/${names[i]}")" >>"$log/all"
done
cat "$log/all"
(cd "$log" && tail -n +1 all "${names[@]}") >"$OUT/tests.txt"
grep -h -E '^(FAILED|ERROR)' "$OUT/tests.txt" | sort -u

# Of the last minute, importing torch takes some seconds, what has begun when its time is over gets 25 more, and the
# summary and the pictures need the rest.
minutes=$(awk "BEGIN { print ($ALL_S - 60 - $SECONDS) / 60 }")
timeout -k 10 $((ALL_S - SECONDS)) "$PYTHON" kernels/bench.py all --out "$OUT" --minutes "$minutes" ${BENCH:-} 2>&1 |
    tee "$OUT/bench.txt"
timed=$?

echo "$failed of ${#names[@]} runs of tests failed, benchmarks ended with $timed, after $SECONDS s; see $OUT"
exit $((failed != 0 || timed != 0))
