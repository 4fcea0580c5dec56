#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has python3, torch and triton. What is missing is skipped and named.
#   PART=kernels|engine|breakdown|train   one part, at most 8 minutes; without it a quick cut of all, at most 8 minutes
#   RESULTS=dir   receives at most 8 files; its configs/*.json, copied to kernels/configs/, are what `auto` then takes
#   CACHE=dir     keeps compiled kernels from run to run
#   STEPS="tune sanitizer"   of a part, only the steps whose names begin so: what it had no time for, in a further call
#   WHEELS=dir    packages to install from, where the machine reaches no registry
#   RAGTURBO_COMMIT=…   the commit to write into the records of a copy that has no .git
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
# Where images keep compute-sanitizer.
export PATH=$PATH:/usr/local/cuda/bin
# A system's own Python refuses pip unless told; what is installed is this folder by reference and the wheels that were brought.
export PIP_BREAK_SYSTEM_PACKAGES=1
if [ -n "$WHEELS" ]; then
    # One at a time: pip installs none of several if one does not fit the machine.
    for wheel in "$WHEELS"/*.whl; do
        "$python" -m pip install --quiet --no-index --no-deps "$wheel" || echo "gpu: $wheel was not installed"
    done
fi
if ! "$python" -m pip install --quiet --no-build-isolation --no-deps -e .; then
    echo "gpu: the installation failed; running from the checkout, without ragturbo._native"
    # An installation maps kernels/ into the package; here a link does.
    [ -e ragturbo/kernels ] || { ln -s ../kernels ragturbo/kernels && trap 'rm -f ragturbo/kernels' EXIT; }
fi
"$python" benchmarks/gpu.py --part "${PART:-all}" --results "${RESULTS:-gpu-results}" ${CACHE:+--cache "$CACHE"} ${STEPS:+--only $STEPS} --spent "$SECONDS" "$@"
