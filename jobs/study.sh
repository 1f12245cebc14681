#!/usr/bin/env bash
# `listopd study` as a Ray job; see submit.sh.
exec "$(dirname "$0")/submit.sh" study "$@"
