#!/usr/bin/env bash
# A real S3 store on this machine, for development and tests: Ceph's RADOS Gateway with one monitor and one OSD, from
# the distribution's packages. It needs no container, no systemd and, but for `install`, no root.
#
#   infra/dev/ceph-rgw.sh install           the packages (Debian, Ubuntu); does nothing where they are
#   infra/dev/ceph-rgw.sh start [FOLDER]    start it; the last line says: ready ENDPOINT ACCESS_KEY SECRET_KEY
#   infra/dev/ceph-rgw.sh stop  [FOLDER]    end it, and with it all that it holds
#
# FOLDER (default: ceph-rgw-UID in $TMPDIR or /tmp) takes configuration, pid files and logs. Several stores run side by
# side if folder and ports differ. The environment says the rest:
#
#   RGW_PORT         port of the S3 endpoint            17480
#   MON_PORT         port of the monitor                17481
#   S3_ACCESS_KEY    key of the one user                repsep
#   S3_SECRET_KEY    its secret                         repsep-secret
#   STORE_BYTES      size of the store                  4294967296
#   START_SECONDS    limit for one step of start      60    (all of them together take 2 s on an idle laptop)
#
# NOTE the objects live in the OSD's memory, at 2 to 3 times their size, and are gone after `stop`. A full store makes
# a PUT wait, it does not refuse it. Nothing is encrypted or authenticated between the daemons; all listen on 127.0.0.1.
set -euo pipefail

HOST=127.0.0.1
RGW_PORT=${RGW_PORT:-17480}
MON_PORT=${MON_PORT:-17481}
S3_ACCESS_KEY=${S3_ACCESS_KEY:-repsep}
S3_SECRET_KEY=${S3_SECRET_KEY:-repsep-secret}
STORE_BYTES=${STORE_BYTES:-4294967296}
START_SECONDS=${START_SECONDS:-60}
PACKAGES=(radosgw ceph-mon ceph-osd ceph-common)
PROGRAMS=(radosgw radosgw-admin ceph-mon monmaptool ceph-osd ceph)

verb=${1:-}
FOLDER=$(realpath -m -- "${2:-${TMPDIR:-/tmp}/ceph-rgw-$(id -u)}")
CONF=$FOLDER/ceph.conf
LOG=$FOLDER/log

# Debian keeps some of them where an ordinary user's PATH does not look.
PATH=$PATH:/usr/sbin:/sbin
unset PYTHONPATH PYTHONHOME # the `ceph` command is a script of the system's own Python
unset CEPH_ARGS             # would add to every command line below

fail() {
    echo "ceph-rgw: $*" >&2
    exit 1
}

missing_programs() {
    local program
    for program in "${PROGRAMS[@]}"; do
        command -v "$program" >/dev/null || printf '%s ' "$program"
    done
}

# ---------------------------------------------------------------------------------------------------------- install

install_packages() {
    if [[ -z $(missing_programs) ]]; then
        echo "ceph-rgw: the packages are installed"
        return
    fi
    command -v apt-get >/dev/null || fail "there is no apt-get here; install ${PACKAGES[*]} by other means"
    local root=()
    if ((EUID != 0)); then
        sudo -n true 2>/dev/null || fail "installing takes root: sudo apt-get install ${PACKAGES[*]}"
        root=(sudo -n)
    fi
    local apt=("${root[@]}" env DEBIAN_FRONTEND=noninteractive timeout 600
        apt-get -y -o Acquire::http::Timeout=30 -o Acquire::Retries=2 -o DPkg::Lock::Timeout=120)
    # Package lists that are missing or stale make the first attempt fail; where they are good no update is needed.
    if ! "${apt[@]}" install --no-install-recommends "${PACKAGES[@]}"; then
        "${apt[@]}" update || fail "apt-get update failed; see above"
        "${apt[@]}" install --no-install-recommends "${PACKAGES[@]}" || fail "apt-get install failed; see above"
    fi
    local missing
    missing=$(missing_programs)
    [[ -z $missing ]] || fail "the packages are installed, but not on PATH: $missing"
}

# ------------------------------------------------------------------------------------------------------------ start

