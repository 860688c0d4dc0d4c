#!/bin/bash
# AWS's EFA software for user space, in a container's image: libfabric and NCCL's plugin for it, checked against the
# versions that the Dockerfile names. No kernel module, no Open MPI.
set -euo pipefail

: "${EFA_INSTALLER_VERSION:?}" "${EFA_INSTALLER_SHA256:?}" "${LIBFABRIC_VERSION:?}" "${OFI_NCCL_VERSION:?}"
amazon="${EFA_ROOT:-/opt/amazon}"
archive="aws-efa-installer-$EFA_INSTALLER_VERSION.tar.gz"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export DEBIAN_FRONTEND=noninteractive

fail() {
    printf 'install_efa.sh: %s\n' "$1" >&2
    exit 1
}

apt-get update
apt-get install -y --no-install-recommends ca-certificates curl
cd "$work"
curl --fail --silent --show-error --location --retry 3 --output "$archive" \
    "https://efa-installer.amazonaws.com/$archive"
echo "$EFA_INSTALLER_SHA256  $archive" | sha256sum --check --strict --quiet || fail "$archive isn't the one that was pinned"
tar -xzf "$archive"
# The flags that AWS's guide names for containers.
(cd aws-efa-installer && ./efa_installer.sh -y --skip-kmod --skip-limit-conf --no-verify)
rm -rf "$amazon"/openmpi* /var/lib/apt/lists/*

note="$amazon/efa_installed_packages"
grep -q "EFA installer version: $EFA_INSTALLER_VERSION\$" "$note" || fail "$note doesn't name $EFA_INSTALLER_VERSION"
said="$("$amazon/efa/bin/fi_info" --version)"
grep -qx "libfabric: $LIBFABRIC_VERSION" <<< "$said" || fail "fi_info isn't of libfabric $LIBFABRIC_VERSION: $said"

# Some installers leave libnccl-net-ofi.so alone, and NCCL looks for libnccl-net.so.
mapfile -t plugins < <(find "$amazon/ofi-nccl" -name 'libnccl-net*.so' | LC_ALL=C sort -r)
[ "${#plugins[@]}" -gt 0 ] || fail "there is no plugin below $amazon/ofi-nccl"
grep -aqF "aws-ofi-nccl $OFI_NCCL_VERSION" "${plugins[0]}" || fail "${plugins[0]} isn't aws-ofi-nccl $OFI_NCCL_VERSION"
folder="$(dirname "${plugins[0]}")"
[ -e "$folder/libnccl-net.so" ] || ln -s "$(basename "${plugins[0]}")" "$folder/libnccl-net.so"
ldconfig
