#!/usr/bin/env bash
# A PostgreSQL server for the tests marked "db": installed if it is missing, started on loopback in a temporary folder, stopped
# at the end. Usage: tests/db.sh COMMAND...; the command finds its address in ATTRIM_TEST_DB.
set -euo pipefail

bin() { compgen -G "/usr/lib/postgresql/*/bin" | sort -V | tail -1 || true; }

if [ -z "$(bin)" ]; then
  if ! command -v apt-get >/dev/null; then
    echo "test-db: no PostgreSQL under /usr/lib/postgresql, and no apt-get to install it. Install PostgreSQL, and try again." >&2
    exit 1
  fi
  root=""
  [ "$(id -u)" = 0 ] || root="sudo"
  echo "test-db: installing PostgreSQL" >&2
  $root apt-get update -q >/dev/null
  # Its own cluster is neither needed nor started.
  $root mkdir -p /etc/postgresql-common
  [ -e /etc/postgresql-common/createcluster.conf ] || echo "create_main_cluster = false" | $root tee /etc/postgresql-common/createcluster.conf >/dev/null
  DEBIAN_FRONTEND=noninteractive $root apt-get install -q -y --no-install-recommends postgresql >/dev/null
fi
PATH="$(bin):$PATH"

# The server refuses to run as root.
as=()
if [ "$(id -u)" = 0 ]; then
  id postgres >/dev/null 2>&1 || { echo "test-db: started as root, and there is no user 'postgres' to run the server as." >&2; exit 1; }
  as=(setpriv --reuid=postgres --regid=postgres --init-groups)
fi

folder="$(mktemp -d)"
chmod 755 "$folder"
if [ ${#as[@]} -gt 0 ]; then chown postgres "$folder"; fi
stop() {
  "${as[@]}" pg_ctl -D "$folder/data" -m immediate -w stop >/dev/null 2>&1 || true
  rm -rf "$folder"
}
trap stop EXIT
port="$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"

cd "$folder"
echo "attrim" >"$folder/password"
"${as[@]}" initdb -D "$folder/data" -U attrim --auth=scram-sha-256 --pwfile="$folder/password" -E UTF8 --locale=C >/dev/null
"${as[@]}" pg_ctl -D "$folder/data" -w -l "$folder/log" \
  -o "-c listen_addresses=127.0.0.1 -c port=$port -c unix_socket_directories=$folder -c fsync=off" start >/dev/null || {
  cat "$folder/log" >&2
  exit 1
}
cd - >/dev/null
export ATTRIM_TEST_DB="postgresql://attrim:attrim@127.0.0.1:$port/postgres"
"$@"
