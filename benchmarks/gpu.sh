#!/usr/bin/env bash
# Install and measure on a GPU machine with python3, torch and triton. Steps with missing packages are skipped.
#   bash benchmarks/gpu.sh first|more|STEP… [options of gpu.py]
#   RESULTS=dir   folder of the results; "auto" uses its configs/*.json once they are copied to kernels/configs/
#   WHEELS=dir    wheels to install if the machine has no network
#   RAGTURBO_COMMIT=…   commit to record if the copy has no .git
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
# compute-sanitizer and nvcc.
export PATH=$PATH:/usr/local/cuda/bin
# A system's Python may refuse pip without this.
export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null)

# Compile all kernels at their real shapes while pip installs. An installation maps kernels/ to ragturbo.kernels; until
# then, a package of symbolic links does.
mkdir "$scratch/ragturbo" && ln -s "$PWD"/ragturbo/* "$scratch/ragturbo/" && ln -sfn "$PWD/kernels" "$scratch/ragturbo/kernels"
ln -s "$PWD/benchmarks" "$scratch/benchmarks"
if [ -n "$arch" ]; then
    # From that folder, because Python looks for packages in the current one first.
    (cd "$scratch" && exec "$python" -m benchmarks.compile_offline --sm "$arch" >compiled.txt 2>&1) &
    compiling=$!
fi

# Build native code for this GPU only.
export RAGTURBO_NATIVE=${RAGTURBO_NATIVE:-auto} RAGTURBO_ARCHS=${RAGTURBO_ARCHS:-$arch}
wheels=()
[ -n "$WHEELS" ] && wheels=("$WHEELS"/*.whl)
if ! "$python" -m pip install --quiet --no-index --no-build-isolation --no-deps -e . "${wheels[@]}"; then
    echo "gpu: the installation failed; running from the checkout, without ragturbo._native"
    for wheel in "${wheels[@]}"; do
        "$python" -m pip install --quiet --no-index --no-deps "$wheel" || echo "gpu: could not install $wheel"
    done
    [ -e ragturbo/kernels ] || { ln -s ../kernels ragturbo/kernels && trap 'rm -rf "$scratch" ragturbo/kernels' EXIT; }
fi
echo "gpu: installed after $SECONDS s"
if [ -n "$arch" ]; then
    wait $compiling || grep -e SPILLS -e Error "$scratch/compiled.txt"
    echo "gpu: kernels compiled after $SECONDS s"
fi
"$python" benchmarks/gpu.py --results "${RESULTS:-gpu-results}" --spent "$SECONDS" "$@"
