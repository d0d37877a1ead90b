#!/usr/bin/env bash
# Runs a command beside this node's raylet, and ends both together. In the images it is `with-raylet`.
#   with-raylet COMMAND [ARGUMENT...]
# KUBERAY_GEN_RAY_START_CMD  how this node joins its cluster (KubeRay sets it); has to end in --block
# RAYLET_START_TIMEOUT_S     longest wait for the raylet, default 300
# RAYLET_STOP_TIMEOUT_S      what the raylet gets to end, default 60: Ray waits 30 for its work
# RAYLET_SOCKET              where it listens once it is there
# SIGTERM and SIGINT go to the command. The raylet stays until the command has ended: a server needs
# it to stop its engines. Exit code: the command's; 1 if the raylet ended first or did not come.
set -u

[ $# -gt 0 ] || { echo "usage: with-raylet COMMAND [ARGUMENT...]" >&2; exit 2; }
start_command=${KUBERAY_GEN_RAY_START_CMD:?is not set: how does this node join its Ray cluster?}
start_timeout_s=${RAYLET_START_TIMEOUT_S:-300}
stop_timeout_s=${RAYLET_STOP_TIMEOUT_S:-60}
socket=${RAYLET_SOCKET:-/tmp/ray/session_latest/sockets/raylet}
raylet='' command='' stopping=''

say() { printf 'with-raylet: %s\n' "$*" >&2; }
is_alive() { [ -n "$1" ] && kill -0 "$1" 2>/dev/null; }
# A sleep that a signal ends.
rest() { sleep 0.2 & wait $!; }

# shellcheck disable=SC2329 # called by the trap
on_signal() {
  stopping=1
  if is_alive "$command"; then kill -TERM "$command"; fi
}
trap on_signal TERM INT

# shellcheck disable=SC2329 # called by the trap
end_raylet() {
  is_alive "$raylet" || return 0
  kill -TERM "$raylet"
  local deadline=$((SECONDS + stop_timeout_s))
  while is_alive "$raylet"; do
    if [ "$SECONDS" -ge "$deadline" ]; then
      say "the raylet did not end within $stop_timeout_s s (RAYLET_STOP_TIMEOUT_S): killed"
      kill -KILL "$raylet"
      break
    fi
    rest
  done
}
trap end_raylet EXIT

ulimit -n 65536 2>/dev/null || say "no more than $(ulimit -n) open files are allowed"
# Whatever Ray starts here would inherit the API keys, and has no use for them.
env -u SLIPSTREAM_API_KEYS -u SLIPSTREAM_API_KEY bash -c "exec $start_command" &
raylet=$!

deadline=$((SECONDS + start_timeout_s))
until [ -S "$socket" ]; do
  [ -z "$stopping" ] || exit 143
  is_alive "$raylet" || { say "ended at once: $start_command"; exit 1; }
  if [ $SECONDS -ge $deadline ]; then
    say "no raylet at $socket within $start_timeout_s s (RAYLET_START_TIMEOUT_S)"
    exit 1
  fi
  rest
done

[ -z "$stopping" ] || exit 143
"$@" &
command=$!
if [ -n "$stopping" ]; then kill -TERM "$command"; fi
while is_alive "$command" && is_alive "$raylet"; do rest; done
if is_alive "$command"; then
  say "the raylet has ended: stopping $1"
  kill -TERM "$command"
  while is_alive "$command"; do rest; done
  exit 1
fi
wait "$command"
exit $?
