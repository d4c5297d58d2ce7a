"""The image, the compose file, Prometheus' files and CI keep to what the code has.

No image is built here: that needs a Docker engine.
"""

import fnmatch
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from service.observability import Metrics
from service.settings import Settings

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = (ROOT / "docker-compose.yml").read_text()
PROMETHEUS = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
ALERTS = yaml.safe_load((ROOT / "deploy" / "alerts.yml").read_text())
DEFAULT_PORT = Settings.model_fields["port"].default
DEFAULT_DRAIN_SECONDS = Settings.model_fields["drain_seconds"].default

# A tag that names at least the minor version: "latest", "3" and no tag at all move.
_PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?")
_SECRET = re.compile(r"SECRET|TOKEN(?!S)|PASSW|CREDENTIAL|API_?KEY|PRIVATE", re.IGNORECASE)


def setting_of(variable: str) -> str | None:
    """The setting that a variable of the environment sets; None if there is none."""
    name = variable.removeprefix("GEMMA_").lower()
    is_one = variable == f"GEMMA_{name.upper()}" and name in Settings.model_fields
    return name if is_one else None


# --- Dockerfile -------------------------------------------------------------------------------


class Instruction(NamedTuple):
    """One instruction: its name in capitals, and the rest on one line."""

    name: str
    value: str


