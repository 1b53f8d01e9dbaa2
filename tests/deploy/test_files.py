"""What ships under `deploy/`, as far as it can be held to something without a cluster."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from ddil_dist.config import load_config
from ddil_dist.monitor.metrics import render

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = sorted((KUBERNETES / "overlays").iterdir())
RUNS = [DEPLOY / "compose.run.yaml", *(overlay / "run.yaml" for overlay in OVERLAYS)]


def documents(path: Path) -> list[dict[str, Any]]:
    return [found for found in yaml.safe_load_all(path.read_text(encoding="utf-8")) if found is not None]


def kinds(kind: str) -> list[dict[str, Any]]:
    """The base's objects of a kind."""
    names = documents(KUBERNETES / "base" / "kustomization.yaml")[0]["resources"]
    found = [document for name in names for document in documents(KUBERNETES / "base" / name)]
    return [document for document in found if document["kind"] == kind]


def pods() -> Iterator[dict[str, Any]]:
    """Specifications of all pods of the base."""
    for kind in ("StatefulSet", "Deployment"):
        yield from (workload["spec"]["template"]["spec"] for workload in kinds(kind))
    for cluster in kinds("RayCluster"):
        groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
        yield from (group["template"]["spec"] for group in groups)


def compose() -> dict[str, Any]:
    return documents(DEPLOY / "compose.yaml")[0]


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.yaml")), ids=lambda path: str(path.relative_to(DEPLOY)))
def test_it_is_yaml(path: Path) -> None:
    assert documents(path)


@pytest.mark.parametrize("name", ["cluster", "gcp"])
def test_a_cluster_file_fits_rays_schema(name: str) -> None:
    cluster = documents(DEPLOY / "ray" / f"{name}.yaml")[0]
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(cluster, json.loads(schema.read_text(encoding="utf-8")))
    groups = cluster["available_node_types"]
    assert cluster["head_node_type"] in groups
    for role in ("learner", "rollout"):
        assert groups[role]["resources"][role] == groups[role]["resources"]["GPU"], "an actor or worker each"


class TestRuns:
    """The configurations that come with compose and Kubernetes."""

    @pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}/{path.name}")
    def test_it_loads_and_asks_for_what_the_nodes_have(self, path: Path) -> None:
        config = load_config(path)
        assert config.redis.username == "run"
        assert config.redis.password_file is not None
        assert config.rollout.resources == {"rollout": 1}
        assert config.learner.resources == {"learner": 1}
        assert config.rollout.num_gpus == config.learner.num_gpus == 1

    @pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
    def test_the_groups_of_the_ray_cluster_have_them(self, overlay: Path) -> None:
        config = load_config(overlay / "run.yaml")
        groups = {group["groupName"]: group for group in kinds("RayCluster")[0]["spec"]["workerGroupSpecs"]}
        for asked, group in ((config.learner, groups["learner"]), (config.rollout, groups["rollout"])):
            start = group["rayStartParams"]
            assert json.loads(json.loads(start["resources"])) == asked.resources
            assert dict([start["labels"].split("=")]) == asked.label_selector
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            assert limits["nvidia.com/gpu"] == int(start["num-gpus"])
        assert config.rollout.autoscale is not None
        assert groups["rollout"]["minReplicas"] <= config.rollout.autoscale.min
        assert config.rollout.autoscale.max <= groups["rollout"]["maxReplicas"]

    def test_compose_starts_nodes_that_have_them(self) -> None:
        for role in ("learner", "rollout"):
            resources = [word for word in compose()["services"][role]["command"] if word.startswith("--resources=")]
            assert json.loads(resources[0].partition("=")[2]) == {role: 1}


