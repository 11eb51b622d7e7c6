#!/usr/bin/env bash
# Starts or continues a run on all hosts of a Cloud TPU slice, and creates the slice if it is not there:
#   TPU=qipo ZONE=us-east5-b TYPE=v6e-16 IMAGE=us-docker.pkg.dev/PROJECT/REPOSITORY/qipo:tpu \
#     launch/cluster/tpu_vm.sh --workdir=gs://BUCKET/qipo --parallel=seeds --num_seeds=16
set -euo pipefail
: "${TPU:?name of the slice}" "${ZONE:?zone}" "${TYPE:?accelerator type}" "${IMAGE:?built with JAX_EXTRA=tpu}"

# Checked, because all become words of a command, the image's registry one of a remote shell.
check() {
  if [[ ! ${!1} =~ ^$2$ ]]; then
    echo "$1=${!1}: expected $3" >&2
    exit 2
  fi
}
for name in TPU ZONE TYPE; do
  check "$name" '[a-z0-9][a-z0-9-]*' 'small letters, digits and -'
done
check IMAGE '[a-z0-9.-]+(:[0-9]+)?/[A-Za-z0-9._/-]+(:[A-Za-z0-9._-]+)?(@sha256:[0-9a-f]+)?' \
  'REGISTRY/NAME:TAG'

tpu() {
  gcloud compute tpus tpu-vm "$1" "$TPU" --zone="$ZONE" "${@:2}"
}

state=$(tpu describe --format='value(state)' 2>/dev/null || true)
if [[ $state == PREEMPTED || $state == TERMINATED ]]; then
  tpu delete --quiet
  state=
fi
if [[ -z $state ]]; then
  tpu create --accelerator-type="$TYPE" --version="${VERSION:-v2-alpha-tpuv6e}" --spot
fi

printf -v run '%q ' "$IMAGE" --multihost "$@"
# Stopping sends SIGTERM: a run that is still there saves.  The devices are root's.
tpu ssh --worker=all --command="
  set -e
  gcloud auth print-access-token | sudo docker login --username=oauth2accesstoken --password-stdin ${IMAGE%%/*}
  sudo docker stop qipo && sudo docker rm qipo
  sudo docker run --detach --name=qipo --user=root --privileged --network=host --stop-timeout=120 $run"