def read_dockerfile(text: str) -> list[list[Instruction]]:
    """The stages of a Dockerfile, each a list of instructions that begins with FROM."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    stages: list[list[Instruction]] = []
    for line in filter(str.strip, joined.splitlines()):
        name, _, value = line.strip().partition(" ")
        if name.upper() == "FROM":
            stages.append([])
        stages[-1].append(Instruction(name.upper(), value.strip()))
    return stages


def _values(stage: list[Instruction], name: str) -> list[str]:
    return [instruction.value for instruction in stage if instruction.name == name]


def _is_exec_form(value: str) -> bool:
    try:
        words = json.loads(value)
    except ValueError:
        return False
    return isinstance(words, list) and all(isinstance(word, str) for word in words)


def dockerfile_findings(text: str) -> list[str]:
    """Breaches of our policy for images."""
    stages = read_dockerfile(text)
    final = stages[-1]
    found = []
    froms = [value.split() for stage in stages for value in _values(stage, "FROM")]
    names = [words[2] for words in froms if len(words) == 3]
    for stage in stages:
        image = _values(stage, "FROM")[0].split()[0]
        if image not in names and not _PINNED.fullmatch(image):
            found.append(f"base image without a version: {image}")
        if _values(stage, "ADD"):
            found.append("ADD may fetch or unpack; use COPY")
        for value in (*_values(stage, "ENV"), *_values(stage, "ARG")):
            for variable in re.findall(r"(?:^|\s)(\w+)(?==|\s|$)", value):
                if _SECRET.search(variable):
                    found.append(f"looks like a secret: {variable}")
                if variable.startswith("GEMMA_") and setting_of(variable) is None:
                    found.append(f"no such setting: {variable}")
        for command in re.findall(r"pip\b[^&]*? install [^&]*", " && ".join(_values(stage, "RUN"))):
            is_locked = "--require-hashes" in command and "--only-binary :all:" in command
            if not is_locked and not ("--no-index" in command and "--no-deps" in command):
                found.append(f"pip installs what is not locked: {command.strip()}")
    users = _values(final, "USER")
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        found.append("the last USER is not a number other than root's")
    for name in ("ENTRYPOINT", "CMD"):
        values = _values(final, name)
        if not values or not _is_exec_form(values[-1]):
            found.append(f"{name} is not in exec form")
    checks = _values(final, "HEALTHCHECK")
    if not checks or not _is_exec_form(checks[-1].partition("CMD ")[2]):
        found.append("HEALTHCHECK is not in exec form")
    if _values(final, "STOPSIGNAL") != ["SIGTERM"]:
        found.append("STOPSIGNAL is not SIGTERM")
    return found


def test_the_dockerfile_keeps_to_the_policy():
    assert dockerfile_findings(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("old", "new", "finding"),
    [
        ("USER 65532:65532", "USER gemma", "the last USER"),
        ("USER 65532:65532", "USER 0:0", "the last USER"),
        ("USER 65532:65532\n", "", "the last USER"),
        ('ENTRYPOINT ["gemma-service"]', "ENTRYPOINT gemma-service", "ENTRYPOINT is not"),
        ('CMD ["serve", "--host", "0.0.0.0"]', "CMD serve", "CMD is not"),
        ("HEALTHCHECK", "LABEL", "HEALTHCHECK is not"),
        ('CMD ["/opt/venv', 'CMD curl ["/opt/venv', "HEALTHCHECK is not"),
        ("3.11.15-slim-bookworm\n", "latest\n", "base image without a version"),
        ("python:3.11.15-slim-bookworm AS", "python AS", "base image without a version"),
        ("COPY model model", "ADD https://a.example/model model", "ADD may fetch"),
        ("HOME=/data", "HF_TOKEN=abc", "looks like a secret: HF_TOKEN"),
        ("EXPOSE 8000", "ARG API_KEY", "looks like a secret: API_KEY"),
        ("GEMMA_CACHE_DIR", "GEMMA_CACHE", "no such setting: GEMMA_CACHE"),
        ("--require-hashes --only-binary :all: -r req", "-r req", "pip installs what is not"),
        ("--no-deps --no-index wheels", "wheels", "pip installs what is not"),
        ("STOPSIGNAL SIGTERM", "STOPSIGNAL SIGKILL", "STOPSIGNAL is not"),
    ],
)
def test_a_breach_of_the_image_policy_is_found(old, new, finding):
    assert old in DOCKERFILE

    assert any(finding in line for line in dockerfile_findings(DOCKERFILE.replace(old, new)))


def test_the_image_listens_on_the_default_port():
    assert _values(read_dockerfile(DOCKERFILE)[-1], "EXPOSE") == [str(DEFAULT_PORT)]


def test_the_folders_of_the_image_are_on_its_volume():
    final = read_dockerfile(DOCKERFILE)[-1]
    variables = dict(re.findall(r"(\w+)=(\S+)", " ".join(_values(final, "ENV"))))

    assert _values(final, "VOLUME") == ['["/data"]']
    assert variables["GEMMA_DATA_DIR"] == "/data/data"
    assert variables["GEMMA_CACHE_DIR"] == "/data/cache"


def test_the_builder_gets_exactly_what_it_copies():
    copied = {
        source
        for value in _values(read_dockerfile(DOCKERFILE)[0], "COPY")
        for source in value.split()[:-1]
    }
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}

    assert "*" in lines
    assert allowed == {source.partition("/")[0] for source in copied}
    assert all((ROOT / source).exists() for source in copied)
    # What no stage copies must not be let in by a pattern.
    assert not any(fnmatch.fnmatch(".git", pattern) for pattern in allowed)


def test_the_build_backend_is_cut_out_of_the_lock_with_its_hashes():
    (script,) = re.findall(r"sed -n '([^']+)' requirements-dev.lock", DOCKERFILE)

    cut = subprocess.run(
        ["sed", "-n", script, str(ROOT / "requirements-dev.lock")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout

    first, *hashes = cut.splitlines()
    assert re.fullmatch(r"setuptools==\S+ \\", first)
    assert hashes
    assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line) for line in hashes)


def test_the_builder_builds_the_kernels_for_the_wheel_with_a_compiler_that_is_not_shipped():
    builder, final = read_dockerfile(DOCKERFILE)
    steps = [instruction.value for instruction in builder]
    (compiler,) = [s for s in steps if s.startswith("python -m pip install --target")]
    (build,) = [s for s in steps if "model.kernels.build" in s]
    (wheel,) = [s for s in steps if "pip wheel" in s]
    directory = compiler.partition("--target ")[2].split()[0]

    assert compiler.endswith("-r requirements-kernels.lock")
    assert build == f"PYTHONPATH={directory} /opt/venv/bin/python -m model.kernels.build --require"
    assert steps.index(compiler) < steps.index(build) < steps.index(wheel)
    assert steps.index("model/kernels model/kernels") < steps.index(build)
    # Only the venv goes on, and the compiler is not in it.
    assert not directory.startswith("/opt/venv")
    assert _values(final, "COPY") == ["--from=builder /opt/venv /opt/venv"]


def test_no_library_that_was_built_elsewhere_goes_to_the_builder():
    assert "model/kernels/_build" in (ROOT / ".dockerignore").read_text().splitlines()


def _health_check(port: int) -> int:
    """Runs the image's HEALTHCHECK here; returns its exit status."""
    value = _values(read_dockerfile(DOCKERFILE)[-1], "HEALTHCHECK")[-1]
    _, *arguments = json.loads(value.partition("CMD ")[2])
    environment = {**os.environ, "GEMMA_PORT": str(port)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, stderr=subprocess.DEVNULL).returncode


