"""What verl loads at ``import verl``, against small packages that stand for verl: the names appear,
nothing else happens, and other versions are refused where a name is used. The real one is in
test_verl.py.
"""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from qwenlong.integrations import verl_kernels, versions

ROOT = Path(__file__).parents[3]
CORE = """
REGISTRY = {}
def register_adv_est(name):
    return lambda fn: REGISTRY.setdefault(name, fn)
"""
V1 = """
class PPOTrainer:
    pass
TRAINERS = {}
def register_trainer(name):
    return lambda cls: TRAINERS.setdefault(name, cls)
"""


@pytest.fixture
def verl(tmp_path):
    """Runs code with a package ``verl`` of the version given, whose registries are as above."""
    for name, text in (
        ("verl/__init__.py", ""),
        ("verl/trainer/__init__.py", ""),
        ("verl/trainer/ppo/__init__.py", ""),
        ("verl/trainer/ppo/core_algos.py", CORE),
        ("verl/trainer/ppo/v1/__init__.py", V1),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def run(code: str, version: str = "0.8.0") -> str:
        info = tmp_path / f"verl-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: verl\nVersion: {version}\n")
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


PLUGIN = "import sys, qwenlong.integrations.verl_plugin as plugin\n"


def test_loading_it_imports_neither_torch_nor_verl(verl):
    code = PLUGIN + "print([name for name in ('torch', 'verl', 'numpy') if name in sys.modules])"
    assert verl(code) == "[]\n"


@pytest.mark.parametrize("order", ["first", "last"])
def test_the_estimator_is_registered_in_either_order(order, verl):
    use = "import verl.trainer.ppo.core_algos as core\n"
    code = PLUGIN + use if order == "first" else use + PLUGIN
    code += "plugin.register(); plugin.register()\n"  # again: no harm
    code += "print(list(core.REGISTRY), sum(hasattr(f, 'action') for f in sys.meta_path))"
    found = verl(code)
    assert found.startswith("['qwenlong_task'] ")
    assert int(found.split()[-1]) == (2 if order == "first" else 1)


def test_another_version_is_refused_where_a_name_is_used(verl):
    code = PLUGIN + (
        "import verl.trainer.ppo.core_algos as core, verl.trainer.ppo.v1 as v1\n"
        "print(sorted(v1.TRAINERS))\n"
        "for use in (core.REGISTRY['qwenlong_task'], v1.TRAINERS['qwenlong_sync']):\n"
        "    try: use('config')\n"
        "    except ImportError as error: print(error)\n"
    )
    names, *refusals = verl(code).splitlines()
    assert names == "['qwenlong_colocate_async', 'qwenlong_separate_async', 'qwenlong_sync']"
    assert len(refusals) == 2
    for text in refusals:
        assert "verl 0.8.0 is installed" in text and "verl>=0.9.1,<0.10" in text


def test_an_error_of_ours_does_not_keep_verl_from_its_import(verl):
    """As where a library beneath ours is broken."""
    code = PLUGIN + (
        "import qwenlong.integrations, types\n"
        "class Broken(types.ModuleType):\n"
        "    def __getattr__(self, name): raise RuntimeError('no such device')\n"
        "sys.modules['qwenlong.integrations.verl'] = Broken('broken')\n"
        "import verl.trainer.ppo.v1 as v1\n"
        "try: v1.TRAINERS['qwenlong_sync']('config')\n"
        "except ImportError as error: print(error)\n"
    )
    assert verl(code) == "RuntimeError: no such device\n"


@pytest.mark.parametrize("version", ["0.8.0", "0.9.0", "0.10.0", "0.10.0.dev1", "1.0", None])
def test_patch_verl_refuses_other_versions(version, monkeypatch):
    def installed(_name: str) -> str:
        if version is None:
            raise PackageNotFoundError
        return version

    monkeypatch.setattr(versions, "version", installed)
    words = f"verl {version} is" if version else "verl is not installed"
    with pytest.raises(ImportError, match=f"{words}.*verl>=0.9.1,<0.10"):
        verl_kernels.patch_verl()


def test_a_module_that_fails_to_import_is_tried_again(verl, tmp_path):
    core = tmp_path / "verl" / "trainer" / "ppo" / "core_algos.py"
    core.write_text("import os\nassert 'LATER' in os.environ\n" + CORE)
    code = PLUGIN + (
        "import os\n"
        "try: import verl.trainer.ppo.core_algos\n"
        "except AssertionError: os.environ['LATER'] = '1'\n"
        "import verl.trainer.ppo.core_algos as core; print(list(core.REGISTRY))"
    )
    assert verl(code) == "['qwenlong_task']\n"
