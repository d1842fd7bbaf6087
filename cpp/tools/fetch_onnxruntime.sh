#!/usr/bin/env bash
# Usage: fetch_onnxruntime.sh OUT [PYTHON]
# Creates OUT/include and OUT/lib for -DONNXRUNTIME_ROOT=OUT, without root privileges.
#
# The library is copied from PYTHON's onnxruntime package. The Python package has no headers: they are taken from Debian 13's
# libonnxruntime-dev, which is downloaded with a private apt configuration and unpacked, not installed. On other systems
# unpack a release archive of ONNX Runtime instead.
# Does nothing if OUT is up to date. Exit codes: 2 usage, 3 not possible on this machine.
set -euo pipefail

suite=trixie
package=libonnxruntime-dev

fail() {  # CODE MESSAGE [FIX]
    echo "fetch_onnxruntime.sh: $2" >&2
    [ $# -lt 3 ] || echo "  fix:      $3" >&2
    exit "$1"
}

[ $# -ge 1 ] && [ $# -le 2 ] || fail 2 "the output folder must be given" "$0 OUT [PYTHON]"
out=$1
python=${2:-python3}
archive="unpack a release archive of ONNX Runtime 1.28 or later, and pass its folder: -DONNXRUNTIME_ROOT=FOLDER"
mkdir -p "$out/include" "$out/lib" || fail 3 "$out cannot be created"

# --- the library -----------------------------------------------------------------------------------------------------------
capi=$("$python" -c '
import importlib.util, pathlib, sys
spec = importlib.util.find_spec("onnxruntime")
if spec is None or not spec.submodule_search_locations:
    sys.exit(1)
print(pathlib.Path(spec.submodule_search_locations[0]) / "capi")') \
    || fail 3 "$python has no onnxruntime package" "$python -m pip install onnxruntime"
library=$(find "$capi" -maxdepth 1 -name 'libonnxruntime.so.1.*' | sort | tail -n 1)
[ -n "$library" ] || fail 3 "$capi has no libonnxruntime.so.1.*" "$archive"
copy=$out/lib/$(basename "$library")
if ! cmp -s "$library" "$copy"; then
    find "$out/lib" -maxdepth 1 -name 'libonnxruntime*' -delete
    cp -L "$library" "$copy.partial" && mv "$copy.partial" "$copy" || fail 3 "$copy cannot be written"
fi
ln -sf "$(basename "$library")" "$out/lib/libonnxruntime.so.1"
ln -sf libonnxruntime.so.1 "$out/lib/libonnxruntime.so"
for provider in "$capi"/libonnxruntime_providers_*.so; do  # loaded from the same directory
    [ ! -e "$provider" ] || cmp -s "$provider" "$out/lib/$(basename "$provider")" || cp -L "$provider" "$out/lib/"
done

# --- the headers -----------------------------------------------------------------------------------------------------------
[ ! -f "$out/include/onnxruntime_c_api.h" ] || exit 0
. "$(dirname "$0")/debian_packages.sh"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
debian_unpack "$work" "$suite" "$(dpkg --print-architecture)" alone "$archive" "$package"
headers=$(dirname "$(find "$work" -name onnxruntime_c_api.h | head -n 1)")
[ -n "$headers" ] && [ "$headers" != . ] || fail 3 "$package has no onnxruntime_c_api.h" "$archive"
find "$headers" -maxdepth 1 -name '*.h' ! -name onnxruntime_c_api.h -exec cp {} "$out/include/" \;
cp "$headers/onnxruntime_c_api.h" "$out/include/"  # last: its presence marks completion
