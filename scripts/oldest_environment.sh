#!/bin/sh
# The oldest versions that pyproject.toml allows, in an environment of their own: scripts/oldest_environment.sh PYTHON FOLDER
# Run twice, nothing is installed twice. PyPI has torch for Linux with CUDA only: about 6 GB on disk.
set -eu
python=$1 folder=$2
pins=$(dirname "$0")/oldest_versions.txt
if cmp -s "$pins" "$folder/installed.txt"; then exit 0; fi
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
pip="$folder/bin/python -m pip install --quiet --disable-pip-version-check"
$pip --requirement "$pins"
# as in the Makefile: compiled for AVX2 rather than for this CPU alone
flags=
if grep -qsw avx2 /proc/cpuinfo && grep -qsw fma /proc/cpuinfo; then flags="-mavx2 -mfma"; fi
HNSWLIB_NO_NATIVE=1 CFLAGS=$flags CXXFLAGS=$flags $pip --no-cache-dir "hnswlib==0.8.*"
cp "$pins" "$folder/installed.txt"
