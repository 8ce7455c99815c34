#!/usr/bin/env bash
# Runs all benchmarks on a machine with an accelerator and without a network, in one command that ends in time:
#
#   bash benchmarks/accelerator.sh --minutes 9 [the other flags of benchmarks/accelerator.py]
#   bash benchmarks/accelerator.sh receive         # only lists the pieces that have arrived so far
#
# It looks for a Python with JAX, installs the wheels of INBOX/*/wheels on top in a separate environment (ENVIRONMENT,
# outbox/environment), and runs the programme. Results go to OUT if that is set, else to outbox/out.
set -uo pipefail
begun=$SECONDS
cd "$(dirname "$0")/.." || exit 1
inbox=${INBOX:-inbox}
environment=${ENVIRONMENT:-outbox/environment}
out=${OUT:-outbox/out}

if [ "${1:-}" = receive ]; then
    find "$inbox" -type f -name '*.piece' -printf '%s %p\n'
    exit 0
fi

python=${PYTHON:-}
for candidate in python3 python3.12 python; do
    [ -n "$python" ] && break
    command -v "$candidate" >/dev/null && "$candidate" -c 'import jax' 2>/dev/null && python=$candidate
done
[ -n "$python" ] || { echo "found no Python with JAX; set PYTHON"; exit 1; }

prepare() {  # a virtual environment on top of $python's packages; $python may itself be in a virtual environment
    rm -rf "$environment"
    "$python" -m venv --without-pip "$environment" || return
    "$environment/bin/python" - "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" <<'EOF' || return
import pathlib, sys, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "below.pth").write_text(f"import site; site.addsitedir({sys.argv[1]!r})\n")
EOF
    wheels=$(ls -d "$inbox"/*/wheels 2>/dev/null | tail -n 1)
    [ -n "$wheels" ] || { echo "found no wheels: using the installed packages"; return 0; }
    pip=("$environment/bin/python" "$(ls "$wheels"/pip-*.whl)/pip" install --quiet --no-index --no-compile --find-links "$wheels")
    "${pip[@]}" -r "$wheels/requirements.txt" || {
        echo "not all requirements can be met; installing every wheel without dependencies"
        "${pip[@]}" --no-deps "$wheels"/*.whl
    }
}

stamp=$(ls "$inbox"/*/wheels 2>/dev/null) # without wheels the existing environment stays
if [ ! -e "$environment/stamp" ] || [ "${stamp:-$(cat "$environment/stamp")}" != "$(cat "$environment/stamp")" ]; then
    prepare && echo "$stamp" >"$environment/stamp" || { echo "the environment could not be created"; exit 1; }
fi
echo "environment: $((SECONDS - begun)) s"

# The time spent on the environment is subtracted; `timeout` is for a programme that fails to end by itself.
arguments=() seconds=0
while [ $# -gt 0 ]; do
    case $1 in
        --minutes) seconds=$(awk "BEGIN { print int(60 * $2) }"); shift 2 ;;
        --minutes=*) seconds=$(awk "BEGIN { print int(60 * ${1#*=}) }"); shift ;;
        *) arguments+=("$1"); shift ;;
    esac
done
left=$((seconds - (SECONDS - begun)))
[ "$left" -gt 0 ] || { echo "no time is left; give --minutes"; exit 1; }
timeout --kill-after=5 "$left" "$environment/bin/python" benchmarks/accelerator.py \
    --minutes "$(awk "BEGIN { print $left / 60 }")" --inbox "$inbox" --out "$out" "${arguments[@]}"
code=$?
find "$out" -type f -printf '%s %p\n'
exit $code
