#!/usr/bin/env bash
# All services that RepSep works with, on this machine and without a container: PostgreSQL, a Ceph RGW as the S3 store,
# an MLflow server over both, and the head of a Ray cluster with token authentication.
#
#   infra/dev/stack.sh install                     the packages (Debian, Ubuntu; as root); does nothing where they are
#   infra/dev/stack.sh up [FOLDER]                 start all; then `. FOLDER/env.sh` and use repsep, ray and mlflow
#   infra/dev/stack.sh restart SERVICE [FOLDER]    postgres, mlflow or ray: killed and started again, with what it held
#   infra/dev/stack.sh down [FOLDER]               end all; the objects are gone, the rest is in FOLDER
#
# FOLDER (default: .repsep/stack) takes databases, logs, pid files and env.sh, which holds the ports, for the other verbs
# too, and the secrets: random ones, made by the first `up`. The environment says the rest:
#
#   BIN          where mlflow and ray are          that of the python on the PATH
#   FIRST_PORT   for `up`: of ten ports in a row, under those that the system gives out (32768)
#                                                  those of the last `up` in FOLDER, else 17490
#   RAY_CPUS     CPUs of the Ray head              all
set -euo pipefail

HOST=127.0.0.1
HERE=$(cd "$(dirname "$0")" && pwd)
BIN=$(realpath -- "${BIN:-$(dirname "$(command -v python)")}")
START_SECONDS=${START_SECONDS:-180}

fail() {
    echo "stack: $*" >&2
    exit 1
}

verb=${1:-}
service=
if [[ $verb == restart ]]; then
    service=${2:-}
    shift
fi
FOLDER=$(realpath -m -- "${2:-$HERE/../../.repsep/stack}")
ENV=$FOLDER/env.sh

kept() { # NAME: its value in env.sh, nothing where there is none
    [[ ! -e $ENV ]] || sed -n "s/^export $1=//p" "$ENV"
}

KEPT_PORT=$(kept STACK_FIRST_PORT)
if [[ $verb == up ]]; then
    FIRST_PORT=${FIRST_PORT:-${KEPT_PORT:-17490}}
else
    FIRST_PORT=${KEPT_PORT:-${FIRST_PORT:-17490}}
fi
PG_PORT=$FIRST_PORT
MLFLOW_PORT=$((FIRST_PORT + 1))
RGW_PORT=$((FIRST_PORT + 2))
MON_PORT=$((FIRST_PORT + 3))
GCS_PORT=$((FIRST_PORT + 4))
DASHBOARD_PORT=$((FIRST_PORT + 5))
AGENT_PORT=$((FIRST_PORT + 6))
CLIENT_PORT=$((FIRST_PORT + 7))
PG_BIN=$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -1 || true)

install_packages() {
    "$HERE/ceph-rgw.sh" install
    [[ -z $PG_BIN ]] || return 0
    local root=()
    if ((EUID != 0)); then
        sudo -n true 2>/dev/null || fail "installing takes root: sudo apt-get install postgresql"
        root=(sudo -n)
    fi
    "${root[@]}" apt-get update -qq
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends postgresql
}

as_postgres() { # PostgreSQL refuses to run as root
    if [[ $(id -u) == 0 ]]; then
        runuser -u postgres -- "$@"
    else
        "$@"
    fi
}

secret() {
    od -An -tx1 -N24 /dev/urandom | tr -d ' \n'
}