class TestKubernetes:
    def test_every_volume_that_is_mounted_is_there(self) -> None:
        claims = {claim["metadata"]["name"] for claim in kinds("PersistentVolumeClaim")}
        base = documents(KUBERNETES / "base" / "kustomization.yaml")[0]
        maps = {made["name"] for made in base["configMapGenerator"]} | {"ddil-run"}
        passwords = documents(KUBERNETES / "base" / "secret.template.yaml")[0]
        templates = {
            claim["metadata"]["name"] for each in kinds("StatefulSet") for claim in each["spec"]["volumeClaimTemplates"]
        }
        for pod in pods():
            names = {volume["name"] for volume in pod["volumes"]} | templates
            for container in pod["containers"]:
                assert {mount["name"] for mount in container["volumeMounts"]} <= names
            for volume in pod["volumes"]:
                assert volume.get("persistentVolumeClaim", {"claimName": None})["claimName"] in claims | {None}
                assert volume.get("configMap", {"name": "ddil-run"})["name"] in maps
                if "secret" in volume:
                    assert volume["secret"]["secretName"] == passwords["metadata"]["name"]
                    items = {item["key"] for item in volume["secret"].get("items", [])}
                    assert items <= passwords["stringData"].keys()

    def test_every_file_that_a_kustomization_names_is_there(self) -> None:
        for path in KUBERNETES.rglob("kustomization.yaml"):
            (own,) = documents(path)
            files = [name for made in own.get("configMapGenerator", []) for name in made["files"]]
            for name in [*own["resources"], *files, *(patch["path"] for patch in own.get("patches", []))]:
                assert (path.parent / name).exists(), f"{path}: {name}"

    def test_patches_reach_the_groups_that_they_mean(self) -> None:
        groups = [group["groupName"] for group in kinds("RayCluster")[0]["spec"]["workerGroupSpecs"]]
        assert groups == ["learner", "rollout"]
        for overlay in OVERLAYS:
            chosen = {
                change["path"].split("/")[3]: str(change["value"]) for change in documents(overlay / "nodes.yaml")[0]
            }
            assert "A100" in str(documents(overlay / "nodes.yaml")[0][0]["value"]).upper()
            assert chosen.keys() == {"0", "1"}

    def test_services_reach_pods(self) -> None:
        labels = [
            workload["spec"]["template"]["metadata"]["labels"]
            for kind in ("StatefulSet", "Deployment")
            for workload in kinds(kind)
        ]
        for service in kinds("Service"):
            assert service["spec"]["selector"] in labels
        (monitor,) = documents(KUBERNETES / "monitoring" / "servicemonitor.yaml")
        selected = monitor["spec"]["selector"]["matchLabels"]
        (found,) = [service for service in kinds("Service") if service["metadata"].get("labels") == selected]
        assert monitor["spec"]["endpoints"][0]["port"] in [port["name"] for port in found["spec"]["ports"]]

    def test_nobody_is_root_and_everyone_says_what_it_needs(self) -> None:
        for pod in pods():
            assert pod["securityContext"]["runAsNonRoot"]
            for container in pod["containers"]:
                assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
                assert container["resources"]["limits"].keys() >= {"memory"}

    def test_ray_is_the_images(self) -> None:
        assert kinds("RayCluster")[0]["spec"]["rayVersion"] == pinned("ray")


class TestCompose:
    def test_what_services_use_is_declared(self) -> None:
        found = compose()
        for name, service in found["services"].items():
            for secret in service.get("secrets", []):
                assert (secret["source"] if isinstance(secret, dict) else secret) in found["secrets"], name
            for volume in service.get("volumes", []):
                source = volume.split(":")[0]
                assert source in found["volumes"] or (DEPLOY / source).exists(), f"{name}: {source}"
            assert set(service.get("depends_on", {})) <= found["services"].keys()

    def test_nothing_is_reached_from_outside(self) -> None:
        for name, service in compose()["services"].items():
            for port in service.get("ports", []):
                assert port.startswith("127.0.0.1:"), name

    def test_images_are_pinned(self) -> None:
        for service in compose()["services"].values():
            assert re.search(r":v?\d+\.\d+\.\d+", service["image"])


class TestDockerfile:
    TEXT = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")

    def test_its_bases_are_pinned_and_its_user_is_not_root(self) -> None:
        for base in re.findall(r"^FROM (\S+)", self.TEXT, re.MULTILINE):
            assert re.search(r":\d+\.\d+\.\d+", base)
        assert re.findall(r"^USER (\S+)", self.TEXT, re.MULTILINE)[-1] not in ("0", "root")

    def test_it_is_sent_what_it_copies_and_nothing_else(self) -> None:
        sent = set(re.findall(r"^!(\S+)", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.MULTILINE))
        copied = {
            name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", self.TEXT, re.MULTILINE) for name in line.split()
        }
        assert copied == sent
        for name in sent:
            assert (ROOT / name).exists()


def exported() -> set[str]:
    """Names of all metrics that the monitor's page can have."""
    source = Path(render.__code__.co_filename).read_text(encoding="utf-8")
    return {f"ddil_{name}" for name in re.findall(r'page\.(?:one|add)\(\s*"(\w+)"', source)}


def expressions() -> list[str]:
    rules = documents(DEPLOY / "prometheus" / "alerts.yaml")[0]["groups"][0]["rules"]
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "ddil.json").read_text(encoding="utf-8"))
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return [*(rule["expr"] for rule in rules), *targets]


@pytest.mark.parametrize("expression", expressions())
def test_every_metric_that_is_looked_at_is_exported(expression: str) -> None:
    names = set(re.findall(r"\bddil_\w+", expression))
    assert names <= exported()
    assert names or "up{" in expression
    assert expression.count("(") == expression.count(")")
    assert expression.count("{") == expression.count("}")


def test_every_alert_says_what_it_means() -> None:
    for rule in documents(DEPLOY / "prometheus" / "alerts.yaml")[0]["groups"][0]["rules"]:
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_panels_do_not_overlap() -> None:
    panels = json.loads((DEPLOY / "grafana" / "dashboards" / "ddil.json").read_text(encoding="utf-8"))["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells


@pytest.mark.parametrize("path", ["slurm/ddil.sbatch", "kubernetes/base/redis/render-acl.sh"])
def test_a_script_parses(path: str) -> None:
    subprocess.run(["bash", "-n", str(DEPLOY / path)], check=True)


def test_no_password_is_in_the_tree() -> None:
    for path in (path for path in DEPLOY.rglob("*") if path.is_file() and path.parent.name != "secrets"):
        for value in re.findall(r"(?:requirepass|password:|stringData:)\s*(.*)", path.read_text(encoding="utf-8")):
            assert not re.search(r"[A-Za-z0-9+/]{24,}", value), f"{path}: {value}"
