#!/bin/bash
# A real Slurm on one machine (munged, slurmctld, several slurmd), to be thrown away: for tests and contributors.
#
#   dev_cluster.sh install          the Debian packages (as root); starts no service
#   dev_cluster.sh start [N]        nodes n1 to nN, 2 unless said; needs no root, but for their names in /etc/hosts
#   dev_cluster.sh stop             ends every process of the cluster, jobs included
#   dev_cluster.sh status           0 if all nodes answer
#   dev_cluster.sh env              what a shell needs: eval "$(slurm/dev_cluster.sh env)"
#   dev_cluster.sh node-kill NODE   slurmd, steps and jobs of a node end at once, as at a loss of power
#   dev_cluster.sh slurmd-kill NODE slurmd alone ends; the tasks of the node live on
#   dev_cluster.sh node-start NODE  the node comes back
#   dev_cluster.sh controller-kill | controller-start
#
# SLURM_DEV_DIR [/tmp/slurm-dev-UID] and SLURM_DEV_PORT [26800] tell clusters on one machine apart: the controller
# listens on the port, nK on the K-th after it. Further, for `start`:
#   SLURM_DEV_MODE=isolated   every node has a network, hosts file and host name of its own (root): finds what works on
#                             one machine alone, such as MASTER_ADDR=127.0.0.1; [shared]
#   SLURM_DEV_GPUS=2  SLURM_DEV_CPUS=16   what each node claims to have; its GPUs are links to /dev/null
#   SLURM_DEV_TIMEOUT=20                  seconds until a node that does not answer is down
set -u -o pipefail
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"

DIR=${SLURM_DEV_DIR:-/tmp/slurm-dev-$(id -u)} PORT=${SLURM_DEV_PORT:-26800} MODE=${SLURM_DEV_MODE:-shared}
GPUS=${SLURM_DEV_GPUS:-2} CPUS=${SLURM_DEV_CPUS:-16} TIMEOUT=${SLURM_DEV_TIMEOUT:-20}
SUBNET=10.$((PORT / 256)).$((PORT % 256)) BRIDGE=slurm$PORT
HOSTS_MARK="# slurm/dev_cluster.sh $DIR"
export SLURM_CONF=$DIR/etc/slurm.conf

say() { echo "dev_cluster.sh: $*" >&2; }
fail() { say "$*"; exit 1; }
wait_for() { # SECONDS COMMAND...
  local end=$((SECONDS + $1)); shift
  until "$@"; do ((SECONDS < end)) || return 1; sleep 0.1; done
}

# Every process of the cluster carries its slurm.conf and a node's name in its environment: slurmd and what it starts,
# since Slurm sets both for jobs; the daemons of the whole cluster by the name "controller".
pids() { # [NODE]
  grep -slzxF "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ | xargs -r grep -slzxE "SLURMD_NODENAME=${1:-.+}" |
    cut -d/ -f3
}
kill_once() { # [NODE]: true if nothing was left to kill
  local found
  found=$(pids "$@")
  [ -z "$found" ] || { xargs kill -9 <<<"$found" 2>/dev/null; return 1; }
}
kill_all() { wait_for 10 kill_once "$@" || fail "cannot end the processes $(pids "$@" | xargs)"; }
daemon() { # NAME NODE COMMAND...: starts it, within what is given by "inside", and waits for its pid file
  local name=$1 node=$2; shift 2
  rm -f "$DIR/run/$name.pid"
  # PATH stands first since a slurmstepd, which inherits all this, writes its title over the beginning.
  "${inside[@]}" env -i PATH="$PATH" LANG=C.UTF-8 SLURM_CONF="$SLURM_CONF" SLURMD_NODENAME="$node" "$@" \
    </dev/null >>"$DIR/log/$name.log" 2>&1
  wait_for 10 running "$name" || { tail -n 5 "$DIR/log/$name.log" >&2; fail "$name did not start"; }
}
running() { kill -0 "$(cat "$DIR/run/$1.pid" 2>/dev/null || echo none)" 2>/dev/null; }
kill_daemon() { running "$1" && kill -9 "$(cat "$DIR/run/$1.pid")"; rm -f "$DIR/run/$1.pid"; }

