#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has python3, torch and triton. What is missing is skipped and named.
#   bash benchmarks/gpu.sh first|more|STEP… [options of gpu.py]
#   RESULTS=dir   receives the results; its configs/*.json, copied to kernels/configs/, are what `auto` then takes
#   WHEELS=dir    packages to install from, where the machine reaches no registry
#   RAGTURBO_COMMIT=…   the commit to write into the records of a copy that has no .git
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
# Where images keep compute-sanitizer and nvcc.
export PATH=$PATH:/usr/local/cuda/bin
# A system's own Python refuses pip unless told; what is installed is this folder by reference and the wheels.
export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null)

# All kernels at their real shapes are compiled on all cores while pip installs. An installation maps kernels/ into the
# package; until there is one, a package of links does.
mkdir "$scratch/ragturbo" && ln -s "$PWD"/ragturbo/* "$scratch/ragturbo/" && ln -sfn "$PWD/kernels" "$scratch/ragturbo/kernels"
if [ -n "$arch" ]; then
    # From another folder: Python looks for packages in the present one first.
    (cd "$scratch" && exec "$python" -m ragturbo.kernels.offline --sm "$arch" >compiled.txt 2>&1) &
    compiling=$!
fi

# Native code for this GPU alone: four targets would take four times as long.
export RAGTURBO_NATIVE=${RAGTURBO_NATIVE:-auto} RAGTURBO_ARCHS=${RAGTURBO_ARCHS:-$arch}
wheels=()
[ -n "$WHEELS" ] && wheels=("$WHEELS"/*.whl)
if ! "$python" -m pip install --quiet --no-index --no-build-isolation --no-deps -e . "${wheels[@]}"; then
    echo "gpu: the installation failed; running from the checkout, without ragturbo._native"
    for wheel in "${wheels[@]}"; do
        "$python" -m pip install --quiet --no-index --no-deps "$wheel" || echo "gpu: $wheel was not installed"
    done
    [ -e ragturbo/kernels ] || { ln -s ../kernels ragturbo/kernels && trap 'rm -rf "$scratch" ragturbo/kernels' EXIT; }
fi
echo "gpu: installed after $SECONDS s"
if [ -n "$arch" ]; then
    wait $compiling || grep -e SPILLS -e Error "$scratch/compiled.txt"
    echo "gpu: kernels compiled after $SECONDS s"
fi
"$python" benchmarks/gpu.py --results "${RESULTS:-gpu-results}" --spent "$SECONDS" "$@"
