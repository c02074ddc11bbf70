# shellcheck shell=bash
# Sourced by launchers that have `usage`, which prints their help, and `die SENTENCE`, which ends them with exit code 2.

# parse_arguments VALUED PLAIN WORD...: `--NAME VALUE` sets the variable NAME, and `--NAME` sets it to yes; VALUED and
# PLAIN are their names, as in 'name|zone'. What comes after -- becomes the array `train`.
parse_arguments() {
  local valued="^--($1)\$" plain="^--($2)\$"
  shift 2
  train=()
  while (($#)); do
    if [[ "$1" =~ $valued ]]; then
      (($# > 1)) || die "$1 needs a value."
      printf -v "${1#--}" '%s' "$2"
      shift
    elif [[ "$1" =~ $plain ]]; then
      printf -v "${1#--}" yes
    elif [[ "$1" == --help || "$1" == -h ]]; then
      usage
      exit 0
    elif [[ "$1" == -- ]]; then
      # shellcheck disable=SC2034 # is for the launcher
      train=("${@:2}")
      return
    else
      stray "$1"
    fi
    shift
  done
}

stray() { # what becomes of any other word; a launcher may have its own
  die "there is no option '$1'; what belongs to lwd train comes after --. See --help."
}

require() { # NAME...: options that must be given
  local needed
  for needed in "$@"; do
    [[ -n "${!needed}" ]] || die "--$needed is missing; see --help."
  done
}
