#!/usr/bin/env bash
# Submit one command to a Ray cluster, follow its log, and leave with what became of it:
#   jobs/submit.sh train conf/demo.yaml name=mine lam=1.2
# Exit status: 0 succeeded, 1 failed, not submitted or lost, 2 stopped. A second submission with the
# same name=… continues the run. RAY_ADDRESS is the dashboard; the token is as `ray` finds it.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${RAY_ADDRESS:?set it to the dashboard of the cluster, as http://127.0.0.1:8265}"
: "${1:?which command? train, study, search, …}"
export RAY_AUTH_MODE=token
command=$1
shift
id=${SUBMISSION_ID:-listopd-$command-$(date -u +%Y%m%d-%H%M%S)-$RANDOM}
git=$(git describe --always --dirty 2>/dev/null || echo unknown)

# Is there a cluster that lets us in, and is the id new? Ray itself answers with a traceback.
if said=$(ray job status "$id" 2>&1); then
  echo "submit.sh: job $id exists already; give another SUBMISSION_ID" >&2
  exit 1
elif [[ $said != *"does not exist"* ]]; then
  echo "submit.sh: $(sed -n 's/^[A-Za-z._]*Error: //p' <<<"$said" | tail -n 1)" >&2
  exit 1
fi

ray job submit \
  --submission-id "$id" \
  --working-dir . \
  --runtime-env jobs/runtime_env.yaml \
  --metadata-json "{\"git\": \"$git\", \"command\": \"$command\"}" \
  --entrypoint-num-cpus "${ENTRYPOINT_NUM_CPUS:-0}" \
  -- python -m listopd_ray "$command" "$@" || true

# `ray job submit` leaves with 0 where a job was stopped, and as soon as it loses the connection.
while status=$(ray job status "$id" 2>&1); do
  case $status in
    *"' succeeded"*) exit 0 ;;
    *"' was stopped"*) echo "job $id: stopped; the same command goes on" >&2; exit 2 ;;
    *"' failed"*) echo "job $id: failed" >&2; exit 1 ;;
  esac
  sleep 5
done
echo "job $id: lost contact, it may go on: ray job status $id" >&2
exit 1
