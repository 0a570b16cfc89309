#!/usr/bin/env bash
# A training run on a Slurm cluster; launch/slurm.sh --help.
set -euo pipefail

usage() {
  cat <<'END'
Submits a training run to Slurm: one process per GPU, requeued when it is preempted, runs out of time or fails.

  launch/slurm.sh --nodes 4 --gpus 8 --time 24:00:00 -- train --config configs/pretrain/llama_8b_pod.py
  launch/slurm.sh --nodes 2 --gpus 0 --tasks 2 --sbatch --partition=cpu -- train --config configs/quickstart.py
  launch/slurm.sh --dry-run --nodes 4 -- train --config configs/pretrain/llama_8b_pod.py

What follows -- are the arguments of jaxlm; every process gets the same ones, and finds the others through Slurm.

  --nodes N        hosts (default 1)
  --gpus N         of each (default 8)
  --tasks N        processes of each (default: one per GPU)
  --time T         as of sbatch (default 24:00:00); five minutes before its end all processes save at one step
  --restarts N     how often a run that fails is started again (default 10); preemption and the end of time do not count
  --sbatch OPTION  one more option of sbatch, as often as needed
  --dry-run        print the command instead

Run it from the checkout, on a file system that the nodes share, with jaxlm in .venv there or in the environment. Logs:
runs/slurm-JOB.log, each line with the number of its process. Stop: scancel JOB sends SIGTERM, and all save if the
cluster's KillWait allows; for more time, scontrol update JobId=JOB Requeue=0, then scancel --signal=TERM JOB. Nothing is
left behind but the run's folder and the log.
END
}

die() { echo "slurm: $*" >&2; exit 2; }

submit() {
  local command=(
    sbatch --job-name=jaxlm --nodes="$nodes" --ntasks-per-node="${tasks:-$gpus}" --time="$time"
    --requeue --signal=TERM@300 --open-mode=append --output=runs/slurm-%j.log
  )
  if ((gpus > 0)); then command+=(--gpus-per-node="$gpus"); fi
  command+=("${more[@]}" "$0" --restarts "$restarts" -- "$@")
  if [[ $dry ]]; then printf '%q ' "${command[@]}"; echo; return; fi
  mkdir -p runs
  "${command[@]}"
}

train() { # inside the job
  local status=0 jaxlm=jaxlm
  if [[ -x .venv/bin/jaxlm ]]; then jaxlm=.venv/bin/jaxlm; fi
  # When one process has ended the others have a minute: those that save at one step end within seconds of each other,
  # and those that wait for one that died would wait for ever.
  srun --label --wait=60 "$jaxlm" "$@" || status=$?
  echo "slurm: ended with status $status, after ${SLURM_RESTART_COUNT:-0} restarts"
  # 75: saved before the end of its time, or before another job took the nodes.
  if ((status == 75 || (status != 0 && ${SLURM_RESTART_COUNT:-0} < restarts))); then
    scontrol requeue "$SLURM_JOB_ID" || echo "slurm: not requeued"
  fi
  return "$status"
}

nodes=1 gpus=8 tasks='' time=24:00:00 restarts=10 dry='' more=()
while (($#)); do
  case $1 in
    --nodes | --gpus | --tasks | --time | --restarts)
      (($# > 1)) || die "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    --sbatch) (($# > 1)) || die "$1 needs a value"; more+=("$2"); shift 2 ;;
    --dry-run) dry=yes; shift ;;
    --help | -h) usage; exit ;;
    --) shift; break ;;
    *) die "unknown argument $1; see --help" ;;
  esac
done
(($#)) || die "give the arguments of jaxlm after --"
if [[ ${SLURM_JOB_ID:-} && ! $dry ]]; then train "$@"; else submit "$@"; fi
