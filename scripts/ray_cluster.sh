#!/usr/bin/env bash
# Ray on the nodes of a cluster: one head, any number of workers. Run it on each node, from the same checkout path.
#   scripts/ray_cluster.sh head [OPTIONS]             starts the head; prints its address and what to do next
#   scripts/ray_cluster.sh worker ADDRESS [OPTIONS]   joins this node to the head at ADDRESS (HOST:PORT)
#   scripts/ray_cluster.sh status                     the nodes that the head of this node knows
#   scripts/ray_cluster.sh stop                       ends what this script started on this node, and nothing else
# OPTIONS go to `ray start`, for example: --labels nodes=engines --num-gpus 8 --node-ip-address 10.0.0.1
#   RAY_CLUSTER_DIR      this node's Ray files, log and process id; short, and not shared between nodes
#   FOREGROUND=1         stay in the foreground until a signal, as a step of Slurm must
#   RAY_AUTH_TOKEN_PATH  the cluster's secret (default ~/.ray/auth_token): made by `head`, and to be copied to every
#                        node that does not share that file
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH="$PWD/.venv/bin:$PATH"
state=${RAY_CLUSTER_DIR:-/tmp/opsd-ray-$(id -un)}
token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
fail() { echo "error: $*" >&2; exit 2; }

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token # else whoever reaches the port may run code
export RAY_worker_niceness=0 # at Ray's 15 any other process of the node starves the run
export RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0}

is_running() { [[ -s $state/pid ]] && kill -0 "$(<"$state/pid")" 2>/dev/null; }

start() { # ray start's options
    is_running && fail "this node runs Ray already (process $(<"$state/pid")): scripts/ray_cluster.sh stop ends it"
    mkdir -p "$state"
    rm -f "$state/ray_current_cluster" "$state/pid"
    export RAY_gcs_server_port_wait_time_s=${RAY_gcs_server_port_wait_time_s:-120} # Ray's own patience is 30 s
    local command=(ray start --block --disable-usage-stats --temp-dir "$state" "$@")
    if [[ ${FOREGROUND:-} == 1 ]]; then
        echo $$ >"$state/pid"
        exec "${command[@]}"
    fi
    setsid "${command[@]}" >"$state/log" 2>&1 </dev/null &
    echo $! >"$state/pid"
    for ((i = 0; i < 600; i++)); do # a first start from a cold disk takes minutes
        [[ -s $state/ray_current_cluster ]] && return
        is_running || break
        sleep 0.5
    done
    tail -n 20 "$state/log" >&2
    stop
    fail "ray start failed; all of its output: $state/log"
}

stop() {
    is_running || { rm -f "$state/pid"; return 0; }
    local pid; pid=$(<"$state/pid")
    kill -TERM "$pid"
    for ((i = 0; i < 120; i++)); do
        kill -0 "$pid" 2>/dev/null || { rm -f "$state/pid"; return 0; }
        sleep 0.5
    done
    fail "process $pid has not ended within a minute"
}

case ${1:-} in
head)
    if [[ ! -s $token ]]; then
        mkdir -p "$(dirname "$token")"
        rm -f "$token" # an empty one would keep its rights
        (umask 077; python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$token")
    fi
    start --head --port 6379 --dashboard-host 127.0.0.1 "${@:2}"
    address=$(<"$state/ray_current_cluster")
    echo "head       $address; its token: $token"
    echo "join it    scripts/ray_cluster.sh worker $address"
    echo "use it     export RAY_ADDRESS=$address RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token"
    ;;
worker)
    [[ ${2:-} == *:* ]] || fail "expected scripts/ray_cluster.sh worker HOST:PORT, got '${2:-}'"
    [[ -s $token ]] || fail "no token at $token: copy the head's there, or set RAY_AUTH_TOKEN_PATH"
    start --address "$2" "${@:3}"
    echo "worker     of $2"
    ;;
status)
    is_running || fail "this node runs no Ray that scripts/ray_cluster.sh started"
    RAY_ADDRESS=$(<"$state/ray_current_cluster") exec ray status
    ;;
stop) stop ;;
*) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
