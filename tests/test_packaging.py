"""The bare install: the thin reader and nothing more."""

import subprocess
import sys
from pathlib import Path

import pytest
import stores

from pipelines.index import IndexRequest, run
from pipelines.runner import Runner

ROOT = Path(__file__).parents[1]

ASK = """
import sys
import numpy as np
from serving import Index, LookalikeError

index = Index.open(sys.argv[1])
vectors = np.load(sys.argv[2])
found = [hits[0].uri for hits in index.search(vectors, 3)]
assert found == [f"/made/{number:06}.jpg" for number in range(len(vectors))]
try:
    index.search_images([b""])
except LookalikeError as error:
    print(error)
for name in ("apache_beam", "tensorflow", "keras", "ai_edge_litert", "PIL", "google.cloud.storage", "boto3"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} is installed")
"""


@pytest.mark.soak
def test_the_bare_install_answers_vector_queries(tmp_path):
    """Install alone into a fresh environment, and open an index there."""
    import numpy as np

    vectors = stores.clustered(50)
    stores.write_store(tmp_path / "store", vectors)
    run(IndexRequest(str(tmp_path / "store"), str(tmp_path / "index")), Runner())
    np.save(tmp_path / "vectors.npy", vectors)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "fresh"], check=True)
    python = tmp_path / "fresh" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "requirements.lock", ROOT]
    subprocess.run(install, check=True)
    asked = subprocess.run(
        [python, "-c", ASK, tmp_path / "index", tmp_path / "vectors.npy"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert asked.returncode == 0, asked.stderr
    assert 'pip install "lookalike[images]"' in asked.stdout
    verb = subprocess.run([python.with_name("lookalike"), "embed"], capture_output=True, text=True, check=False)
    assert (verb.returncode, verb.stderr) == (
        2,
        'lookalike embed: it needs packages that are not installed: pip install "lookalike[pipeline]"\n',
    )
    checked = subprocess.run([python.with_name("lookalike"), "verify", tmp_path / "index"], check=False)
    assert checked.returncode == 0
