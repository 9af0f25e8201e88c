#!/usr/bin/env bash
# Submit a job and a sweep, follow them, read results: with nothing but curl, against a running `uncanny serve`.
# UNCANNY_URL says where it is. Needs python3 (or swap in jq) to take an id out of an answer.
set -euo pipefail
url=${UNCANNY_URL:-http://127.0.0.1:8765}
json='Content-Type: application/json'
field() { python3 -c "import json, sys; print(json.load(sys.stdin)['$1'])"; }

echo "== Is it ready?"
curl -sS --fail-with-body "$url/readyz"; echo

echo "== One job. The key makes it safe to send again: the stored answer comes back, nothing is submitted twice."
job=$(curl -sS --fail-with-body "$url/v1/jobs" -H "$json" -H "Idempotency-Key: curl-$$" -d '{
  "architecture": "simple_cnn", "dataset": "digits", "scale": 5, "samples": 200,
  "attack": {"type": "pgd", "norm": "linf", "eps": "8/255", "step_size": "2/255", "steps": 10},
  "recipe": {"name": "standard", "epochs": 3}
}' | field id)
echo "job $job"

echo "== What a sweep would mean, without submitting it"
sweep_json='{
  "name": "curl",
  "base": {"architecture": "mlp", "dataset": "digits", "samples": 200, "recipe": {"name": "standard", "epochs": 3}},
  "grid": {"scale": [1, 10, 50], "attack": ["pgd_l2", "pgd_linf"]}
}'
curl -sS --fail-with-body "$url/v1/sweeps?dry_run=true" -H "$json" -d "$sweep_json"; echo

echo "== Submit it"
sweep=$(curl -sS --fail-with-body "$url/v1/sweeps" -H "$json" -d "$sweep_json" | field id)
echo "sweep $sweep"

echo "== Wait for both (each request waits up to 30 s)"
state=running
while [ "$state" = running ]; do
  state=$(curl -sS --fail-with-body "$url/v1/sweeps/$sweep?wait=30" | field state)
  echo "sweep is $state"
done
echo "job is $(curl -sS --fail-with-body "$url/v1/jobs/$job?wait=30" | field state)"

echo "== What happened, as server-sent events (leave out follow=false to stay and watch)"
curl -sS --fail-with-body -N "$url/v1/events?job=$job&follow=false" | grep '^event:' | sort | uniq -c

echo "== Results as CSV: filtered, sorted, only some fields"
curl -sS --fail-with-body -G "$url/v1/results" -H 'Accept: text/csv' --data-urlencode "sweep=$sweep" \
  --data-urlencode 'sort=scale' \
  --data-urlencode 'fields=scale,attack.norm,clean_accuracy,robust_accuracy,masked_fraction,verdict'

echo "== One result whole, and its curves along the attack's steps"
result=$(curl -sS --fail-with-body "$url/v1/results/$job"); echo "${result:0:300} ..."
curves=$(curl -sS --fail-with-body "$url/v1/results/$job/trajectory"); echo "${curves:0:300} ..."
[ "$state" = succeeded ]
