"""The indexed Job as its pods would run it, on hosts that are network namespaces: there is no Kubernetes here."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from disttrain import env
from tests.cluster.test_files import documents
from tests.netns.network import Network, NoNetworkError

pytestmark = [pytest.mark.long, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
IMAGE = {"python": sys.executable, "/home/train/examples": str(ROOT / "examples"), "/runs": "runs"}


def test_workers_meet_by_the_names_of_pods(tmp_path):
    _, job, _ = documents("kubernetes/indexed-job.yaml")
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    command = []
    for word in container["command"]:
        for there, here in IMAGE.items():
            word = here + word.removeprefix(there) if word.startswith(there) else word
        command.append(word)
    with contextlib.ExitStack() as stack:
        try:
            network = stack.enter_context(Network(spec["completions"], rate=""))
        except NoNetworkError as error:
            pytest.skip(str(error))
        pods = [f"{job['metadata']['name']}-{index}" for index in range(spec["completions"])]
        service = spec["template"]["spec"]["subdomain"]
        names = [f"{each} {pod}.{service} {pod}" for each, pod in zip(network.addresses, pods, strict=True)]
        (tmp_path / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        ranks = []
        for index, pod in enumerate(pods):
            for line in (["hostname", pod], ["mount", "--bind", tmp_path / "hosts", "/etc/hosts"]):
                subprocess.run(network.command(index, line), check=True)
            settings = {each["name"]: each.get("value") for each in container["env"]}
            settings |= {env.RANK: str(index), env.SECRET: "of the secret named train"}
            # As the image has it.
            line = network.command(index, [*command, "--small"], PYTHONPATH=ROOT, **settings)
            line[line.index("env") + 1] = f"--chdir={tmp_path}"
            ranks.append(
                subprocess.Popen(
                    line, env={"PATH": os.environ["PATH"]}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                )
            )
        outputs = [rank.communicate(timeout=120)[0].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert "test accuracy" in outputs[0]
    assert list((tmp_path / "runs" / "today").glob("checkpoint-*"))
