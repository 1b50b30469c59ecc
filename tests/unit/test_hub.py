"""Adapters from the Hugging Face hub: only where that is meant, only two files, never a pickle; without a network the command to type."""

import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import nn

import slimtune as st

NAMES = ["README.md", "adapter_config.json", "adapter_model.bin", "adapter_model.safetensors", "evil.pkl", "run.py"]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = net()
    st.attach(model, st.LoRA(r=2, targets=["0"]), name="mine")
    with torch.no_grad():
        for p in st.adapters(model)["mine"].parameters():
            p.normal_()
    return st.save(model, tmp_path / "repo")


@pytest.fixture
def asked(saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What the hub's client was asked for; the current folder is an empty one."""
    calls: list[dict[str, Any]] = []

    def download(**asked: Any) -> str:
        calls.append(asked)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return calls


def test_a_repository_is_fetched_and_nothing_but_two_files_is_asked_for(asked: list[dict[str, Any]]) -> None:
    model = net()
    assert st.load(model, "user/adapter").name == "mine"
    st.load(model, "user/adapter", name="again", revision="v1")
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert asked == [{"repo_id": "user/adapter", "revision": r, "allow_patterns": files} for r in (None, "v1")]


def test_a_folder_of_that_name_wins(asked: list[dict[str, Any]], saved: Path) -> None:
    shutil.copytree(saved, "user/adapter")
    assert st.load(net(), "user/adapter").name == "mine"
    with pytest.raises(st.FileError, match="no revision 'v1'") as caught:
        st.load(net(), "user/adapter", revision="v1")
    assert "hf download user/adapter --revision v1" in caught.value.hint
    assert not asked


def test_a_mistyped_path_never_reaches_the_network(asked: list[dict[str, Any]]) -> None:
    Path("out/support").mkdir(parents=True)
    with pytest.raises(st.FileError, match="no folder out/suport") as caught:
        st.load(net(), "out/suport")
    assert "support" in caught.value.hint
    for name in ("adapter", "./user/adapter", "/user/adapter", "a/b/c", "user/adapter/", "../user/adapter", "user\\adapter", Path("user/adapter")):
        with pytest.raises(st.FileError, match="no folder"):
            st.load(net(), name)
    with pytest.raises(st.FileError, match="names none"):
        st.load(net(), "adapter", revision="v1")
    assert not asked


def test_without_the_client_the_command_is_named(asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(st.FileError) as caught:
        st.load(net(), "user/adapter")
    assert "pip install huggingface_hub" in caught.value.hint
    assert "hf download user/adapter" in caught.value.hint


OFFLINE = """
import torch, slimtune as st
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
try:
    st.load(model, "user/adapter")
except st.FileError as error:
    print(error)
"""


def test_offline_says_so_and_what_to_type(tmp_path: Path) -> None:
    import os

    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", OFFLINE], capture_output=True, text=True, cwd=tmp_path, env=env, check=True)
    assert "HF_HUB_OFFLINE is set" in done.stdout
    assert "hf download user/adapter adapter_config.json adapter_model.safetensors --local-dir adapter" in done.stdout


@pytest.fixture
def hub(saved: Path) -> Iterator[tuple[str, list[str]]]:
    """A hub on this machine with a repository that holds more than an adapter; yields its address and the files that were fetched."""
    fetched: list[str] = []
    sha = "0" * 40

    class Hub(http.server.BaseHTTPRequestHandler):
        def reply(self, body: bytes, **headers: str) -> None:
            self.send_response(200)
            for key, value in {"Content-Length": str(len(body)), "X-Repo-Commit": sha, **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path.startswith("/api/models/user/adapter/tree"):
                rows = [{"type": "file", "path": n, "size": 1, "oid": str(i) * 40} for i, n in enumerate(NAMES)]
                self.reply(json.dumps(rows).encode(), Content_Type="application/json")
            elif path.startswith("/api/models/user/adapter"):
                about = {"id": "user/adapter", "modelId": "user/adapter", "sha": sha, "siblings": [{"rfilename": n} for n in NAMES]}
                self.reply(json.dumps(about).encode(), Content_Type="application/json")
            elif path.startswith(f"/user/adapter/resolve/{sha}/") and (saved / path.rpartition("/")[2]).is_file():
                name = path.rpartition("/")[2]  # the two files are asked for by two threads
                fetched.append(name)
                self.reply((saved / name).read_bytes(), ETag=f'"{name}"')
            else:
                self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", fetched
    server.shutdown()
    server.server_close()


ONLINE = """
import torch, slimtune as st
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
print(st.load(model, "user/adapter", relax="base").name)
"""


def test_the_real_client_fetches_two_files_and_the_cache_serves_them_offline(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    import os

    address, fetched = hub
    here = tmp_path / "empty"
    here.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", ONLINE], capture_output=True, text=True, cwd=here, env=env)
    assert done.stdout.strip() == "mine", done.stderr
    assert set(fetched) == {"adapter_config.json", "adapter_model.safetensors"}
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.suffix in {".pkl", ".bin", ".py"} and "snapshots" in p.parts]
    again = subprocess.run([sys.executable, "-c", ONLINE], capture_output=True, text=True, cwd=here, env={**env, "HF_HUB_OFFLINE": "1"})
    assert again.stdout.strip() == "mine", again.stderr
