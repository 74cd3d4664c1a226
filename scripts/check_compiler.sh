#!/bin/sh
# hnswlib has no wheels: report what is missing before pip fails with a page of compiler output.
set -eu
python=${1:-python3}

if ! command -v "$python" >/dev/null 2>&1; then
    echo "error: $python is not installed (embstore needs Python 3.11 or newer)" >&2
    exit 1
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $("$python" --version) is too old: embstore needs Python 3.11 or newer; try: make PYTHON=python3.11" >&2
    exit 1
}
if ! command -v c++ >/dev/null 2>&1 && ! command -v g++ >/dev/null 2>&1; then
    echo "error: found no C++ compiler; hnswlib is compiled from source and needs one" >&2
    echo "hint: Debian, Ubuntu: apt-get install g++   Fedora: dnf install gcc-c++   macOS: xcode-select --install" >&2
    exit 1
fi
header=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h
if [ ! -e "$header" ]; then
    echo "error: Python.h is missing ($header); hnswlib is compiled from source and needs it" >&2
    echo "hint: Debian, Ubuntu: apt-get install python3-dev   Fedora: dnf install python3-devel" >&2
    exit 1
fi
