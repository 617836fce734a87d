# Sourced by run_vlm_training.sh, run_vlm_inference.sh and run_tests.sh, which set `here` to this folder. Chooses the Python, in this order:
#   1. VLM_PYTHON, a Python to use as it is;
#   2. the active virtual environment, or the active conda environment unless it is "base": what is missing is installed into it;
#   3. a .venv in this folder that you made yourself, likewise;
#   4. the .venv in this folder that setup_env.py makes.
# shellcheck shell=bash disable=SC2154

stop() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

version_of() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

# Sets `python` and `kind` (given, active or own); ends the script where there is no Python that will do.
choose_python() {
  local own=$here/.venv/bin/python active=${VIRTUAL_ENV-} version
  if [ -z "$active" ] && [ "${CONDA_DEFAULT_ENV-}" != base ]; then
    active=${CONDA_PREFIX-}
  fi
  if [ -n "${VLM_PYTHON-}" ]; then
    kind=given
    python=$(command -v -- "$VLM_PYTHON") || stop "VLM_PYTHON is $VLM_PYTHON, which is not a program. Give the path of a Python."
  elif [ -n "$active" ] && [ -x "$active/bin/python" ] && ! [ "$active" -ef "$here/.venv" ]; then
    kind=active python=$active/bin/python
  elif [ -x "$own" ] && ! [ -e "$here/.venv/vlm-setup" ]; then
    kind=active python=$own
  else
    kind=own
    find_python "$own"
    return
  fi
  case $python in */*) python=$(CDPATH="" cd -- "${python%/*}/" && pwd)/${python##*/} ;; esac
  version=$(version_of "$python")
  case $version in
    "") stop "$python does not run. Give another Python by VLM_PYTHON, or leave the environment that it belongs to." ;;
    2.* | 3.? | 3.10) stop "$python is Python $version, but 3.11 or newer is needed." ;;
  esac
}

# The Python of .venv if it works, else one to make .venv with.
find_python() {
  local version seen=""
  for python in "$1" python3.13 python3.12 python3.11 python3 python; do
    version=$(version_of "$python")
    case $version in
      3.1[1-4]) return ;;
      ?*) seen="only Python $version was found" ;;
    esac
  done
  stop "Python 3.11 to 3.14 is needed, but ${seen:-none was found}. Install one, or give its path by VLM_PYTHON."
}

# Makes the chosen Python ready. Arguments: the requirement files on top of requirements.txt.
prepare_python() {
  choose_python
  "$python" "$here/setup_env.py" "$kind" "$@" || exit $?
  if [ "$kind" = own ]; then
    python=$here/.venv/bin/python
  fi
}

# Starts a program of this folder, in several processes if VLM_PROCESSES says so. Arguments: its file, then its flags.
start_program() {
  local program=$here/$1 argument launch=()
  shift
  for argument in "$@"; do
    case $argument in
      -h | --help) # needs no packages
        choose_python
        exec "$python" "$program" --help
        ;;
    esac
  done

  case ${VLM_PROCESSES:-1} in
    1) ;;
    config) launch=("$here/launch_processes.py") ;;
    # --multi_gpu stands for several processes: without it, accelerate starts only one on a machine without GPUs.
    [2-9] | [1-9][0-9]*)
      launch=("$here/launch_processes.py" --multi_gpu --num_processes "$VLM_PROCESSES" --num_machines 1
        --mixed_precision no --dynamo_backend no)
      ;;
    *) stop "VLM_PROCESSES is $VLM_PROCESSES; expected a whole number of at least 1, or config." ;;
  esac

  prepare_python
  # The MPS lines: all of the memory may be used, and what Apple's GPU cannot do is done by the CPU.
  export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM-false}"
  export PYTORCH_MPS_HIGH_WATERMARK_RATIO="${PYTORCH_MPS_HIGH_WATERMARK_RATIO-0.0}"
  export PYTORCH_ENABLE_MPS_FALLBACK="${PYTORCH_ENABLE_MPS_FALLBACK-1}"
  exec "$python" "${launch[@]}" "$program" "$@"
}
