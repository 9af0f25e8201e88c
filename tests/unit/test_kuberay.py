"""The Kubernetes file of the examples says of each process what docker-compose.yml says of it."""

from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
COMPOSE = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
KUBERNETES = [
    document
    for document in yaml.safe_load_all((REPOSITORY / "examples/kuberay/uncanny.yaml").read_text(encoding="utf-8"))
    if document
]
SETTINGS = {
    document["metadata"]["name"]: document["data"] for document in KUBERNETES if document["kind"] == "ConfigMap"
}


def of(kind: str, name: str) -> Any:
    [found] = [each for each in KUBERNETES if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found["spec"]


def pods() -> dict[str, Any]:
    """The pod of each process, by its name in docker-compose.yml."""
    cluster = of("RayCluster", "uncanny")
    return {
        "migrate": of("Job", "uncanny-migrate")["template"]["spec"],
        "api": of("Deployment", "uncanny-api")["template"]["spec"],
        "dispatcher": of("Deployment", "uncanny-dispatcher")["template"]["spec"],
        "ray-head": cluster["headGroupSpec"]["template"]["spec"],
        "ray-worker-gpu": cluster["workerGroupSpecs"][0]["template"]["spec"],
    }


def environment(container: dict[str, Any]) -> dict[str, str]:
    maps = [SETTINGS[source["configMapRef"]["name"]] for source in container.get("envFrom", [])]
    own = {variable["name"]: variable["value"] for variable in container.get("env", [])}
    return {name: value for settings in (*maps, own) for name, value in settings.items()}


def as_compose_says(text: str) -> str:
    return text.replace("uncanny-head-svc", "ray-head").replace("/run/secrets/uncanny/", "/run/secrets/")


def test_each_process_has_the_settings_of_compose() -> None:
    for name, pod in pods().items():
        found = {key: as_compose_says(value) for key, value in environment(pod["containers"][0]).items()}
        assert found == COMPOSE[name]["environment"], name


def test_each_process_that_is_ours_has_the_command_of_compose() -> None:
    for name in ("migrate", "api", "dispatcher"):
        command = pods()[name]["containers"][0]["command"]
        assert [as_compose_says(word) for word in command] == COMPOSE[name]["command"], name


def test_the_head_takes_no_tasks_and_no_raylet_takes_the_memory_of_tasks() -> None:
    cluster = of("RayCluster", "uncanny")
    head, worker = cluster["headGroupSpec"]["rayStartParams"], cluster["workerGroupSpecs"][0]["rayStartParams"]
    assert {f"--{name}={value}" for name, value in head.items()} <= set(COMPOSE["ray-head"]["command"])
    assert {f"--{name}={value}" for name, value in worker.items()} <= set(COMPOSE["ray-worker-gpu"]["command"])


def test_volumes_are_where_compose_has_them() -> None:
    for name, pod in pods().items():
        mounts = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]} - {"/run/secrets/uncanny"}
        assert mounts == {volume.split(":")[1] for volume in COMPOSE[name].get("volumes", [])}, name
        named = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == named, name


def test_no_pod_runs_as_root_or_gains_rights() -> None:
    for name, pod in pods().items():
        user, group = map(int, COMPOSE[name]["user"].split(":"))
        account = {"runAsNonRoot": True, "runAsUser": user, "runAsGroup": group, "fsGroup": group}
        assert pod["securityContext"] == account, name
        closed = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert pod["containers"][0]["securityContext"] == closed, name


def test_ray_is_reached_by_our_pods_alone() -> None:
    policy = of("NetworkPolicy", "uncanny-ray")
    assert policy["ingress"] == [{"from": [{"podSelector": policy["podSelector"]}]}]
    cluster = of("RayCluster", "uncanny")
    pods = [cluster["headGroupSpec"], cluster["workerGroupSpecs"][0], of("Deployment", "uncanny-dispatcher")]
    labels = [pod["template"]["metadata"]["labels"] for pod in pods]
    [expression] = policy["podSelector"]["matchExpressions"]
    assert all(label["app"] == "uncanny" and label["part"] in expression["values"] for label in labels)
    assert not [each for each in KUBERNETES if each["kind"] == "Service" and "ray" in str(each["spec"]["selector"])]
