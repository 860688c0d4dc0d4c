#!/usr/bin/env bash
# Build Horovod from its published source against the torch of an environment, and install it there.
#
# Horovod 0.28.1 asks its compiler for C++14 and the headers of today's torch need C++17: a CMake toolchain file changes
# what "C++14" emits, and the source stays as it is. The wheel is kept by versions and options and used again.
set -euo pipefail

VERSION=0.28.1
SHA256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
CMAKE=3.31.10 # for machines without one; CMake 4 refuses what Horovod's third parties ask for

usage() {
    cat <<'END'
usage: scripts/install_horovod.sh [--python PYTHON] [--mpi] [--nccl] [--rebuild]

Builds Horovod 0.28.1 against the installed torch (about 3 minutes of a core) and installs it. Nothing is
done where that build is installed already, and a wheel that was built before is used again.

  --python PYTHON  of the environment; default: the active one, else .venv of this checkout
  --mpi            with MPI besides Gloo (needs mpicxx: apt install libopenmpi-dev openmpi-bin)
  --nccl           with NCCL for GPUs (needs the CUDA toolkit and NCCL's headers)
  --rebuild        don't use a wheel that was built before

Wheels lie in $SHARDWRIGHT_WHEELS, or shardwright/wheels below $XDG_CACHE_HOME (default ~/.cache).
END
}

fail() {
    echo "ERROR: install_horovod: $1" >&2
    exit 1
}

say() { echo "install_horovod: $1"; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${VIRTUAL_ENV:-$root/.venv}/bin/python
mpi=0 nccl=0 rebuild=0
while (($#)); do
    case $1 in
        --python) python=${2:-}; shift ;;
        --mpi) mpi=1 ;;
        --nccl) nccl=1 ;;
        --rebuild) rebuild=1 ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; fail "there is no option '$1'" ;;
    esac
    shift || fail "--python needs the path of an interpreter"
done
command -v "$python" > /dev/null || fail "there is no Python at '$python'. Make the environment first, or name it (--python)."

# In one start of Python: what it is, which torch and Horovod it has, and where it is.
read -r tag torch installed prefix < <("$python" - <<'END'
import platform, sys
from importlib.metadata import PackageNotFoundError, version
def found(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
tag = f"cp{sys.version_info[0]}{sys.version_info[1]}-{platform.system().lower()}-{platform.machine()}"
print(tag, found("torch"), found("horovod"), sys.prefix)
END
) || fail "$python doesn't run"
[[ $torch != none ]] || fail "the environment of $python has no torch. Install it first: pip install 'shardwright[torch]'."
options=gloo
((!mpi)) || options+=-mpi
((!nccl)) || options+=-nccl
build=horovod-$VERSION-torch-$torch-$tag-$options
stamp=$prefix/shardwright-horovod
if ((!rebuild)) && [[ $installed == "$VERSION" && -f $stamp && $(< "$stamp") == "$build" ]]; then
    say "$build is installed"
    exit 0
fi

cache=${SHARDWRIGHT_WHEELS:-${XDG_CACHE_HOME:-$HOME/.cache}/shardwright/wheels}
mkdir -p "$cache" 2> /dev/null || fail "$cache can't be written. Choose another folder (SHARDWRIGHT_WHEELS)."
wheels=("$cache/$build"/*.whl)
if ((rebuild)) || [[ ! -f ${wheels[0]} ]]; then
    command -v "${CXX:-c++}" > /dev/null || fail "there is no C++ compiler. Install one (Debian, Ubuntu: apt install g++ make), or name it (CXX)."
    ((!mpi)) || command -v mpicxx > /dev/null || fail "--mpi needs mpicxx. Install MPI (Debian, Ubuntu: apt install libopenmpi-dev openmpi-bin)."
    if ((nccl)); then
        command -v nvcc > /dev/null || [[ -n ${CUDA_HOME:-} ]] || fail "--nccl needs the CUDA toolkit. Put nvcc into PATH, or say where it is (CUDA_HOME)."
    fi
    if ! command -v make > /dev/null; then
        command -v ninja > /dev/null || fail "there is neither make nor ninja. Install one (Debian, Ubuntu: apt install make)."
        export CMAKE_GENERATOR=Ninja
    fi
    # A build of its own in a folder of its own: nobody waits for anybody, and a killed one only leaves litter.
    find "$cache" -maxdepth 1 -name 'building.*' -mmin +720 -exec rm -rf {} +
    work=$(mktemp -d "$cache/building.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    trap 'kill "${child:-$$}"; exit 130' INT TERM HUP
    if ! command -v cmake > /dev/null; then
        say "there is no cmake; fetching $CMAKE for this build"
        "$python" -m pip install --quiet --disable-pip-version-check --target "$work/cmake" "cmake==$CMAKE" || fail "cmake can't be fetched. Install it (Debian, Ubuntu: apt install cmake)."
        export PATH=$work/cmake/bin:$PATH PYTHONPATH=$work/cmake${PYTHONPATH:+:$PYTHONPATH}
    fi
    export CMAKE_TOOLCHAIN_FILE=$work/toolchain.cmake CMAKE_POLICY_VERSION_MINIMUM=3.5
    echo "set(CMAKE_PROJECT_INCLUDE \"$work/project.cmake\")" > "$work/toolchain.cmake"
    cat > "$work/project.cmake" <<'END'
set(CMAKE_CXX14_STANDARD_COMPILE_OPTION "-std=c++17")
set(CMAKE_CXX14_EXTENSION_COMPILE_OPTION "-std=gnu++17")
set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O2 -DNDEBUG")
END
    if ((nccl)); then
        export HOROVOD_GPU_OPERATIONS=NCCL
    else
        printf '%s\n' 'set(CMAKE_CUDA_COMPILER NOTFOUND)' 'set(CMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit TRUE)' >> "$work/project.cmake"
    fi
    if ((mpi)); then export HOROVOD_WITH_MPI=1; else export HOROVOD_WITHOUT_MPI=1; fi
    export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_GLOO=1
    export MAKEFLAGS=${MAKEFLAGS:--j$(nproc)}
    say "building $build (about 3 minutes of a core; once)"
    begin=$SECONDS
    echo "horovod==$VERSION --hash=sha256:$SHA256" > "$work/source.txt"
    "$python" -m pip wheel --disable-pip-version-check --no-cache-dir --no-deps --no-build-isolation \
        --no-binary horovod --wheel-dir "$work/wheel" --requirement "$work/source.txt" > "$work/log" 2>&1 &
    child=$!
    if ! wait "$child"; then
        cp "$work/log" "$cache/$build.log"
        tail -n 30 "$work/log" >&2
        fail "the build failed; all that it said is in $cache/$build.log"
    fi
    mkdir -p "$cache/$build"
    mv -f "$work"/wheel/*.whl "$cache/$build/" # whole or not at all
    wheels=("$cache/$build"/*.whl)
    say "built in $((SECONDS - begin)) s"
fi
rm -f "$stamp"
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall "${wheels[0]}" || fail "${wheels[0]} can't be installed. Try --rebuild."
"$python" -c 'import horovod.torch' || fail "${wheels[0]} doesn't load. Try --rebuild."
echo "$build" > "$stamp"
say "installed $build"