write_configuration() { # FSID
    cat >"$CONF" <<CONFIGURATION
[global]
fsid = $1
mon initial members = a
mon host = [v2:$HOST:$MON_PORT]
public addr = $HOST
cluster addr = $HOST
# One protocol is enough, and one port.
ms bind msgr1 = false
# No cephx: whoever can reach the loopback interface may do everything.
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
keyring = $FOLDER/keyring
run dir = $FOLDER/run
crash dir = $FOLDER/crash
log file = $LOG/\$name.log
# A socket's path may have 107 characters, a folder more; nobody asks here.
admin socket =
# One copy of everything, in few placement groups: there is one OSD.
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0

[mon]
mon data = $FOLDER/mon
mon cluster log file = $LOG/cluster.log
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
auth allow insecure global id reclaim = false
# Answer at once instead of gathering changes for a second: start takes 3 s less.
paxos propose interval = 0.05
paxos min wait = 0.01
# A nearly full disk is not this store's business.
mon data avail warn = 2
mon data avail crit = 1

[osd]
osd data = $FOLDER/osd
osd objectstore = memstore
memstore device bytes = $STORE_BYTES
# Its place in the CRUSH map is set below; by itself it would ask for this machine's name and disk.
osd class update on start = false
osd crush update on start = false

[client]
rgw data = $FOLDER/rgw
# Without tcp_nodelay small answers wait 40 ms for the client's acknowledgement.
rgw frontends = beast endpoint=$HOST:$RGW_PORT tcp_nodelay=1
rgw thread pool size = 32
rgw num control oids = 1
rgw enable usage log = false
rgw enable ops log = false
# Create buckets in whatever region a client names.
rgw relaxed region enforcement = true
# Free the memory of deleted objects soon.
rgw gc obj min wait = 10
rgw gc processor period = 10
rgw gc processor max time = 10
CONFIGURATION
}

# A command of at most START_SECONDS; its output is kept. If it fails, say what was being done, why, and where to look.
step() { # NAME COMMAND...
    local name=$1 status=0
    shift
    timeout -k 5 "$START_SECONDS" "$@" >"$LOG/$name.out" 2>&1 </dev/null || status=$?
    ((status == 0)) && return
    tail -n 5 "$LOG/$name.out" >&2
    ((status != 124)) || fail "$name took longer than $START_SECONDS s; see $LOG"
    fail "$name failed (exit status $status); see $LOG/$name.out"
}

# A daemon in a session of its own, so that neither ^C nor a closed terminal ends it. setsid does not fork here: the
# pid is the daemon's.
launch() { # PROGRAM OPTION...
    local program=$1
    shift
    setsid "$program" -c "$CONF" -f "$@" >"$LOG/$program.out" 2>&1 </dev/null &
    echo $! >"$FOLDER/run/$program.pid"
    # Until setsid has become the daemon, pid_of does not know it.
    until pid_of "$program" >/dev/null || ! kill -0 $! 2>/dev/null; do sleep 0.01; done
    # No "Killed" on the terminal if a failed start takes it back. Where it has ended already, wait_until says so.
    disown 2>/dev/null || true
}

wait_until() { # PROGRAM COMMAND...: poll until COMMAND succeeds, PROGRAM dies or time is up
    local program=$1 deadline=$((SECONDS + START_SECONDS))
    shift
    until "$@"; do
        pid_of "$program" >/dev/null || {
            tail -n 5 "$LOG/$program.out" >&2
            fail "$program ended while starting; see $LOG"
        }
        ((SECONDS < deadline)) || fail "$program was not ready after $START_SECONDS s; see $LOG"
        sleep 0.1
    done
}

osd_is_up() {
    timeout 10 ceph -c "$CONF" --connect-timeout 5 osd stat 2>>"$LOG/osd-stat.out" </dev/null | grep -q '1 up'
}