@pytest.mark.parametrize(("status", "is_healthy"), [(200, True), (503, False)])
def test_the_health_check_of_the_image_asks_health(status, is_healthy):
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        exit_status = _health_check(server.server_port)
        server.shutdown()
        thread.join()

    assert asked == ["/health"]
    assert (exit_status == 0) == is_healthy


def test_the_health_check_of_the_image_fails_if_nothing_listens():
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_port

    assert _health_check(port) != 0


# --- docker-compose.yml -----------------------------------------------------------------------


def compose_findings(text: str) -> list[str]:
    """Breaches of our policy for the compose file."""
    found = []
    services: dict[str, dict[str, Any]] = yaml.safe_load(text)["services"]
    for name, service in services.items():
        if "build" not in service and not _PINNED.fullmatch(service["image"]):
            found.append(f"{name}: image without a version")
        for port in service.get("ports", ()):
            if not str(port).startswith("127.0.0.1:"):
                found.append(f"{name}: published beyond this machine: {port}")
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            is_ours = (ROOT / source).exists() and volume.endswith(":ro")
            if source.startswith(".") and not is_ours:
                found.append(f"{name}: not a file of ours, read-only: {volume}")
        if service.get("privileged") or "ALL" not in service.get("cap_drop", ()):
            found.append(f"{name}: keeps capabilities")
    gemma = services["gemma"]
    environment: dict[str, str] = gemma.get("environment", {})
    for variable in environment:
        if setting_of(variable) is None:
            found.append(f"no such setting: {variable}")
    drain_seconds = float(environment.get("GEMMA_DRAIN_SECONDS", DEFAULT_DRAIN_SECONDS))
    grace = re.fullmatch(r"(\d+)s", gemma.get("stop_grace_period", "10s"))
    if grace is None or float(grace[1]) <= drain_seconds:
        found.append("stop_grace_period is not longer than the drain")
    return found


def test_the_compose_file_keeps_to_the_policy():
    assert compose_findings(COMPOSE) == []


@pytest.mark.parametrize(
    ("old", "new", "finding"),
    [
        ("127.0.0.1:8000:8000", "8000:8000", "published beyond this machine"),
        ("127.0.0.1:9090:9090", "0.0.0.0:9090:9090", "published beyond this machine"),
        ("GEMMA_PRESET", "GEMMA_PRESETS", "no such setting: GEMMA_PRESETS"),
        ("GEMMA_PRESET", "KERAS_BACKEND", "no such setting: KERAS_BACKEND"),
        ("prom/prometheus:v3.13.3", "prom/prometheus", "image without a version"),
        ("prom/prometheus:v3.13.3", "prom/prometheus:latest", "image without a version"),
        ("stop_grace_period: 45s", "stop_grace_period: 30s", "not longer than the drain"),
        ("    stop_grace_period: 45s\n", "", "not longer than the drain"),
        ('"30"', '"60"', "not longer than the drain"),
        ("alerts.yml:ro", "alerts.yml", "not a file of ours"),
        ("./deploy/alerts.yml", "./deploy/gone.yml", "not a file of ours"),
        ("    cap_drop:\n      - ALL\n", "", "keeps capabilities"),
    ],
)
def test_a_breach_of_the_compose_policy_is_found(old, new, finding):
    assert old in COMPOSE

    assert any(finding in line for line in compose_findings(COMPOSE.replace(old, new, 1)))


def test_the_values_in_the_compose_file_are_valid_settings():
    environment = yaml.safe_load(COMPOSE)["services"]["gemma"]["environment"]

    Settings.model_validate({setting_of(name): value for name, value in environment.items()})


# --- Prometheus -------------------------------------------------------------------------------


def test_prometheus_asks_the_service_that_compose_starts():
    (job,) = PROMETHEUS["scrape_configs"]
    (targets,) = [entry["targets"] for entry in job["static_configs"]]
    services = yaml.safe_load(COMPOSE)["services"]

    assert targets == [f"gemma:{DEFAULT_PORT}"]
    assert "gemma" in services
    assert job["metrics_path"] == "/metrics"
    assert PROMETHEUS["global"]["scrape_interval"] == "5s"


def test_prometheus_reads_the_rules_that_compose_mounts():
    mounted = {
        v.split(":")[1] for v in yaml.safe_load(COMPOSE)["services"]["prometheus"]["volumes"]
    }

    assert set(PROMETHEUS["rule_files"]) <= mounted
    assert "/etc/prometheus/prometheus.yml" in mounted


