# Sourced by the commands beside it: finds a Python that can run them and replaces the shell by it.
# A bare Debian has only python3.11; Ascend images and pyenv machines have others first on PATH.

run_python() {
    local script=$1 candidate
    shift
    # Servers start in a third of the time from byte code, so it must be written.
    unset PYTHONDONTWRITEBYTECODE
    for candidate in "${ASCEND_PATCH_PYTHON:-}" python3.11 python3 python3.12 python3.10 python; do
        if [[ -n $candidate ]] && "$candidate" -c \
            'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            exec "$candidate" "$script" "$@"
        fi
    done
    echo "ascend-patch: Python 3.10, 3.11 or 3.12 is needed and none was found. Install one" \
        "(Debian: apt-get install python3) or name it in ASCEND_PATCH_PYTHON." >&2
    exit 1
}
