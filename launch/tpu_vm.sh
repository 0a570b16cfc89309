#!/usr/bin/env bash
# A training run on TPU VMs of Google Cloud; launch/tpu_vm.sh --help.
set -euo pipefail

usage() {
  cat <<'END'
Asks for a TPU slice, installs this checkout on its hosts, trains, and starts again whatever stops the run.

  launch/tpu_vm.sh run --name r1 --zone us-east5-a --type v5p-128 --bucket my-runs --spot -- train --config configs/...
  launch/tpu_vm.sh run --name r1 --zone us-east5-a --type v5litepod-256 --slices 4 --bucket my-runs -- train ...
  launch/tpu_vm.sh logs   --name r1 --zone us-east5-a    what process 0 printed, followed as it grows
  launch/tpu_vm.sh stop   --name r1 --zone us-east5-a    SIGTERM: all processes save at one step and end
  launch/tpu_vm.sh delete --name r1 --zone us-east5-a    gives the TPUs back; until then they cost money

What follows -- are the arguments of jaxlm; every host gets the same ones.

  --name NAME      of the queued resource, and of its nodes
  --zone ZONE      --type TYPE: as in `gcloud compute tpus accelerator-types list`, e.g. v4-64, v5litepod-64, v6e-256
  --slices N       nodes of that type, joined over the data-centre network (default 1)
  --bucket NAME    a bucket that every host sees as the folder runs/ (gcsfuse): the run's folder must outlive the hosts
  --spot           cheaper, and taken away at any time
  --version NAME   of the machine image (default: the one for the type)
  --restarts N     how often a run that fails is started again (default 10); one that lost its hosts always is
  --poll SECONDS   between two looks at the run (default 60)
  --dry-run        print the commands instead

"run" may be stopped and called again: it finds its TPUs, and the run where it is. Logs stay on the hosts in ~/jaxlm.log;
metrics, heartbeats and stacks of a hanging process are in the run's folder in the bucket.
END
}

die() { echo "tpu_vm: $*" >&2; exit 2; }
do_or_say() { if [[ $dry ]]; then printf '%q ' "$@"; echo; else "$@"; fi; }
tpus() { do_or_say gcloud compute tpus "$@" --zone="$zone"; }

# On a host, from one boot to the next: .pid is the number of the process, .status what it ended with.
# shellcheck disable=SC2016  # the host expands it
here='${TMPDIR:-/tmp}/jaxlm'

nodes() { if ((slices == 1)); then echo "$name"; else seq -f "$name-%g" 0 $((slices - 1)); fi; }

on_hosts() { # WORKERS COMMAND: on those workers of every node
  local node
  for node in $(nodes); do tpus tpu-vm ssh "$node" --worker="$1" --command="$2"; done
}

image() {
  case $type in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

state() {
  tpus queued-resources describe "$name" --format='value(state.state)' 2>/dev/null || echo ABSENT
}

ask_for_tpus() {
  local place=(--node-id="$name")
  if ((slices > 1)); then place=(--node-count="$slices" --node-prefix="$name"); fi
  tpus queued-resources create "$name" "${place[@]}" --accelerator-type="$type" \
    --runtime-version="${version:-$(image)}" ${spot:+--spot}
}

give_back() { tpus queued-resources delete "$name" --force --quiet; }

have_tpus() { # returns once they are there; status 1 if some had to be waited for
  local found waited=0
  while found=$(state) && [[ $found != ACTIVE ]]; do
    echo "tpu_vm: $name is $found"
    waited=1
    case $found in
      ABSENT) ask_for_tpus ;;
      FAILED | SUSPENDED) give_back ;;
    esac
    sleep "$poll"
  done
  return $waited
}

