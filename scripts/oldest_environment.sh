#!/bin/sh
# The oldest versions that pyproject.toml allows, in an environment of their own: scripts/oldest_environment.sh PYTHON FOLDER
# Run twice, nothing is installed twice. PyPI has torch for Linux with CUDA only: about 6 GB on disk.
# Exit status 75 means that the package index cannot be reached; any other failure, such as a pin that nothing satisfies, is 1.
set -eu
python=$1 folder=$2
pins=$(dirname "$0")/oldest_versions.txt
if cmp -s "$pins" "$folder/installed.txt"; then exit 0; fi
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
run_pip() { "$folder/bin/python" -m pip "$@" --quiet --disable-pip-version-check; }
fail() {
  probe=$(mktemp -d) status=75
  if run_pip download --no-cache-dir --no-deps --dest "$probe" pip >/dev/null 2>&1; then status=1; fi
  rm -r "$probe"
  exit "$status"
}
run_pip install --requirement "$pins" || fail
# as in the Makefile: compiled for AVX2 rather than for this CPU alone
flags=
if grep -qsw avx2 /proc/cpuinfo && grep -qsw fma /proc/cpuinfo; then flags="-mavx2 -mfma"; fi
export HNSWLIB_NO_NATIVE=1 CFLAGS="$flags" CXXFLAGS="$flags"
run_pip install --no-cache-dir "hnswlib==0.8.*" || fail
cp "$pins" "$folder/installed.txt"
