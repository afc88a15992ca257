#!/usr/bin/env bash
# All tests of the kernels on this machine's GPU, then every benchmark, in ten minutes; everything goes to the folder OUT.
# A PYTHON with torch, triton and pytest that sees the GPU is used as it is, with nothing of this project installed;
# otherwise the virtual environment is made. BENCH has more flags for bench.py.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}

if ! "$PYTHON" -c 'import pytest, torch, triton; assert torch.cuda.is_available()' 2>/dev/null; then
    make install PYTHON="$PYTHON" || exit
    PYTHON=.venv/bin/python
fi
SECONDS=0
mkdir -p "$OUT"
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# Those two need no GPU: they compile for GPUs that are not there, and try the benchmarks on the CPU.
timeout 300 "$PYTHON" -m pytest tests/test_kernels_*.py --durations 10 \
    --ignore tests/test_kernels_aot.py --ignore tests/test_kernels_bench.py 2>&1 | tee "$OUT/tests.txt"
tested=$?

# Half a minute is for what has begun when the time is over.
minutes=$(awk "BEGIN { print (570 - $SECONDS) / 60 }")
"$PYTHON" kernels/bench.py all --out "$OUT" --minutes "$minutes" ${BENCH:-} 2>&1 | tee "$OUT/bench.txt"
timed=$?

echo "tests ended with $tested, benchmarks with $timed, after $SECONDS s; see $OUT"
exit $((tested != 0 || timed != 0))