write_env() { # anew, for the ports may be others; the secrets stay, as the database has them
    local password s3_secret token
    password=$(kept PGPASSWORD)
    s3_secret=$(kept AWS_SECRET_ACCESS_KEY)
    token=$(kept RAY_AUTH_TOKEN)
    password=${password:-$(secret)}
    (
        umask 077
        cat >"$ENV" <<END
export STACK_FIRST_PORT=$FIRST_PORT
export PGPASSWORD=$password
export STACK_BACKEND=postgresql+psycopg2://repsep:$password@$HOST:$PG_PORT/mlflow
export MLFLOW_TRACKING_URI=http://$HOST:$MLFLOW_PORT
export MLFLOW_DISABLE_TELEMETRY=true
export AWS_ENDPOINT_URL=http://$HOST:$RGW_PORT
export AWS_ACCESS_KEY_ID=repsep
export AWS_SECRET_ACCESS_KEY=${s3_secret:-$(secret)}
export AWS_REGION=us-east-1
export AWS_DEFAULT_REGION=us-east-1
export AWS_REQUEST_CHECKSUM_CALCULATION=when_required
export AWS_RESPONSE_CHECKSUM_VALIDATION=when_required
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN=${token:-$(secret)}
export RAY_ADDRESS=$HOST:$GCS_PORT
export RAY_API_SERVER_ADDRESS=http://$HOST:$DASHBOARD_PORT
export OMP_WAIT_POLICY=passive
END
    )
}

wait_for() { # NAME WHAT COMMAND...
    local name=$1 what=$2 deadline=$((SECONDS + START_SECONDS))
    shift 2
    until "$@" >/dev/null 2>&1; do
        kill -0 "$(<"$FOLDER/run/$name.pid")" 2>/dev/null || fail "$what ended; see $FOLDER/log/$name.log"
        ((SECONDS < deadline)) || fail "$what does not answer after $START_SECONDS s; see $FOLDER/log/$name.log"
        sleep 0.2
    done
    echo "stack: $what is up"
}

listens() { # PORT
    (exec 3<>"/dev/tcp/$HOST/$1") 2>/dev/null
}

mlflow_answers() {
    [[ $(curl -sf "http://$HOST:$MLFLOW_PORT/health") == OK ]]
}

ray_answers() { # to whom has the token; without it the answer is 401
    [[ $(curl -s -o /dev/null -w '%{http_code}' "http://$HOST:$DASHBOARD_PORT/api/version") =~ ^(200|401|403)$ ]]
}

background() { # NAME COMMAND...
    local name=$1
    shift
    setsid "$@" >>"$FOLDER/log/$name.log" 2>&1 </dev/null &
    echo $! >"$FOLDER/run/$name.pid"
}

end() { # NAME: the process group that `background` started
    local name=$1 file=$FOLDER/run/$1.pid pid deadline
    [[ -e $file ]] || return 0
    pid=$(<"$file")
    kill -TERM -- "-$pid" 2>/dev/null || true
    deadline=$((SECONDS + 30))
    while kill -0 -- "-$pid" 2>/dev/null; do
        ((SECONDS < deadline)) || kill -KILL -- "-$pid" 2>/dev/null || true
        sleep 0.2
    done
    rm -f "$file"
    echo "stack: $name is down"
}

start_postgres() {
    local data=$FOLDER/postgres
    [[ -n $PG_BIN ]] || fail "PostgreSQL is not installed: infra/dev/stack.sh install"
    if [[ ! -e $data/PG_VERSION ]]; then
        mkdir -p "$data"
        [[ $(id -u) != 0 ]] || chown postgres "$data"
        local file=$data.password
        (umask 077 && echo "$PGPASSWORD" >"$file")
        [[ $(id -u) != 0 ]] || chown postgres "$file"
        as_postgres "$PG_BIN/initdb" -D "$data" -U repsep --auth=scram-sha-256 --pwfile="$file" \
            >>"$FOLDER/log/postgres.log" 2>&1 || fail "initdb failed; see $FOLDER/log/postgres.log"
        rm "$file"
    fi
    local command=("$PG_BIN/postgres" -D "$data" -p "$PG_PORT" -c listen_addresses="$HOST" -c unix_socket_directories=)
    if [[ $(id -u) == 0 ]]; then
        background postgres runuser -u postgres -- "${command[@]}"
    else
        background postgres "${command[@]}"
    fi
    wait_for postgres PostgreSQL "$PG_BIN/psql" -h "$HOST" -p "$PG_PORT" -U repsep -d postgres -c "select 1"
    "$PG_BIN/psql" -qh "$HOST" -p "$PG_PORT" -U repsep -d postgres -c "create database mlflow" 2>/dev/null || true
}

