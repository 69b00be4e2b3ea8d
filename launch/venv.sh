# shellcheck shell=bash
# Sourced by demo.sh, setup.sh, check.sh and test.sh: creates .venv in the project's folder and installs a requirements
# file into it, and again only after the file, or one that it includes, has changed.

prepare_venv() {
    local requirements=$1 python stamp
    stamp=.venv/installed-$(basename "$(dirname "$requirements")")
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        echo "creating .venv with $($python --version)"
        rm -rf .venv
        if ! "$python" -m venv .venv; then
            rm -rf .venv
            echo "error: $python cannot create a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
            return 1
        fi
    fi
    if ! cat requirements.txt "$requirements" | cmp --silent - "$stamp"; then
        echo "installing $requirements (about 6 GB with CUDA; a few minutes)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
        cat requirements.txt "$requirements" >"$stamp"
    fi
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or newer was not found on the PATH; install it" >&2
    return 1
}
