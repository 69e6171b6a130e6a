#!/usr/bin/env bash
# Build a base image from Debian packages, if no image registry can be reached: docker/debian.sh [NAME]
# Needs root, debootstrap and podman.  Prints the image's name.
set -euo pipefail
name=${1:-localhost/vgg-base:bookworm}
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include=python3.11-venv,python3-distutils,python3-lib2to3,ca-certificates \
    bookworm "$root" >&2
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/*
tar --numeric-owner -C "$root" -c . | podman import - "$name" >&2
echo "$name"