nodes() { sed -nE 's/^NodeName=(n[0-9]+) .*/\1/p' "$SLURM_CONF" 2>/dev/null; }
require_node() { nodes | grep -qx "$1" || fail "there is no node '$1', only: $(nodes | xargs)"; }
all_answer() { [ "$(timeout 5 sinfo -hN -p dev -t idle,mix,alloc -o %N 2>/dev/null | sort -u)" = "$(nodes | sort)" ]; }

install() {
  [ "$(id -u)" = 0 ] || fail "install needs root"
  local policy=/usr/sbin/policy-rc.d made=0 rc # a package starts its service at once, unless this says no
  [ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy && made=1; }
  apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends \
    slurmctld slurmd slurm-client munge iproute2 util-linux
  rc=$?
  [ $made = 0 ] || rm -f $policy
  return $rc
}

configure() { # NUM_NODES
  local i version host address=127.0.0.1 gres=
  host=$(hostname -s)
  version=$(slurmctld -V | grep -oE '[0-9]+\.[0-9]+' | head -n 1)
  [ "$MODE" = shared ] || address=$SUBNET.254
  {
    cat <<CONF
ClusterName=dev
SlurmctldHost=$host($address)
SlurmctldPort=$PORT
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
# A requeued job waits for its credentials to expire, 120 s unless said.
AuthInfo=socket=$DIR/run/munge.sock,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd.%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
PropagateResourceLimits=NONE
SlurmdTimeout=$TIMEOUT
MessageTimeout=20
TCPTimeout=5
KillWait=5
MinJobAge=3600
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
# A job of the partition "high" has those of "dev" requeued, after a signal and their GraceTime.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# What nodes claim to have is not held against the machine.
SlurmdParameters=config_overrides
CONF
    if [ "$GPUS" -gt 0 ]; then
      gres="Gres=gpu:$GPUS"
      echo "GresTypes=gpu"
      for ((i = 0; i < GPUS; i++)); do
        ln -sf /dev/null "$DIR/etc/gpu$i"
        echo "Name=gpu File=$DIR/etc/gpu$i" >>"$DIR/etc/gres.conf"
      done
    fi
    for ((i = 1; i <= $1; i++)); do
      [ "$MODE" = shared ] || { address=$SUBNET.$i; host=n$i; }
      echo "$address n$i" >>"$DIR/etc/hosts"
      echo "NodeName=n$i NodeAddr=$address NodeHostname=$host Port=$((PORT + i)) CPUs=$CPUS RealMemory=65536 $gres"
    done
    echo "PartitionName=dev Nodes=ALL Default=YES MaxTime=60 DefaultTime=10 PriorityTier=1 GraceTime=30"
    echo "PartitionName=high Nodes=ALL MaxTime=60 DefaultTime=10 PriorityTier=10 PreemptMode=OFF"
  } >"$SLURM_CONF"
  # Newer versions look for cgroups even where nothing uses them; older ones know no such word.
  [[ $(printf '%s\n' 23.11 "$version" | sort -V | head -n 1) != 23.11 ]] || echo "CgroupPlugin=disabled" >"$DIR/etc/cgroup.conf"
}

connect() { # a node's name must be known on every other: MASTER_ADDR is the first of a job
  local node i=0
  if [ "$MODE" = shared ]; then
    { [ -z "$(tail -c 1 /etc/hosts)" ] || echo; sed "s|\$| $HOSTS_MARK|" "$DIR/etc/hosts"; } >>/etc/hosts ||
      fail "cannot write the nodes' names to /etc/hosts"
    return
  fi
  { echo "127.0.0.1 localhost"; echo "$SUBNET.254 $(hostname -s)"; } >>"$DIR/etc/hosts"
  ip link add "$BRIDGE" type bridge && ip addr add "$SUBNET.254/24" dev "$BRIDGE" && ip link set "$BRIDGE" up ||
    fail "cannot make a network: isolated nodes need root"
  for node in $(nodes); do
    i=$((i + 1))
    ip netns add "$BRIDGE-$node" && ip link add "$BRIDGE.$i" type veth peer name eth0 netns "$BRIDGE-$node" &&
      ip link set "$BRIDGE.$i" master "$BRIDGE" up && ip -n "$BRIDGE-$node" link set lo up &&
      ip -n "$BRIDGE-$node" addr add "$SUBNET.$i/24" dev eth0 && ip -n "$BRIDGE-$node" link set eth0 up ||
      fail "cannot make the network of $node"
  done
}
disconnect() {
  local node hosts
  if grep -qF "$HOSTS_MARK" /etc/hosts; then
    hosts=$(grep -vF "$HOSTS_MARK" /etc/hosts) && echo "$hosts" >/etc/hosts # in place: it may be a mount
  fi
  for node in $(nodes); do
    [ ! -e "/run/netns/$BRIDGE-$node" ] || ip netns del "$BRIDGE-$node"
  done
  [ ! -e "/sys/class/net/$BRIDGE" ] || ip link del "$BRIDGE"
}

