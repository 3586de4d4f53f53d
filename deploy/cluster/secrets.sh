#!/bin/sh
# Creates a cluster's secrets in the folder `secrets`, with certificates for nodes of these names or IPv4 addresses:
#
#   ./secrets.sh nats-1 nats-2 nats-3
#
# If the folder exists and has `ca.key`, only the nodes' certificate is replaced: to renew it, or for more nodes.
#
# All users can read the files, except ca.key, because containers run as different users; the folder keeps them out.
set -eu
[ $# -gt 0 ] || { echo "usage: secrets.sh NODE ..." >&2; exit 2; }
cd "$(dirname "$0")"
[ -e secrets/ca.key ] || mkdir -m 700 secrets
cd secrets

random() { openssl rand -hex 24; }
certificate() { openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes "$@" 2>/dev/null; }

names=
for node; do
    case $node in
        *[!0-9.]*) names="$names,DNS:$node" ;;
        *) names="$names,IP:$node" ;;
    esac
done
if [ ! -e ca.key ]; then
    random >dsmq-token
    random >dsmq-password
    printf 'DSMQ_PASSWORD: "%s"\nADMIN_PASSWORD: "%s"\n' "$(cat dsmq-password)" "$(random)" >passwords.conf
    certificate -days 3650 -subj "/CN=dsmq cluster" -keyout ca.key -out ca.pem
fi
certificate -days 3650 -subj "/CN=node" -CA ca.pem -CAkey ca.key -addext "subjectAltName=${names#,}" \
    -addext basicConstraints=critical,CA:FALSE -keyout node.key -out node.pem
chmod 644 -- *
chmod 600 ca.key
