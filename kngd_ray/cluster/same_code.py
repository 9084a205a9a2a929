"""Workers run the driver's code: imported from the same place, and compared before use."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import kngd_ray
from kngd_ray.cluster.nodes import ask_nodes
from kngd_ray.errors import KngdError

_SECONDS = 60.0
_WHERE = "import importlib.util as u; found = u.find_spec('kngd_ray'); print(found.origin if found else '')"

Copy = tuple[str, str, str]  # version, digest of the sources and folder of a package; empty where there is none


def folders_to_pass() -> list[str]:
    """Folders that workers have to look into first to find the package that this process runs.

    One that is installed, or that PYTHONPATH leads to, they find by themselves, as another Python here does. One that
    was found in the current folder (``python -m`` in a checkout) or in that of the script, they do not.
    """
    here = Path(kngd_ray.__file__).resolve()
    with suppress(OSError, subprocess.TimeoutExpired):
        asked = subprocess.run(  # noqa: S603 - our own interpreter
            [sys.executable, "-P", "-c", _WHERE], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
        if asked.stdout and Path(asked.stdout.strip()).resolve() == here:
            return []
    return [str(here.parents[1])]


def refuse_other_code() -> None:
    """See that every node would run the sources of this process; Ray must be up.

    Raises:
        KngdError: a node has another version, other sources or none, or no node answers.
    """
    look = _looker()
    mine = look()
    answers = ask_nodes(look, timeout_s=_SECONDS)
    for said in answers:
        if said.error is None and said.answer[:2] != mine[:2]:
            raise KngdError(_difference(said.node, said.answer, mine))
    if all(said.error is not None for said in answers):
        raise KngdError(
            f"Ray could not start a worker ({answers[0].error if answers else 'it has no node'}): see what kngd-ray "
            "doctor finds, or set trainer.num_workers=0 to run without Ray."
        )


def compared(module: str, function: str) -> Callable[..., Any]:
    """A function for workers that first checks that their package is the driver's, also on nodes that joined later.

    Args:
        module: where the function is.
        function: its name.

    Returns:
        What is sent to Ray.
    """
    look = _looker()
    version, digest, _ = look()
    seen: list[str] = []  # of the process that it runs in

    # travels whole, as it is of no module: what the module there has to say is what is in question
    def run(config: dict[str, Any], **given: Any) -> Any:
        from importlib import import_module

        there, sources, place = (version, digest, "") if seen else look()
        if (there, sources) != (version, digest):
            raise RuntimeError(
                f"{place or 'Python'} there has kngd_ray {there or 'nowhere'} and the driver runs {version}, or other "
                "sources of it: install the same on every node"
            )
        seen.append(sources)
        return getattr(import_module(module), function)(config, **given)

    return run


def _difference(node: str, theirs: Copy, mine: Copy) -> str:
    advice = "install the same there, or send this one along with kngd-ray submit from its checkout."
    if not theirs[0]:
        return f"{node} has no kngd_ray that its Python finds, and this process runs {mine[0]}: {advice}"
    if theirs[0] != mine[0]:
        return f"{node} has kngd_ray {theirs[0]} in {theirs[2]}, and this process runs {mine[0]}: {advice}"
    return f"{node} has other sources of kngd_ray {theirs[0]} in {theirs[2]} than {mine[2]} here: {advice}"


def _looker() -> Callable[[], Copy]:
    """A function that is pickled by value; by reference, a worker would import its own version of the module."""

    def look() -> Copy:
        """The copy that an import would find, without importing it."""
        import hashlib
        import importlib.util
        import re
        from pathlib import Path

        found = importlib.util.find_spec("kngd_ray")
        if found is None or found.origin is None:
            return "", "", ""
        start = Path(found.origin)
        digest = hashlib.sha256()
        for path in sorted(start.parent.rglob("*.py")):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(start.parent).as_posix()} {content}\n".encode())
        version = re.search(r'^__version__ = "(.+)"', start.read_text(encoding="utf-8"), re.MULTILINE)
        return version[1] if version else "?", digest.hexdigest(), str(start.parent)

    return look
