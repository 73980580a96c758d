#!/bin/sh
# Tell meterd what was used, over a Redis stream: with flat fields, and with one field that holds JSON.
#
#     sh redis-add.sh ID [AGREEMENT]
#
# ID names the piece of work, and every event's id is made of it: sent again, it is a duplicate. (Without an id the
# entry's own serves, and then an entry that is added twice counts twice.)
#
# REDIS_URL is the server that a [[sources]] entry of kind "redis" reads (redis://127.0.0.1:6379/0), STREAM its stream.
set -eu

id=${1:?"usage: sh redis-add.sh ID [AGREEMENT]"}
agreement=${2:-customer-1}
redis=${REDIS_URL:-redis://127.0.0.1:6379/0}
stream=${STREAM:-meterd:usage}

# add FIELD VALUE...: add one entry until the server has it.
#
# The answer is the entry's id, and says that the server has it. Without an answer it may have it or not, so the same
# fields are added again; meterd counts the second entry as a duplicate. (-e: an error is a failure.) MAXLEN keeps the
# stream from growing without end. It must be far above what can wait while meterd is away.
add() {
    tries=0
    until redis-cli -e -u "$redis" XADD "$stream" MAXLEN '~' 1000000 '*' "$@"; do
        tries=$((tries + 1))
        [ "$tries" -lt 30 ] || return 1
        sleep 1
    done
}

# 1. Flat fields. What a price may look at goes into dimensions.NAME.
add id "$id-flat" agreement "$agreement" meter tokens quantity 12 dimensions.kind input

# 2. One field `event` with the same JSON that HTTP takes, CloudEvents too.
add event '{"id": "'"$id"'-json", "agreement": "'"$agreement"'", "meter": "tokens", "quantity": "0.5"}'
