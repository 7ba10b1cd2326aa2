"""The chart becomes objects that Kubernetes knows and a configuration that the daemon takes, and refuses nonsense."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from sessiond import config

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "sessiond"
# The oldest Kubernetes that Chart.yaml admits, and the newest whose schemas are at hand.
KUBERNETES = ("1.27", kubernetes_validate.latest_version())

EVERYTHING = """
replicas: 3
image: {repository: registry.example/sessiond, tag: "1.2.3"}
imagePullSecrets: [{name: registry}]
config:
  cloud: s3://bucket/prefix
  s3_endpoint: https://s3.example
  s3_region: eu-central-1
  s3_path_style: true
  drain_grace_ms: 45500
  log_level: debug
hashKeySecret: {name: keys, key: hash}
nodeKeySecret: {name: keys, key: node}
credentialsSecret: aws
serviceAccount: {name: other, annotations: {eks.amazonaws.com/role-arn: "arn:aws:iam::1:role/x"}}
service: {type: LoadBalancer, port: 443, annotations: {a: b}}
storage: {size: 100Gi, className: local}
podAnnotations: {a: b}
podLabels: {team: inference}
nodeSelector: {disk: nvme}
tolerations: [{key: dedicated, operator: Exists}]
affinity: {nodeAffinity: {}}
topologySpreadConstraints: [{maxSkew: 1, topologyKey: zone, whenUnsatisfiable: DoNotSchedule}]
priorityClassName: high
"""


@pytest.fixture
def helm(tmp_path):
    """Runs helm (of the package helm-binary) with a home of its own."""
    beside = Path(sys.executable).parent / "helm"
    command = str(beside) if beside.exists() else "helm"
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [command, *arguments], capture_output=True, text=True, env=environment, timeout=120, check=False
        )

    return run


@pytest.fixture
def render(helm, tmp_path):
    """The objects that the chart becomes, by kind, with the given values."""

    def run(values: str = "{}", release: str = "edge") -> list[dict[str, Any]]:
        file = tmp_path / "values.yaml"
        file.write_text(values)
        done = helm("template", release, str(CHART), "--namespace", "chat", "--values", str(file))
        assert done.returncode == 0, done.stderr
        return [document for document in yaml.safe_load_all(done.stdout) if document]

    return run


def one(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [each for each in objects if each["kind"] == kind]
    return found


@pytest.mark.parametrize("values", ["{}", EVERYTHING], ids=["defaults", "everything"])
def test_lint_finds_nothing(helm, tmp_path, values):
    (tmp_path / "values.yaml").write_text(values)
    done = helm("lint", "--strict", str(CHART), "--values", str(tmp_path / "values.yaml"))
    assert done.returncode == 0, done.stdout
    assert "[WARNING]" not in done.stdout


@pytest.mark.parametrize("kubernetes", KUBERNETES)
@pytest.mark.parametrize("values", ["{}", EVERYTHING], ids=["defaults", "everything"])
def test_kubernetes_knows_every_object_and_every_field(render, values, kubernetes):
    objects = render(values)
    kinds = {"ConfigMap": 1, "PodDisruptionBudget": 1, "Service": 2, "ServiceAccount": 1, "StatefulSet": 1}
    assert Counter(each["kind"] for each in objects) == kinds
    for each in objects:
        kubernetes_validate.validate(each, kubernetes, strict=True)


def test_what_is_switched_off_is_not_deployed(render):
    objects = render("{podDisruptionBudget: {enabled: false}, serviceAccount: {create: false}}")
    assert Counter(each["kind"] for each in objects) == {"ConfigMap": 1, "Service": 2, "StatefulSet": 1}
    assert one(objects, "StatefulSet")["spec"]["template"]["spec"]["serviceAccountName"] == "default"


@pytest.mark.parametrize("values", ["{}", EVERYTHING], ids=["defaults", "everything"])
def test_the_daemon_takes_the_configuration_and_the_environment(render, tmp_path, values):
    objects = render(values)
    file = tmp_path / "sessiond.toml"
    file.write_text(one(objects, "ConfigMap")["data"]["sessiond.toml"])
    (container,) = one(objects, "StatefulSet")["spec"]["template"]["spec"]["containers"]
    # As the kubelet fills them in: from fields of the pod, from Secrets, and $(NAME) from what stands before.
    fields = {"metadata.name": "edge-sessiond-0", "status.podIP": "10.1.2.3"}
    environment: dict[str, str] = {}
    for each in container["env"]:
        value = each.get("value", "")
        for name, known in environment.items():
            value = value.replace(f"$({name})", known)
        source = each.get("valueFrom", {})
        if "fieldRef" in source:
            value = fields[source["fieldRef"]["fieldPath"]]
        elif "secretKeyRef" in source:
            assert source["secretKeyRef"]["name"] == "keys"
            value = {"hash": "aa" * 16, "node": "bb" * 32}[source["secretKeyRef"]["key"]]
        environment[each["name"]] = value
    settings = config.load(str(file), environment, {})
    assert settings.node == "edge-sessiond-0"
    assert settings.address() == "10.1.2.3:7443"
    assert (settings.hash_key, settings.node_key) == (("", "") if values == "{}" else ("aa" * 16, "bb" * 32))
    assert settings.listen == f"0.0.0.0:{container['ports'][0]['containerPort']}"
    assert settings.data_dir in [mount["mountPath"] for mount in container["volumeMounts"]]
    for key, value in tomllib.loads(file.read_text()).items():
        assert getattr(settings, key) == value
        assert not isinstance(value, float), f"{key} came out of Helm as a float"


def test_the_schema_names_every_setting_of_the_daemon():
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())
    by_the_chart = {"data_dir", "listen", "advertise", "node_name", "hash_key", "node_key"}
    assert set(schema["properties"]["config"]["properties"]) == set(config.Settings.__struct_fields__) - by_the_chart


def test_the_environment_holds_no_setting_that_nobody_set(render):
    # A Service named sessiond makes Kubernetes inject SESSIOND_PORT, which the daemon refuses as an unknown setting.
    pod = one(render(release="sessiond"), "StatefulSet")["spec"]["template"]["spec"]
    assert pod["enableServiceLinks"] is False


@pytest.mark.parametrize(("values", "seconds"), [("{}", 60), (EVERYTHING, 76)], ids=["defaults", "everything"])
def test_a_stopping_pod_has_time_to_drain_and_flush(render, values, seconds):
    pod = one(render(values), "StatefulSet")["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == seconds


def test_liveness_and_readiness_are_asked_apart(render):
    (container,) = one(render(), "StatefulSet")["spec"]["template"]["spec"]["containers"]
    probes = {name: container[name]["grpc"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert {name: probe["service"] for name, probe in probes.items()} == {
        "startupProbe": "liveness",
        "livenessProbe": "liveness",
        "readinessProbe": "readiness",
    }
    assert {probe["port"] for probe in probes.values()} == {container["ports"][0]["containerPort"]}


def test_the_pod_meets_the_restricted_security_standard(render):
    pod = one(render(), "StatefulSet")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_services_and_budget_select_the_pods(render):
    objects = render(EVERYTHING)
    labels = one(objects, "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    selectors = [each["spec"]["selector"] for each in objects if each["kind"] == "Service"]
    selectors.append(one(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"])
    assert len(selectors) == 3
    for selector in selectors:
        assert selector.items() <= labels.items()
    headless = [each["metadata"]["name"] for each in objects if each.get("spec", {}).get("clusterIP") == "None"]
    assert headless == [one(objects, "StatefulSet")["spec"]["serviceName"]]


def test_nodes_start_together_and_are_updated_one_by_one(render):
    nodes = one(render(EVERYTHING), "StatefulSet")["spec"]
    assert (nodes["replicas"], nodes["podManagementPolicy"]) == (3, "Parallel")
    # Its default is RollingUpdate, one pod at a time.
    assert "updateStrategy" not in nodes
    assert one(render(EVERYTHING), "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_a_changed_configuration_restarts_the_pods(render):
    key = "checksum/config"
    first, second = (
        one(render(values), "StatefulSet")["spec"]["template"]["metadata"]["annotations"][key]
        for values in ("{}", "{config: {lease_ms: 5000}}")
    )
    assert first != second


def test_the_longest_names_fit(render):
    for each in render(release="r" * 53):
        # A StatefulSet's pods carry its name, a dash and a hash of ten in a label of at most 63.
        assert len(each["metadata"]["name"]) <= (52 if each["kind"] == "StatefulSet" else 63)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ("{replicas: 3}", "replicas"),
        ("{replicas: 2, config: {cloud: 'file:///shared'}}", "replicas"),
        ("{config: {node_key: abcd}}", "node_key"),
        ("{config: {cloud: ftp://x}}", "cloud"),
        ("{config: {flush_intervall_ms: 5}}", "flush_intervall_ms"),
        ("{config: {map_size_bytes: 16777217}}", "map_size_bytes"),
        ("{config: {lease_ms: soon}}", "lease_ms"),
        ("{storage: {size: 20}}", "size"),
        ("{image: {repository: ''}}", "repository"),
        ("{replicaCount: 1}", "replicaCount"),
    ],
)
def test_a_bad_value_is_refused_by_name(helm, tmp_path, values, named):
    (tmp_path / "values.yaml").write_text(values)
    done = helm("template", "edge", str(CHART), "--values", str(tmp_path / "values.yaml"))
    assert done.returncode != 0
    assert done.stdout == ""
    assert "values don't meet the specifications of the schema" in done.stderr
    assert named in done.stderr


def test_the_chart_deploys_this_release():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert chart["appVersion"] == project["version"]
