"""Nothing that was handed in is ever unpickled: no import, no call and no file of ours does it, and none is needed."""

import ast
import json
import pickle
import pickletools
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers.emoji import small_table
from helpers.hostile import MARK, pickled, png

import kngd_ray

PACKAGE = Path(kngd_ray.__file__).parent
# What unpickles, or runs what it reads; `importlib.import_module` of a name that was read would be the same.
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "importlib.import_module", "pickle.load", "pickle.loads", "torch.jit.load",
    "np.load", "numpy.load", "marshal.loads", "pd.read_pickle", "pa.deserialize", "yaml.load", "yaml.unsafe_load",
}  # fmt: skip
MAY_PICKLE_ARRAYS = {"np.load", "numpy.load"}


def test_no_call_unpickles_or_runs_text(subtests: pytest.Subtests) -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        with subtests.test(str(path.relative_to(PACKAGE))):
            check_calls(path)


def check_calls(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in FORBIDDEN - {"compile"}, f"{path}:{node.lineno} calls {called}"
            for keyword in node.keywords:
                assert keyword.arg != "allow_pickle", f"{path}:{node.lineno}"
                assert not (keyword.arg == "weights_only" and ast.unparse(keyword.value) != "True"), path


def test_no_file_of_the_package_is_a_pickle() -> None:
    for path in PACKAGE.rglob("*"):
        if path.is_file() and path.suffix not in {".py", ".pyc"}:
            with path.open("rb") as file:
                assert file.read(1) != pickle.PROTO, path


AUDITED = """
import os, sys
from pathlib import Path

seen = []
def hook(event, arguments):
    if event == "pickle.find_class":
        seen.append(arguments)
sys.addaudithook(hook)
os.chdir({folder!r})
from kngd_ray import cli
seen.clear()  # what the imports of libraries do is their own
for command in (
    ["train", "data.path=small.parquet", "data.shots=2", "epochs=1", "posterior.folds=0", "trainer.num_workers=0",
     "trainer.name=run", "trainer.storage_path=runs", "tracking.enabled=false", "data.cache_dir=cache", "--json"],
    ["predict", "run", {picture!r}, "--storage-path", "runs"],
):
    sys.argv = ["kngd-ray", *command]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, end.code
print("unpickled", [".".join(map(str, each)) for each in seen], file=sys.stderr)
"""


@pytest.mark.slow
def test_a_run_and_a_prediction_unpickle_nothing(tmp_path: Path) -> None:
    """Python tells of every class that unpickling asks for."""
    (tmp_path / "x.png").write_bytes(png(32, 32))
    pq.write_table(small_table(), tmp_path / "small.parquet")
    code = AUDITED.format(folder=str(tmp_path), picture=str(tmp_path / "x.png"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.splitlines()[-1] == "unpickled []"
    assert json.loads(done.stdout.splitlines()[0])["method"] == "kalman", "a program prints its JSON and nothing before"


def test_the_hook_would_have_seen_it(tmp_path: Path) -> None:
    data = tmp_path / "x"
    data.write_bytes(pickled())
    code = (
        "import sys; seen = []\nsys.addaudithook(lambda e, a: seen.append(e) if e == 'pickle.find_class' else None)\n"
        f"import pickle; pickle.load(open({str(data)!r}, 'rb')); print(len(seen))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == "1\n"
    assert (tmp_path / MARK).is_dir()
    assert any(opcode.name == "REDUCE" for opcode, _, _ in pickletools.genops(pickled()))