# bash opens the connection itself: curl may not be there.
gateway_answers() {
    # shellcheck disable=SC2016
    timeout 5 bash -c '
        exec 3<>"/dev/tcp/$1/$2" && printf "GET / HTTP/1.0\r\n\r\n" >&3 && IFS= read -r line <&3
        [[ $line == HTTP/*" 200 "* ]]' _ "$HOST" "$RGW_PORT" 2>/dev/null
}

someone_listens() { # PORT
    (exec 3<>"/dev/tcp/$HOST/$1") 2>/dev/null
}

start() {
    local missing fsid uuid port program
    missing=$(missing_programs)
    [[ -z $missing ]] || fail "not installed: $missing; run: $0 install"
    for program in ceph-mon ceph-osd radosgw; do
        ! pid_of "$program" >/dev/null || fail "already started in $FOLDER; run: $0 stop $FOLDER"
    done
    # What an earlier start left is removed. A folder that holds anything else is not ours to empty.
    if [[ -e $FOLDER/.ceph-rgw ]]; then
        rm -rf -- "${FOLDER:?}"/{mon,osd,rgw,run,log,crash}
    elif [[ -d $FOLDER && -n $(ls -A -- "$FOLDER") ]]; then
        fail "$FOLDER holds something else; name a folder that is empty or not there"
    fi
    # Otherwise a stranger's answer would pass for ours.
    for port in "$RGW_PORT" "$MON_PORT"; do
        ! someone_listens "$port" || fail "port $port is taken; choose others with RGW_PORT and MON_PORT"
    done
    mkdir -p -m 700 -- "$FOLDER"
    mkdir -p -- "$FOLDER"/{mon,osd,rgw,run,log,crash}
    : >"$FOLDER/.ceph-rgw"
    : >"$FOLDER/keyring"
    trap stop EXIT          # whatever goes wrong from here on, no daemon stays behind;
    trap 'exit 130' INT TERM HUP # a signal goes the same way

    fsid=$(</proc/sys/kernel/random/uuid)
    uuid=$(</proc/sys/kernel/random/uuid)
    write_configuration "$fsid"
    step monmap monmaptool --create --fsid "$fsid" --addv a "[v2:$HOST:$MON_PORT]" "$FOLDER/monmap" --clobber
    step mon-mkfs ceph-mon -c "$CONF" --mkfs -i a --monmap "$FOLDER/monmap"
    launch ceph-mon -i a
    step osd-new ceph -c "$CONF" --connect-timeout "$START_SECONDS" osd new "$uuid" 0
    step osd-crush ceph -c "$CONF" --connect-timeout "$START_SECONDS" osd crush add osd.0 1.0 root=default host=local
    step osd-mkfs ceph-osd -c "$CONF" -i 0 --mkfs --osd-uuid "$uuid"
    launch ceph-osd -i 0
    wait_until ceph-osd osd_is_up
    step user radosgw-admin -c "$CONF" user create --uid=repsep --display-name=repsep \
        --access-key="$S3_ACCESS_KEY" --secret-key="$S3_SECRET_KEY"
    launch radosgw -n client.rgw
    wait_until radosgw gateway_answers
    trap - EXIT INT TERM HUP
    echo "ready http://$HOST:$RGW_PORT $S3_ACCESS_KEY $S3_SECRET_KEY"
}

# ------------------------------------------------------------------------------------------------------------- stop

# The pid of a daemon that this script started in this folder and that still runs. The number alone proves nothing:
# after a reboot, or days later, it can be any process; so its command line has to name the program and this folder.
pid_of() { # PROGRAM
    local pid arguments=()
    [[ -f $FOLDER/run/$1.pid ]] || return 1
    pid=$(<"$FOLDER/run/$1.pid")
    [[ $pid =~ ^[1-9][0-9]*$ ]] || return 1
    { mapfile -t -d '' arguments <"/proc/$pid/cmdline"; } 2>/dev/null || return 1
    # A zombie has no arguments left.
    [[ ${arguments[0]:-} == "$1" || ${arguments[0]:-} == */"$1" ]] || return 1
    [[ ${arguments[1]:-} == -c && ${arguments[2]:-} == "$CONF" ]] || return 1
    echo "$pid"
}

stop() {
    local program pid deadline
    for program in radosgw ceph-osd ceph-mon; do
        if pid=$(pid_of "$program"); then
            # SIGKILL on purpose: asked politely, the OSD writes all it holds to disk first. Nothing here is kept.
            kill -KILL "$pid"
            deadline=$((SECONDS + 10))
            while pid_of "$program" >/dev/null; do
                ((SECONDS < deadline)) || fail "$program (pid $pid) does not end"
                sleep 0.05
            done
        fi
        rm -f -- "$FOLDER/run/$program.pid"
    done
}

case $verb in
install) install_packages ;;
start) start ;;
stop) stop ;;
*)
    sed -n '5,7p' "$0" | cut -c 5- >&2 # the usage above
    exit 2
    ;;
esac
