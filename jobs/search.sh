#!/usr/bin/env bash
# `listopd search` as a Ray job; see submit.sh.
exec "$(dirname "$0")/submit.sh" search "$@"
