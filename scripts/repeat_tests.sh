#!/usr/bin/env bash
# Repeat tests beside a busy loop on every core: none may depend on how fast the machine is, or how free.
#     scripts/repeat_tests.sh 30                        every test that starts processes or measures memory
#     scripts/repeat_tests.sh 5 tests/cli -m "not slow"  any others, with pytest's arguments
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD OMP_NUM_THREADS=1
python=${PYTHON:-.venv/bin/python}
runs=${1:-30}
shift || true
[ $# -gt 0 ] || set -- -m "processes and not slow"

loops=()
trap 'kill "${loops[@]}"' EXIT
for _ in $(seq "$(env -u OMP_NUM_THREADS nproc)"); do
    "$python" -c "while True: pass" &
    loops+=($!)
done

failed=0
for run in $(seq "$runs"); do
    SECONDS=0
    if "$python" -m pytest -p no:cacheprovider "$@" >"${TMPDIR:-/tmp}/repeat_tests.$$"; then
        said=passed
    else
        said=FAILED failed=$((failed + 1))
        cat "${TMPDIR:-/tmp}/repeat_tests.$$"
    fi
    echo "run $run of $runs: $said in $SECONDS s, load $(cut -d ' ' -f 1 /proc/loadavg)"
done
rm -f "${TMPDIR:-/tmp}/repeat_tests.$$"
echo "$failed of $runs runs failed"
[ "$failed" = 0 ]