install() {
  local node archive
  archive=$(mktemp -d)/jaxlm.tar.gz
  do_or_say git -C "$(dirname "$0")/.." archive --format=tar.gz -o "$archive" HEAD
  for node in $(nodes); do tpus tpu-vm scp "$archive" "$node:jaxlm.tar.gz" --worker=all; done
  on_hosts all 'mkdir -p jaxlm && tar xzf jaxlm.tar.gz -C jaxlm && cd jaxlm && pip install -q uv &&
    python3 -m uv venv -q --allow-existing --python 3.12 && python3 -m uv pip install -q -e ".[tpu]"'
  if [[ $bucket ]]; then
    on_hosts all "command -v gcsfuse || { echo \"deb https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main\" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list && sudo apt-get update -q && sudo apt-get install -qy gcsfuse; }
      mkdir -p jaxlm/runs && { mountpoint -q jaxlm/runs || gcsfuse --implicit-dirs $bucket jaxlm/runs; }"
  fi
}

start() { # a process that outlives the connection, with its number and then its exit status in files
  local line
  printf -v line '%q ' .venv/bin/jaxlm "${arguments[@]}"
  line+="& echo \$! >$here.pid; wait \$!; echo \$? >$here.status"
  on_hosts all "cd jaxlm && rm -f $here.status && (nohup bash -c $(printf %q "$line") >>../jaxlm.log 2>&1 &)"
}

stop() { # all save at one step; those that have not within ten minutes are killed
  on_hosts all "p=\$(cat $here.pid 2>/dev/null) && kill -TERM \$p && for i in \$(seq 600); do
    kill -0 \$p || exit 0; sleep 1; done 2>/dev/null && kill -KILL \$p; true"
}

outcome() { # lost, failed, running, none (never started there), stopped or done: the first that is true of any host
  local found
  found=$(on_hosts all "cat $here.status 2>/dev/null ||
    { kill -0 \$(cat $here.pid) && echo running; } 2>/dev/null || echo none" 2>/dev/null) || found=lost
  if [[ $found == lost ]]; then echo lost
  elif grep -qvxE '0|75|running|none' <<<"$found"; then echo failed
  elif grep -qx running <<<"$found"; then echo running
  elif grep -qx none <<<"$found"; then echo none
  elif grep -qx 75 <<<"$found"; then echo stopped
  else echo "done"
  fi
}

run() {
  local left=$restarts started=''
  while true; do
    have_tpus || started=''
    case $(outcome)$started in
      running*) started=-here ;;
      done*) echo "tpu_vm: done; give the TPUs back with: $0 delete --name $name --zone $zone"; return ;;
      lost*) echo "tpu_vm: some hosts do not answer" ;;
      stopped-here)
        sleep "$poll" # what takes the hosts away stops their processes first
        [[ $(state) != ACTIVE ]] || { echo "tpu_vm: stopped and saved; the same command goes on"; return 75; }
        ;;
      *)
        if [[ $started ]]; then
          ((left > 0)) || die "failed, and no restarts are left; see: $0 logs --name $name --zone $zone"
          left=$((left - 1))
          echo "tpu_vm: failed; starting again, $left restarts left"
          stop
        fi
        install
        start
        started=-here
        ;;
    esac
    sleep "$poll"
  done
}

action=${1:-} name='' zone='' type='' slices=1 bucket='' spot='' version='' restarts=10 poll=60 dry=''
case $action in run | logs | stop | delete) shift ;; -h | --help) usage; exit ;; *) usage >&2; exit 2 ;; esac
while (($#)); do
  case $1 in
    --name | --zone | --type | --slices | --bucket | --version | --restarts | --poll)
      (($# > 1)) || die "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    --spot) spot=yes; shift ;;
    --dry-run) dry=yes; shift ;;
    --help | -h) usage; exit ;;
    --) shift; break ;;
    *) die "unknown argument $1; see --help" ;;
  esac
done
arguments=("$@")
[[ $name && $zone ]] || die "give --name and --zone"

case $action in
  run)
    ((${#arguments[@]})) || die "give the arguments of jaxlm after --"
    [[ $type ]] || die "give --type"
    if [[ $dry ]]; then ask_for_tpus; install; start; else run; fi
    ;;
  logs) tpus tpu-vm ssh "$(nodes | head -n 1)" --worker=0 --command='tail -n +1 -F jaxlm.log' ;;
  stop) stop ;;
  delete) give_back ;;
esac
