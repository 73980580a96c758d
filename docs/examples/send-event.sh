#!/bin/sh
# Tell meterd what was used, with curl: one event, a list, lines, and CloudEvents in both modes.
#
#     sh send-event.sh ID [AGREEMENT]
#
# ID names the piece of work, and every event's id is made of it. That is what makes an event count once: send the same
# ids again, as often as you like, and they are duplicates. So take an id that your work has already (a request's, a
# job's), never a new one for each try.
#
# METERD_URL is where meterd listens (http://127.0.0.1:8787). METERD_TOKEN is a token with the scope "ingest", where
# meterd wants one.
set -eu

id=${1:?"usage: sh send-event.sh ID [AGREEMENT]"}
agreement=${2:-customer-1}
url=${METERD_URL:-http://127.0.0.1:8787}

answer=$(mktemp)
trap 'rm -f "$answer"' EXIT

# post BODY HEADER...: send one body until it is taken, and show the answer.
#
# meterd answers after the commit: 200 says that the events are on its disk. No answer (000), 429 or 5xx (503 from meterd,
# 502 from a proxy) says nothing, so the same body is sent again. The ids are in it, so what had arrived is a duplicate
# then. Any other status is a mistake in the request; sending it again would not help.
post() {
    body=$1
    shift
    for header in "$@"; do
        set -- "$@" -H "$header"
        shift
    done
    tries=0
    while :; do
        # The token goes in by curl's configuration on standard input, since everybody can read a command line.
        status=$(
            echo "${METERD_TOKEN:+header = \"Authorization: Bearer $METERD_TOKEN\"}" |
                curl -sS --config - --max-time 10 -o "$answer" -w '%{http_code}' \
                    "$@" --data-binary "$body" "$url/v1/events"
        ) || status=000
        case $status in
            200) break ;;
            000 | 429 | 5*) tries=$((tries + 1)) ;;
            *) tries=30 ;;
        esac
        if [ "$tries" -ge 30 ]; then
            echo "meterd has not taken $id ($status): $(cat "$answer")" >&2
            return 1
        fi
        sleep $((tries < 15 ? tries : 15))
    done
    cat "$answer"
    echo
    # An event that cannot be counted disturbs no other: it is in the answer with its reason, and kept by meterd.
    if ! grep -q '"rejected":\[\]' "$answer"; then
        echo "meterd keeps what it rejected; look: meterd dead-letters" >&2
        return 1
    fi
}

# 1. One event. The quantity is a number or a text, exact in either case.
post '{"id": "'"$id"'-one", "agreement": "'"$agreement"'", "meter": "tokens", "quantity": 1532}' \
    'Content-Type: application/json'

# 2. A list: faster, and each event has its own verdict.
post '[
    {"id": "'"$id"'-list-1", "agreement": "'"$agreement"'", "meter": "tokens", "quantity": 100},
    {"id": "'"$id"'-list-2", "agreement": "'"$agreement"'", "meter": "tokens", "quantity": "0.25"}
]' 'Content-Type: application/json'

# 3. One event a line (NDJSON).
post '{"id": "'"$id"'-line-1", "agreement": "'"$agreement"'", "meter": "tokens", "quantity": 12}
{"id": "'"$id"'-line-2", "agreement": "'"$agreement"'", "meter": "tokens", "quantity": 30}' \
    'Content-Type: application/x-ndjson'

# 4. A CloudEvent, whole (structured mode). Its identity is source and id; the subject is the agreement.
post '{
    "specversion": "1.0", "id": "'"$id"'-whole", "source": "/examples/curl", "type": "meterd.usage",
    "subject": "'"$agreement"'", "data": {"meter": "tokens", "quantity": 7}
}' 'Content-Type: application/cloudevents+json'

# 5. A CloudEvent in pieces (binary mode): its attributes are headers, its data the body.
post '{"meter": "tokens", "quantity": 5}' 'Content-Type: application/json' \
    'ce-specversion: 1.0' "ce-id: $id-pieces" 'ce-source: /examples/curl' 'ce-type: meterd.usage' \
    "ce-subject: $agreement"
