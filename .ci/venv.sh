#!/usr/bin/env bash
# Bring a virtual environment to exactly the given requirement files; do nothing where it is there already.
#
#   .ci/venv.sh VENV PYTHON REQUIREMENTS...
#
# PYTHON '' keeps the interpreter that VENV has, or takes python3 for a new one. VENV/.installed names what was
# installed whole: the interpreter, then each file with its hash. It is written after an installation and removed
# before one, so that an interrupted one is never taken for finished. Another interpreter, a changed file or a moved
# folder builds VENV anew, so that nothing lingers that is no longer pinned; a file that is not in it yet is added.
set -euo pipefail

venv=$1 python=$2
shift 2
stamp=$venv/.installed

fail() {
    echo "error: $*" >&2
    exit 2
}

if [ -z "$python" ]; then
    if "$venv/bin/python" -c '' 2>/dev/null; then python=$venv/bin/python; else python=python3; fi
fi
"$python" -c '' 2>/dev/null ||
    fail "PYTHON ($python) does not run; choose an interpreter: make PYTHON=/path/to/python3.12"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "PYTHON ($python) is $("$python" -c 'import platform; print(platform.python_version())'), and 3.11 is the" \
        "least; choose another: make PYTHON=/path/to/python3.12"
if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
    fail "VENV ($venv) exists and is not a virtual environment; name another folder or remove it"
fi

# First line: the interpreter and the folder; then one line per file.
wanted=$("$python" - "$venv" "$@" <<'PYTHON'
import hashlib, pathlib, platform, sys
print("python", platform.python_version(), sys.base_prefix, pathlib.Path(sys.argv[1]).absolute())
for name in sys.argv[2:]:
    print(name, hashlib.sha256(pathlib.Path(name).read_bytes()).hexdigest())
PYTHON
)
installed=$(cat "$stamp" 2>/dev/null || true)

rebuild=
if [ "${wanted%%$'\n'*}" != "${installed%%$'\n'*}" ]; then rebuild=yes; fi
missing=()
while read -r name hash; do
    if ! grep -qxF "$name $hash" <<<"$installed"; then
        if grep -q "^$name " <<<"$installed"; then rebuild=yes; fi
        missing+=("$name")
    fi
done <<<"${wanted#*$'\n'}"
if [ -z "$rebuild" ] && [ ${#missing[@]} -eq 0 ]; then exit 0; fi

if [ -n "$rebuild" ]; then
    # The interpreter behind an environment: the one asked for may lie inside the folder to be removed.
    base=$("$python" -c 'import sys; print(sys._base_executable)')
    echo "$venv: new, with $("$base" --version)"
    rm -rf "$venv"
    "$base" -m venv "$venv"
    missing=("$@")
fi
arguments=()
for name in "$@"; do arguments+=(-r "$name"); done
# On a terminal pip shows its own progress; elsewhere one line is enough.
[ -t 1 ] || arguments+=(--quiet --quiet)
echo "$venv: installing ${missing[*]} (the downloads take minutes the first time)"
rm -f "$stamp"
SECONDS=0
"$venv/bin/python" -m pip install --disable-pip-version-check --no-input "${arguments[@]}"
if [ -z "$rebuild" ]; then
    # Files installed earlier are still there.
    wanted=$(printf '%s\n%s\n' "$wanted" "$installed" | awk '!seen[$1]++')
fi
printf '%s\n' "$wanted" >"$stamp.new"
mv "$stamp.new" "$stamp"
echo "$venv: ready after $SECONDS s"
