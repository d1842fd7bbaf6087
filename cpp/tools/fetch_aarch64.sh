#!/usr/bin/env bash
# Usage: fetch_aarch64.sh OUT [PYTHON]
# Creates in OUT what cross-compiling for aarch64 and running the result on this machine need, without root privileges:
#
#   OUT/sysroot       Debian's arm64 libraries and headers: libc, libstdc++, OpenSSL, nlohmann-json; and its Python
#   OUT/packages      the Python packages of runtime.txt for that Python, which PYTHON's pip downloads
#   OUT/onnxruntime   ONNX Runtime's library and headers, from these packages and fetch_onnxruntime.sh
#   OUT/bin/run       runs an aarch64 program in QEMU, as on a Cortex-A76 (QEMU_CPU names another)
#   OUT/bin/python    runs Python in it
#
# QEMU is that of Debian 13: version 7.2 of Debian 12 crashes when a program loads ONNX Runtime.
# Does nothing if OUT is up to date. Exit codes: 2 usage, 3 not possible on this machine.
set -euo pipefail

compiler=g++-aarch64-linux-gnu
emulator=qemu-user emulator_suite=trixie
elsewhere="compile and run on an aarch64 machine, or set up a cross compiler for $(dirname "$0")/../cmake/aarch64.cmake"

fail() {  # CODE MESSAGE [FIX]
    echo "fetch_aarch64.sh: $2" >&2
    [ $# -lt 3 ] || echo "  fix:      $3" >&2
    exit "$1"
}
. "$(dirname "$0")/debian_packages.sh"

[ $# -ge 1 ] && [ $# -le 2 ] || fail 2 "the output folder must be given" "$0 OUT [PYTHON]"
python=${2:-python3}
tools=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1" || fail 3 "$1 cannot be created"
out=$(cd "$1" && pwd)
command -v aarch64-linux-gnu-g++ >/dev/null || fail 3 "the cross compiler is missing" "apt-get install $compiler"

# --- up to date? -----------------------------------------------------------------------------------------------------------
made=$(cat "$tools"/fetch_aarch64.sh "$tools"/debian_packages.sh "$tools/../../runtime.txt" | sha256sum)
[ "$(cat "$out/made" 2>/dev/null)" != "$made" ] || exit 0
rm -rf "$out/made" "$out/sysroot" "$out/packages" "$out/emulator" "$out/bin"
mkdir -p "$out"/sysroot/usr/{bin,lib,sbin} "$out/emulator" "$out/bin"

# --- libraries, headers, Python, QEMU --------------------------------------------------------------------------------------
codename=$(debian_codename "the sysroot must come" "$elsewhere")
for name in bin lib sbin; do ln -s usr/$name "$out/sysroot/$name"; done
debian_unpack "$out/sysroot" "$codename" arm64 dependencies "$elsewhere" \
    libc6-dev libssl-dev libstdc++6 nlohmann-json3-dev python3-minimal libpython3-stdlib
rm -rf "$out"/sysroot/usr/share/{doc,locale,man}
debian_unpack "$out/emulator" $emulator_suite "$(dpkg --print-architecture)" alone "$elsewhere" $emulator
mv "$out/emulator/usr/bin/qemu-aarch64" "$out/bin/"  # of one architecture among many; it needs no other file
rm -rf "$out/emulator"

cat >"$out/bin/run" <<'RUN'
#!/bin/sh
root=$(cd "$(dirname "$0")/.." && pwd)
QEMU_CPU=${QEMU_CPU:-cortex-a76} exec "$root/bin/qemu-aarch64" -L "$root/sysroot" "$@"
RUN
cat >"$out/bin/python" <<'RUN'
#!/bin/sh
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONHOME="$root/sysroot/usr" PYTHONPATH="$root/packages${PYTHONPATH:+:$PYTHONPATH}"
exec "$root/bin/run" "$root"/sysroot/usr/bin/python3 "$@"
RUN
chmod +x "$out/bin/run" "$out/bin/python"
version=$("$out/bin/python" -c 'import sys; print(*sys.version_info[:2], sep=".")') \
    || fail 3 "QEMU cannot run Python of Debian $codename" "$elsewhere"

# --- Python packages, ONNX Runtime -----------------------------------------------------------------------------------------
platforms=()
for glibc in 17 27 28; do platforms+=(--platform "manylinux_2_${glibc}_aarch64"); done
"$python" -m pip install --quiet --disable-pip-version-check --target "$out/packages" --no-deps --no-compile \
    --only-binary :all: --implementation cp --python-version "$version" "${platforms[@]}" -r "$tools/../../runtime.txt" \
    || fail 3 "the packages of runtime.txt for Python $version on aarch64 cannot be installed" "$python -m ensurepip"
"$tools/fetch_onnxruntime.sh" "$out/onnxruntime" "$out/bin/python" || exit $?
echo "$made" >"$out/made"  # last: its presence marks completion
