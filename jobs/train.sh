#!/usr/bin/env bash
# Run one training on a Ray cluster and follow its log:
#   RAY_ADDRESS=http://127.0.0.1:8265 jobs/train.sh conf/demo.yaml name=mine lam=1.2
# Data, cache and runs must lie where every node sees them: data.path=, cache= and out= absolute.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${RAY_ADDRESS:?set it to the dashboard of the cluster, as http://127.0.0.1:8265}"
exec ray job submit \
  --working-dir . \
  --runtime-env-json '{"excludes": [".venv", ".git", "runs", "cache", "data"]}' \
  --entrypoint-num-cpus 0.1 \
  -- python -m listopd_ray train "$@"
