#!/bin/sh
# Tell meterd what was used, over MQTT: as JSON, and as a bare number.
#
#     sh mqtt-publish.sh ID [AGREEMENT]
#
# ID names the piece of work, and every event's id is made of it: sent again, it is a duplicate.
#
# MQTT_HOST and MQTT_PORT are the broker that a [[sources]] entry of kind "mqtt" listens to (127.0.0.1, 1883).
# Connect meterd once before the first message: a broker keeps messages only for a session that it knows.
set -eu

id=${1:?"usage: sh mqtt-publish.sh ID [AGREEMENT]"}
agreement=${2:-customer-1}
host=${MQTT_HOST:-127.0.0.1}
port=${MQTT_PORT:-1883}

# publish OPTIONS...: publish one message until the broker has it.
#
# -q 1: the broker says that it has the message. It is neither sent with 0, which may lose it, nor retained (-r), which
# would bring it back with every new connection: meterd refuses both. Without an answer the same message is sent again,
# with the same id.
publish() {
    tries=0
    until mosquitto_pub -h "$host" -p "$port" -q 1 "$@"; do
        tries=$((tries + 1))
        [ "$tries" -lt 30 ] || return 1
        sleep 1
    done
}

# 1. JSON. The topic names the agreement (or its escrow) and the meter, so the payload need not.
publish -t "meterd/usage/$agreement/tokens" -m '{"id": "'"$id"'-json", "quantity": 250}'

# 2. A bare number, for the smallest of devices: with MQTT 5 the id is a user property.
publish -V 5 -D publish user-property id "$id-bare" -t "meterd/usage/$agreement/tokens" -m 80
