#!/usr/bin/env bash
# Two processes behind one Redis: each order is made once. Needs redis-server, redis-cli, curl and cargo; starts and stops all by
# itself. ORDERS_REDIS names the executable, if it is built already.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../../.."

work=$(mktemp -d)
pids=()
stop() {
    for pid in "${pids[@]}"; do kill -9 "$pid" 2>/dev/null || true; done
    wait 2>/dev/null || true
    rm -rf -- "$work"
}
trap stop EXIT

say() { printf '\n== %s\n' "$*"; }

# Prints the first line of a file that holds the words, once it is there.
line_of() {
    local file=$1 words=$2 left=600
    until grep -m 1 -- "$words" "$file" 2>/dev/null; do
        left=$((left - 1))
        if [ "$left" -eq 0 ]; then
            printf 'there is no "%s" in:\n%s\n' "$words" "$(cat "$file")" >&2
            exit 1
        fi
        sleep 0.1
    done
}

# Starts a process of the service; `address` is where it listens.
start() {
    REDIS_URL=unix://$work/redis.sock PORT=0 "$service" >"$work/$1" &
    pids+=($!)
    # So that the shell does not tell of its death.
    disown $!
    address=$(line_of "$work/$1" http:// | sed 's/.*at http/http/')
    printf 'process %d listens at %s\n' $! "$address"
}

# Sends an order, and prints status and body.
order() { curl --silent --show-error --max-time 30 -X POST -H "Idempotency-Key: $2" -w '%{http_code}' -o "$work/$3" "$1/orders" || true; }
show() {
    if [ "$2" = 000 ]; then printf '%s: no answer\n' "$1"; else printf '%s: %s, %s\n' "$1" "$2" "$(cat "$work/$3")"; fi
}

service=${ORDERS_REDIS-}
if [ -z "$service" ]; then
    cargo build --quiet --workspace --all-features --examples
    service=${CARGO_TARGET_DIR:-target}/debug/examples/orders_redis
fi

say "A Redis that writes everything down before it answers, and two processes"
redis-server --port 0 --unixsocket "$work/redis.sock" --dir "$work" --appendonly yes --appendfsync always >"$work/redis" &
pids+=($!)
line_of "$work/redis" "eady to accept connections" >/dev/null
start one
one=$address first=$!
start two
two=$address

say "The same order at both at once: one runs it, the other waits for the answer"
order "$one" order-1 a >"$work/a.status" &
left=$!
order "$two" order-1 b >"$work/b.status" &
wait "$left" $!
show "at one" "$(cat "$work/a.status")" a
show "at two" "$(cat "$work/b.status")" b

say "A retry gets the same, at once, from either"
show "at one" "$(order "$one" order-1 c)" c
show "at two" "$(order "$two" order-1 d)" d

say "Process one is killed while it works on another order"
order "$one" order-2 e >"$work/e.status" 2>/dev/null &
left=$!
# It works on it as soon as Redis knows of it.
until [ -n "$(redis-cli -s "$work/redis.sock" --raw --scan --pattern 'shop:*' | sed -n 2p)" ]; do sleep 0.05; done
kill -9 "$first"
wait "$left" || true
show "at one" "$(cat "$work/e.status")" e

say "Its lease is over after 2 s at most; until then the retry waits, and then it runs"
show "at two" "$(order "$two" order-2 f)" f
show "at two" "$(order "$two" order-2 g)" g