start_s3() {
    RGW_PORT=$RGW_PORT MON_PORT=$MON_PORT S3_ACCESS_KEY=$AWS_ACCESS_KEY_ID S3_SECRET_KEY=$AWS_SECRET_ACCESS_KEY \
        "$HERE/ceph-rgw.sh" start "$FOLDER/s3" >>"$FOLDER/log/s3.log" 2>&1 || fail "see $FOLDER/log/s3.log"
    "$BIN/python" -c 'import s3fs; fs = s3fs.S3FileSystem(); [fs.mkdir(b) for b in ("mlflow", "team")]'
    echo "stack: the S3 store is up, with the buckets mlflow and team"
}

start_mlflow() {
    # The address of the database, with its password, is in the environment and not in the list of processes.
    MLFLOW_BACKEND_STORE_URI=$STACK_BACKEND background mlflow "$BIN/mlflow" server --host "$HOST" --port "$MLFLOW_PORT" \
        --artifacts-destination s3://mlflow --serve-artifacts --workers 1 \
        --allowed-hosts "$HOST:$MLFLOW_PORT,localhost:$MLFLOW_PORT"
    wait_for mlflow MLflow mlflow_answers
}

start_ray() {
    local cpus=()
    [[ -n ${RAY_CPUS:-} ]] && cpus=(--num-cpus "$RAY_CPUS")
    RAY_ADDRESS='' background ray "$BIN/ray" start --head --block --node-ip-address "$HOST" --port "$GCS_PORT" \
        --dashboard-host "$HOST" --dashboard-port "$DASHBOARD_PORT" --dashboard-agent-listen-port "$AGENT_PORT" \
        --ray-client-server-port "$CLIENT_PORT" --min-worker-port 0 --max-worker-port 0 --disable-usage-stats "${cpus[@]}"
    wait_for ray "Ray's job server" ray_answers
}

is_up() { # by PostgreSQL's command line, which names the folder: after a reboot a pid may be anybody's
    [[ -e $FOLDER/run/postgres.pid ]] && grep -qzF "$FOLDER/postgres" "/proc/$(<"$FOLDER/run/postgres.pid")/cmdline"
}

up() {
    mkdir -p "$FOLDER/log" "$FOLDER/run"
    ! is_up 2>/dev/null || fail "the services of $FOLDER are up; first: infra/dev/stack.sh down $FOLDER"
    for port in "$PG_PORT" "$MLFLOW_PORT" "$RGW_PORT" "$GCS_PORT" "$DASHBOARD_PORT"; do
        ! listens "$port" || fail "something listens on port $port already; give another FIRST_PORT"
    done
    write_env
    . "$ENV"
    start_postgres
    start_s3
    start_mlflow
    start_ray
    echo "stack: ready; now: . $ENV"
}

down() {
    for name in ray mlflow postgres; do
        end "$name"
    done
    [[ ! -d $FOLDER/s3 ]] || "$HERE/ceph-rgw.sh" stop "$FOLDER/s3" >>"$FOLDER/log/s3.log" 2>&1
    echo "stack: down"
}

restart() {
    [[ -e $ENV ]] || fail "there is no stack in $FOLDER"
    . "$ENV"
    case $service in
    postgres | mlflow | ray) end "$service" && "start_$service" ;;
    *) fail "restart postgres, mlflow or ray: the store's objects lie in memory" ;;
    esac
}

case $verb in
install) install_packages ;;
up) up ;;
restart) restart ;;
down) down ;;
*) fail "use: stack.sh install | up [FOLDER] | restart SERVICE [FOLDER] | down [FOLDER]" ;;
esac
