#!/usr/bin/env bash
# The first hour with a GPU: benchmarks/first_hour.sh [OUT]
#
# In order of value, and each part goes on where an earlier call was cut:
#   1. the tests marked gpu                                      OUT/logs/tests.txt
#   2. python -m benchmarks gpu                                  OUT/gpu/*.json
#   3. rows of CIFAR-10, each with kNN and linear evaluation     OUT/runs/RECIPE, OUT/rows.json
#
# On a bare machine, unpack the bundle that `benchmarks/first_hour.sh --bundle FILE` wrote elsewhere, and start the
# script that is in it: it installs the wheels that it carries where a package is missing. torch and torchvision, with
# NumPy and Pillow, must be there: they are too large to carry. CIFAR-10 is carried if CIFAR10 names it when the bundle
# is written.
#
# Variables:
#   PYTHON     the Python to use                                       python3
#   CIFAR10    a folder of shards, train and val, or an archive of images, train/CLASS and test/CLASS
#              (data/cifar10 or data/cifar10.tar.* beside the code)
#   RECIPES    what to train, the most valuable first
#   OVERRIDES  keys that every training gets, such as schedule.steps=4
#   EVAL_OPTIONS  options that both evaluations get
#   GPU_OPTIONS  options for the benchmark; on a CPU: --device cpu --tiny
#   TESTS      the tests to choose from                                tests
#   MINUTES    nothing is started after this time, and a training is stopped then (it can be resumed)   55
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
CIFAR10=${CIFAR10:-$(ls -d data/cifar10 data/cifar10.tar.* 2>/dev/null | head -1 || true)}
RECIPES=${RECIPES:-cifar10_msf cifar10_nnclr cifar10_simclr cifar10_byol cifar10_moco_v2 cifar10_simsiam cifar10_swav \
    cifar10_cmsf_2q cifar10_nnsiam}
MINUTES=${MINUTES:-55}
LIMIT=$((64 * 1024 * 1024))
WHEELS="simplejpeg omegaconf antlr4-python3-runtime pyyaml webdataset braceexpand submitit cloudpickle typing_extensions \
    safetensors typer click rich shellingham markdown-it-py mdurl pygments tqdm joblib threadpoolctl \
    tensorboard absl-py grpcio markdown protobuf werkzeug markupsafe packaging tensorboard-data-server setuptools \
    pytest pytest-timeout pluggy iniconfig"

bundle() { # FILE: code, wheels and data in one archive
    local file=$1
    folder=$(mktemp -d) # not local: the trap runs after the function
    trap 'rm -rf "$folder"' EXIT
    mkdir "$folder/hpcssl"
    git archive HEAD | tar -x -C "$folder/hpcssl"
    "$PYTHON" -m pip wheel -q --no-deps --wheel-dir "$folder/hpcssl/wheels" $WHEELS
    mkdir "$folder/hpcssl/data"
    if [ -d "$CIFAR10" ]; then
        cp -r "$CIFAR10" "$folder/hpcssl/data/cifar10"
    elif [ -f "$CIFAR10" ]; then
        cp "$CIFAR10" "$folder/hpcssl/data/cifar10.tar.${CIFAR10##*.}"
    else
        echo "first_hour: no CIFAR-10 at '$CIFAR10': the bundle has none" >&2
    fi
    tar -czf "$file" -C "$folder" hpcssl
    local size
    size=$(stat -c %s "$file")
    if [ "$size" -gt "$LIMIT" ]; then
        echo "first_hour: $file: $size bytes (expected at most $LIMIT). Fix: leave the data out" >&2
        rm "$file"
        exit 1
    fi
    echo "first_hour: $file, $((size / 1024)) KiB"
}

if [ "${1:-}" = --bundle ]; then
    bundle "${2:?name the file of the bundle}"
    exit
fi

OUT=$(mkdir -p "${1:-runs/first_hour}" && cd "${1:-runs/first_hour}" && pwd)
DEADLINE=$(($(date +%s) + 60 * MINUTES))
left() { echo $((DEADLINE - $(date +%s))); }
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

NEEDED="joblib, omegaconf, pytest, safetensors, simplejpeg, submitit, tensorboard, tqdm, typer, webdataset"
if [ -d wheels ] && ! "$PYTHON" -c "import $NEEDED" 2>/dev/null; then
    "$PYTHON" -m pip install -q --no-index --no-deps --target "$OUT/packages" wheels/*.whl
fi
[ ! -d "$OUT/packages" ] || export PYTHONPATH="$PYTHONPATH:$OUT/packages"

mkdir -p "$OUT/logs" "$OUT/runs" "$OUT/done"
failed=0
part() { # NAME COMMAND ...: run a part unless it is done, for as long as there is time
    local name=$1 code=0
    shift
    [ ! -e "$OUT/done/$name" ] || return 0
    if [ "$(left)" -lt 60 ]; then
        echo "first_hour: $name: no time left; the same command goes on here"
        return 0
    fi
    # in the foreground: an interrupt from the terminal reaches the part as well
    echo "== $name ($(($(left) / 60)) minutes left)"
    timeout --foreground --signal=TERM --kill-after=120 "$(left)" "$@" 2>&1 | tee -a "$OUT/logs/$name.txt" || code=$?
    case $code in
        0) touch "$OUT/done/$name" ;;
        75 | 124 | 137 | 143) echo "first_hour: $name was cut; the same command goes on here" ;;
        *) echo "first_hour: $name failed with exit code $code" >&2; failed=1 ;;
    esac
}

part tests "$PYTHON" -m pytest -m gpu --timeout 600 ${TESTS:-tests}
part gpu "$PYTHON" -m benchmarks gpu --out "$OUT/gpu" ${GPU_OPTIONS:-}

if [ -f "$CIFAR10" ]; then
    unpack='mkdir -p "$2/images" && tar -xf "$1" -C "$2/images" --strip-components "$3" &&
        for pair in train:train test:val; do
            "$4" -m data_prep images "$2/images/${pair%:*}" "$2/cifar10/${pair#*:}" || exit
        done && rm -r "$2/images"'
    depth=$(tar -tf "$CIFAR10" | grep -m1 -o '^.*train/' | tr -cd / | wc -c || true)
    part shards bash -c "$unpack" unpack "$CIFAR10" "$OUT" $((depth - 1)) "$PYTHON"
    CIFAR10=$OUT/cifar10
fi
if [ -d "$CIFAR10/train" ]; then
    for recipe in $RECIPES; do
        part "$recipe" "$PYTHON" -m hpcssl train "$recipe" --run "$OUT/runs/$recipe" "data.train=$CIFAR10/train" \
            "data.val=$CIFAR10/val" machine.checkpoint_minutes=2 ${OVERRIDES:-}
        [ -e "$OUT/done/$recipe" ] || continue
        for name in knn linear; do
            part "$recipe-$name" "$PYTHON" -m hpcssl eval "$name" --run "$OUT/runs/$recipe" ${EVAL_OPTIONS:-}
        done
        "$PYTHON" -m hpcssl results --json "$OUT"/runs/*/ >"$OUT/rows.json" || true
    done
else
    echo "first_hour: no CIFAR-10 (expected shards or an archive). Fix: set CIFAR10" >&2
fi
echo "first_hour: results, rows and checkpoints are in $OUT"
exit "$failed"
