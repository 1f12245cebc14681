#!/usr/bin/env bash
# `listopd train` as a Ray job; see submit.sh.
exec "$(dirname "$0")/submit.sh" train "$@"
