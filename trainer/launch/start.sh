#!/bin/bash
# The first thing that runs in a SageMaker container of `shardwright launch launcher=sagemaker`: unpacks the code,
# installs what the image lacks, and becomes the program that starts the training processes.
set -u
base="${SAGEMAKER_BASE_DIR:-/opt/ml}"
channel="$(cd "$(dirname "$0")" && pwd)"
code="$base/code"

fail() { # reason, exit code; SageMaker shows the beginning of this file
    mkdir -p "$base/output"
    [ -s "$base/output/failure" ] || printf '%s\n' "$1" > "$base/output/failure"
    printf '%s\n' "$1" >&2
    exit "$2"
}

command -v python3 > /dev/null || fail "ConfigError: SageMaker: the image has no python3. Choose another (launcher.image)." 2
mkdir -p "$code" || fail "TrainingError: SageMaker: the folder $code can't be made." 1
tar -xzf "$channel/code.tar.gz" -C "$code" || fail "TrainingError: SageMaker: $channel/code.tar.gz can't be unpacked." 1

export PYTHONPATH="$code/shardwright${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY:-}" ]; then
    export PIP_CACHE_DIR="${PIP_CACHE_DIR:-$SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY/pip}"
fi
python3 "$code/shardwright/trainer/launch/container_setup.py" "$base/output/failure" || exit $?

export SHARDWRIGHT_SCRIPT="$code/$SHARDWRIGHT_SCRIPT"
cd "$code" || exit 1
exec python3 "$code/shardwright/scripts/container.py"
