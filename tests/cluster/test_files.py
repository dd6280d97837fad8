"""The files in cluster/ are what their tools take: by published schemas and linters, which make cluster brings."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from disttrain import env
from disttrain.comm import rendezvous

CLUSTER = Path(__file__).parents[2] / "cluster"
KUBERNETES = "1.37"

# What fields there are outside of pods, for which there is a published schema. The operators' own are in no package;
# sources: the API references of kubeflow.org/v2beta1 and of ray.io/v1.
FIELDS = {
    "MPIJob": {
        "spec": "launcherCreationPolicy mpiImplementation mpiReplicaSpecs runLauncherAsWorker runPolicy slotsPerWorker "
        "sshAuthMountPath",
        "spec.runPolicy": "activeDeadlineSeconds backoffLimit cleanPodPolicy managedBy schedulingPolicy suspend "
        "ttlSecondsAfterFinished",
        "spec.mpiReplicaSpecs": "Launcher Worker",
        "spec.mpiReplicaSpecs.Launcher": "replicas restartPolicy template",
        "spec.mpiReplicaSpecs.Worker": "replicas restartPolicy template",
    },
    "RayJob": {
        "spec": "activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint entrypointNumCpus "
        "entrypointNumGpus entrypointResources jobId managedBy metadata rayClusterSpec runtimeEnvYAML "
        "shutdownAfterJobFinishes submissionMode submitterConfig submitterPodTemplate suspend ttlSecondsAfterFinished",
        "spec.rayClusterSpec": "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions "
        "headGroupSpec headServiceAnnotations managedBy rayVersion suspend workerGroupSpecs",
        "spec.rayClusterSpec.authOptions": "mode",
        "spec.rayClusterSpec.headGroupSpec": "enableIngress headService rayStartParams serviceType template",
        "spec.rayClusterSpec.workerGroupSpecs": "groupName idleTimeoutSeconds maxReplicas minReplicas numOfHosts "
        "rayStartParams replicas scaleStrategy suspend template",
    },
}


def documents(name):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed; make cluster brings it")
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def at(document, path):
    """Return what is at ``a.b.c``, or in the first item of a list there."""
    for key in path.split("."):
        document = document[key]
    return document[0] if isinstance(document, list) else document


def templates(value):
    """Yield the pod templates in `value`."""
    if isinstance(value, dict):
        for key, each in value.items():
            if key == "template":
                yield each
            else:
                yield from templates(each)
    elif isinstance(value, list):
        for each in value:
            yield from templates(each)


def program(name):
    found = shutil.which(name, path=f"{Path(sys.executable).parent}")
    if found is None:
        pytest.skip(f"{name} is not installed; make cluster brings it")
    return found


def test_objects_of_kubernetes_have_its_schema():
    kubernetes = pytest.importorskip("kubernetes_validate", reason="not installed; make cluster brings it")
    found = documents("kubernetes/indexed-job.yaml")
    assert [each["kind"] for each in found] == ["Service", "Job", "NetworkPolicy"]
    for each in found:
        kubernetes.validate(each, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", ["kubernetes/mpijob.yaml", "kuberay/rayjob.yaml"])
def test_pods_of_operators_have_the_schema_of_kubernetes(name):
    kubernetes = pytest.importorskip("kubernetes_validate", reason="not installed; make cluster brings it")
    (document,) = documents(name)
    found = list(templates(document))
    assert len(found) == 2
    for template in found:
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
        kubernetes.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    ("name", "version"), [("kubernetes/mpijob.yaml", "kubeflow.org/v2beta1"), ("kuberay/rayjob.yaml", "ray.io/v1")]
)
def test_operators_know_the_fields_around_pods(name, version):
    (document,) = documents(name)
    assert document["apiVersion"] == version
    assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
    for path, known in FIELDS[document["kind"]].items():
        assert set(at(document, path)) <= set(known.split()), path


def test_the_ray_cluster_has_rays_schema():
    spec = importlib.util.find_spec("ray")
    jsonschema = pytest.importorskip("jsonschema", reason="not installed; make cluster brings it")
    if spec is None:
        pytest.skip("Ray, which has the schema, is not installed; make ray brings it")
    schema = json.loads(Path(spec.origin).with_name("autoscaler").joinpath("ray-schema.json").read_text())
    jsonschema.validate(documents("ray/cluster.yaml")[0], schema)


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_hadolint_finds_nothing(name):
    done = subprocess.run([program("hadolint"), CLUSTER / "docker" / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_shellcheck_finds_nothing():
    script = CLUSTER / "slurm" / "train.sbatch"
    done = subprocess.run([program("shellcheck"), script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_workers_of_the_indexed_job_are_told_what_disttrain_reads():
    _, job, _ = documents("kubernetes/indexed-job.yaml")
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    variables = {each["name"]: each.get("value") for each in container["env"]}
    place = env.place({name: value or "1" for name, value in variables.items()})
    assert (place.rank, place.world_size) == (1, spec["completions"])
    assert spec["parallelism"] == spec["completions"]
    assert env.transport(variables | {env.RANK: "1"}) == "tcp"
    assert env.SECRET in variables
    host, port = rendezvous.parsed(env.rendezvous(variables))
    assert host == f"{job['metadata']['name']}-0.{spec['template']['spec']['subdomain']}"
    assert 1024 < port < 65536


@pytest.mark.parametrize("name", ["kubernetes/mpijob.yaml", "kuberay/rayjob.yaml"])
def test_as_many_workers_are_asked_for_as_there_are_places(name):
    (document,) = documents(name)
    spec = document["spec"]
    if "entrypoint" in spec:
        command = spec["entrypoint"].split()
        places = spec["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]
    else:
        command = at(spec, "mpiReplicaSpecs.Launcher.template.spec.containers")["command"]
        places = spec["mpiReplicaSpecs"]["Worker"]["replicas"] * spec["slotsPerWorker"]
    assert int(command[command.index("-n") + 1]) == places