def _exposed_labels() -> dict[str, set[str]]:
    """Labels by name, for every series that /metrics can hold, and Prometheus' own ``up``."""
    exposed = {"up": {"job", "instance"}}
    for metric in vars(Metrics()).values():
        if isinstance(metric, MetricWrapperBase):
            name, labels = metric.describe()[0].name, set(metric._labelnames)
            match metric._type:
                case "histogram":
                    exposed[f"{name}_bucket"] = labels | {"le"}
                    exposed |= {f"{name}_sum": labels, f"{name}_count": labels}
                case "counter":
                    exposed[f"{name}_total"] = labels
                case _:
                    exposed[name] = labels
    return exposed


def _known_values(series: str, label: str) -> set[str]:
    """Values that a label has from the start."""
    families = Metrics().registry.collect()
    samples = [sample for family in families for sample in family.samples]
    return {sample.labels[label] for sample in samples if sample.name == series}


def alert_findings(expression: str) -> list[str]:
    """Series, labels and values of an expression that the service does not have."""
    exposed = _exposed_labels()
    series = re.findall(r"\b(gemma_\w+|up)\b(?:\{([^}]*)\})?", expression)
    found = [] if series else ["names no series of ours"]
    for name, selector in series:
        if name not in exposed:
            found.append(f"no such series: {name}")
            continue
        for label, values in re.findall(r'(\w+)=~?"([^"]*)"', selector):
            if label not in exposed[name]:
                found.append(f"{name} has no label {label}")
            elif name != "up" and not set(values.split("|")) <= _known_values(name, label):
                found.append(f"{name} never has {label}={values}")
    return found


def _rules() -> list[dict[str, Any]]:
    return [rule for group in ALERTS["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("rule", _rules(), ids=lambda rule: rule["alert"])
def test_an_alert_names_series_that_exist_and_says_what_to_do(rule):
    assert alert_findings(rule["expr"]) == []
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"].keys() == {"summary", "action"}


def test_there_is_an_alert_for_what_must_not_happen():
    expressions = " ".join(rule["expr"] for rule in _rules())

    for name in (
        'gemma_compilations_total{phase="serving"}',
        "gemma_ready",
        "gemma_worker_restarts_total",
        "gemma_worker_heartbeat_age_seconds",
    ):
        assert name in expressions


@pytest.mark.parametrize(
    "expression",
    [
        "gemma_redy == 0",
        "gemma_worker_restarts > 0",  # a counter is exposed with _total
        'gemma_compilations_total{op="serving"} > 0',
        'gemma_compilations_total{phase="service"} > 0',
        'gemma_request_failure_total{code=~"internal|numeric"} > 0',
        "vllm_up == 0",
    ],
)
def test_an_alert_that_could_never_fire_is_found(expression):
    assert alert_findings(expression)


# --- CI ---------------------------------------------------------------------------------------


def test_ci_runs_make_test_and_nothing_after_it():
    script = ROOT / ".ci" / "run"
    commands = [line for line in script.read_text().splitlines() if line and line[0] != "#"]

    assert commands[0] == "set -euo pipefail"
    assert commands[-1] == "exec make test"
    assert os.access(script, os.X_OK)


def test_make_test_runs_contracts_types_and_tests():
    planned = subprocess.run(
        ["make", "--dry-run", "test"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout

    positions = [planned.find(f"bin/{tool}") for tool in ("lint-imports", "mypy", "pytest")]
    assert -1 not in positions
    assert positions == sorted(positions)


def _planned(target: str) -> str:
    done = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_make_install_fetches_a_compiler_only_where_no_other_one_builds_the_kernels():
    shell = _planned("install").replace("\\\n", "")

    first, otherwise, rest = shell.partition("model.kernels.build --require || test $? -ne 69 || {")
    assert otherwise
    assert "requirements-kernels.lock" not in first
    assert rest.index("requirements-kernels.lock") < rest.index("model.kernels.build; }")


def test_what_runs_the_model_waits_for_the_kernels_and_those_for_their_sources():
    database = _planned("--print-data-base")
    waiting = dict(re.findall(r"^([\w./-]+): ([^|\n]*)$", database, re.MULTILINE))

    for target in ("serve", "test", "nightly", "bench"):
        assert ".venv/.kernels" in waiting[target].split()
    assert {".venv/.installed", "model/kernels/build.py"} < set(waiting[".venv/.kernels"].split())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "model/kernels/source").glob("*")}
    assert sources <= set(waiting[".venv/.kernels"].split())
