#!/usr/bin/env bash
# Build a Kubernetes without nodes, for `make test-apiserver`: etcd, API server, controllers and scheduler of the versions
# in go.mod.  tests/apiserver/build.sh FOLDER; Go 1.24 or later, 4 GB of disk, 5 minutes of two cores.
set -euo pipefail
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")"
for package in go.etcd.io/etcd/server/v3 k8s.io/kubernetes/cmd/{kube-apiserver,kube-controller-manager,kube-scheduler}; do
    name=$(basename "$package")
    [ "$name" != v3 ] || name=etcd
    go build -mod=readonly -ldflags '-s -w' -o "$folder/$name" "$package"
done
