#!/bin/sh
# Limits what every network interface of this container sends and receives to SFT_RATE (in tc's units, such as 100mbit;
# empty: no limit), then runs the command it is given. Needs NET_ADMIN where there is a limit.
set -eu

limit() {
  # A bucket smaller than one step's activations, or they would cross at once; 100 ms of traffic may wait.
  tc qdisc replace dev "$1" root tbf rate "$SFT_RATE" burst 8kb latency 100ms
}

if [ -n "${SFT_RATE:-}" ]; then
  for path in /sys/class/net/*; do
    interface=$(basename "$path")
    if [ "$interface" = lo ]; then continue; fi
    limit "$interface"
    # tbf shapes only what leaves an interface: what arrives is sent through a second one.
    if ! ip link add "in-$interface" type ifb; then
      echo "limit_rate: no ifb device to limit what arrives; unset SFT_RATE to run without a limit" >&2
      exit 1
    fi
    ip link set "in-$interface" up
    limit "in-$interface"
    tc qdisc add dev "$interface" handle ffff: ingress
    tc filter add dev "$interface" parent ffff: protocol all u32 match u32 0 0 action mirred egress redirect dev "in-$interface"
  done
fi

exec "$@"
