#!/usr/bin/env bash
# Checks the container files as far as that goes without a container engine.
#   docker/check.sh                           seconds: do the files parse, does what they name exist, is everything pinned
#   docker/check.sh --root FOLDER [SEEN...]   minutes, as root, with 12 GB free: also makes a clean Debian in FOLDER
#       (debootstrap) and does there what docker/Dockerfile.cpu says; FOLDER must not exist and stays. pip and the
#       certificates are set up as on this machine; the folders SEEN, say a local package index, are visible in it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

root=
case "${1:-}" in
    "") ;;
    --root) root=${2:?--root needs a folder that does not exist yet}; seen=("${@:3}") ;;
    *) echo "check.sh: unknown argument $1; there is only --root FOLDER" >&2; exit 2 ;;
esac
[[ -z $root || $EUID -eq 0 ]] || { echo "check.sh: --root must run as root: it uses chroot and mount" >&2; exit 2; }
[[ -z $root || ! -e $root ]] || { echo "check.sh: $root exists already" >&2; exit 2; }

python=.venv/bin/python
[[ -x $python ]] || python=python3
PATH=$PWD/.venv/bin:$PATH
unchecked=("docker/Dockerfile: that it builds and runs (it needs a container engine and a GPU)")
need() { command -v "$1" >/dev/null || { echo "check.sh: $1 is missing: $2" >&2; exit 2; }; }

need hadolint "scripts/setup.sh installs it"
hadolint --config docker/.hadolint.yaml docker/Dockerfile docker/Dockerfile.cpu
echo "ok  the Dockerfiles parse, and hadolint finds nothing wrong in them"
"$python" docker/check_files.py
echo "ok  every path and script that they and compose.yaml name exists; images and packages are pinned"

if docker compose version >/dev/null 2>&1; then
    docker compose -f docker/compose.yaml --profile cpu --profile gpu config --quiet
    echo "ok  docker compose accepts compose.yaml"
else
    unchecked+=("compose.yaml by docker compose itself (it is not installed here); the three services running")
fi
if command -v promtool >/dev/null; then
    promtool check config docker/prometheus.yml >/dev/null
    echo "ok  promtool accepts prometheus.yml"
else
    unchecked+=("prometheus.yml by promtool (on Debian: apt install prometheus)")
fi

if [[ -n $root ]]; then
    need debootstrap "apt install debootstrap"
    unshare --mount "$python" docker/build_in_root.py docker/Dockerfile.cpu "$root" "${seen[@]}"
    echo "ok  the steps of docker/Dockerfile.cpu succeed in a clean Debian"
    unchecked+=("docker/Dockerfile.cpu on its own base image; in $root it was Debian with Debian's Python")
else
    unchecked+=("docker/Dockerfile.cpu: that its steps succeed (--root FOLDER does them in a clean Debian)")
fi
unchecked+=("Grafana loading docker/grafana/ (that its queries have answers: tests/integration/test_monitoring.py)")
printf 'not checked: %s\n' "${unchecked[@]}"