inside=()
start_controller() { daemon slurmctld controller slurmctld -i -f "$SLURM_CONF"; }
start_node() { # NODE
  local inside=()
  running "slurmd.$1" && return
  mkdir -p "$DIR/spool/$1"
  if [ -e "/run/netns/$BRIDGE-$1" ]; then
    inside=(nsenter "--net=/run/netns/$BRIDGE-$1" unshare --uts --mount bash -c
      'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"' _ "$1" "$DIR/etc/hosts")
  fi
  daemon "slurmd.$1" "$1" slurmd -f "$SLURM_CONF" -N "$1"
}

start() { # NUM_NODES
  local node port tool
  [[ $1 =~ ^[1-9][0-9]?$ ]] || fail "start: give a number of nodes from 1 to 99, got '$1'"
  [[ $MODE =~ ^(shared|isolated)$ ]] || fail "SLURM_DEV_MODE must be shared or isolated, got '$MODE'"
  for tool in munged slurmctld slurmd sbatch; do
    command -v $tool >/dev/null || fail "$tool is missing: run $0 install, as root"
  done
  [ -e "$SLURM_CONF" ] || [ -z "$(ls -A "$DIR" 2>/dev/null)" ] || fail "$DIR holds something else than a cluster"
  [ -z "$(pids)" ] || fail "the cluster in $DIR runs already: $0 stop"
  disconnect
  for ((port = PORT; port <= PORT + $1; port++)); do
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && fail "port $port is in use: set SLURM_DEV_PORT to another"
  done
  trap '[ $? = 0 ] || stop' EXIT
  rm -rf "${DIR:?}"/{etc,run,state,spool} && mkdir -p "$DIR"/{etc,run,state,spool,log} && chmod 755 "$DIR" ||
    fail "cannot write to $DIR"
  configure "$1" && connect || exit 1
  (umask 077 && head -c 128 /dev/urandom >"$DIR/etc/munge.key")
  daemon munged controller munged --force --key-file="$DIR/etc/munge.key" --socket="$DIR/run/munge.sock" \
    --pid-file="$DIR/run/munged.pid" --log-file="$DIR/log/munged.log" --seed-file="$DIR/state/munge.seed"
  start_controller
  for node in $(nodes); do start_node "$node"; done
  wait_for 20 all_answer || { tail -n 5 "$DIR/log/slurmctld.log" >&2; fail "not all nodes answer"; }
  say "$1 nodes, $MODE; logs in $DIR/log"
  env_of_shell
}

stop() {
  kill_all
  disconnect
  rm -f "$DIR"/run/*
}

status() {
  timeout 10 sinfo -N -o '%N %P %t %c %G %E' && timeout 10 squeue -o '%i %P %j %T %M %R' && all_answer
}

env_of_shell() { echo "export SLURM_CONF=$SLURM_CONF"; }

case "${1:-}" in
  install | stop | status) "$1" ;;
  start) start "${2:-2}" ;;
  env) env_of_shell ;;
  node-kill) require_node "${2:-}"; kill_all "$2"; rm -f "$DIR/run/slurmd.$2.pid" ;;
  slurmd-kill) require_node "${2:-}"; kill_daemon "slurmd.$2" ;;
  node-start) require_node "${2:-}"; start_node "$2" ;;
  controller-kill) kill_daemon slurmctld ;;
  controller-start) start_controller ;;
  *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2 ;;
esac
