#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has python3, torch and triton. What is missing is skipped and named.
#   PART=kernels|engine|breakdown|train   one part, at most 8 minutes; without it a quick cut of all, at most 8 minutes
#   RESULTS=dir   receives at most 8 files       CACHE=dir   keeps compiled kernels from run to run
#   WHEELS=dir    packages to install from, where the machine reaches no registry
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
if [ -n "$WHEELS" ]; then
    "$python" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl || echo "gpu: not every wheel of $WHEELS was installed"
fi
"$python" -m pip install --quiet --no-build-isolation --no-deps -e . || echo "gpu: the installation failed; running from the checkout"
exec "$python" benchmarks/gpu.py --part "${PART:-all}" --results "${RESULTS:-gpu-results}" ${CACHE:+--cache "$CACHE"} "$@"
