#!/bin/sh
# Runs the checker of clusters for some minutes (2). Another seed runs other faults.
#
#   sh tests/cluster/run.sh [MINUTES] [SEED]
#
# Needs g++, libhiredis-dev, redis-server, redis-tools and python3-websockets of Debian.
set -eu
cd "$(dirname "$0")/../.."
mkdir -p build/cluster
g++ -std=c++17 -O2 -DWSCHAT_HIREDIS=1 examples/rooms.cpp -o build/cluster/rooms -pthread -lhiredis
exec /usr/bin/python3 tests/cluster/cluster_test.py --rooms build/cluster/rooms --minutes "${1-2}" --seed "${2-1}"
