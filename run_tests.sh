#!/usr/bin/env bash
# Checks the program, in the same environment as run_vlm_training.sh plus requirements-dev.txt:
#   ./run_tests.sh                      style, import contract, types, and all tests in as many processes as there are cores (up to 4)
#   ./run_tests.sh --fast               the same without the tests that are marked slow
#   ./run_tests.sh -k resume -x         pytest only, in one process, with these arguments (paths are those of this folder)

script=$(readlink -f -- "${BASH_SOURCE[0]}" 2>/dev/null) || script=${BASH_SOURCE[0]}
here=$(CDPATH="" cd -- "$(dirname -- "$script")" && pwd)
# shellcheck source=setup_env.sh
. "$here/setup_env.sh"
prepare_python requirements-dev.txt

cd -- "$here" || exit 1
if [ $# -eq 0 ] || [ "$*" = --fast ]; then
  "$python" -m ruff check . || exit $?
  "$python" -m ruff format --check . || exit $?
  "$python" -c "from importlinter.cli import lint_imports_command; lint_imports_command()" --no-logo || exit $?
  "$python" -m mypy || exit $?
  [ $# -eq 0 ] || selection=(-m "not slow")
  set -- "${selection[@]}" --numprocesses logical --maxprocesses 4 --dist loadfile # each process takes about 1.5 GB
fi
exec "$python" -m pytest "$@"
