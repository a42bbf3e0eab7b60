"""What a kernel of this project writes into the terminal."""

import shutil

from jupyter_client.manager import start_new_kernel

from runner import ROOT


def test_a_kernel_that_is_stopped_calls_it_no_error(tmp_path, monkeypatch):
    (tmp_path / "profile_default").mkdir()
    shutil.copy(ROOT / ".jupyter/ipython_kernel_config.py", tmp_path / "profile_default")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    with (tmp_path / "stderr").open("w") as stderr:
        manager, client = start_new_kernel(startup_timeout=300, kernel_name="python3", stderr=stderr, stdout=stderr)
        for message in ("KeyboardInterrupt caught in kernel.", "a real mistake"):
            client.execute_interactive(f"get_ipython().kernel.log.error({message!r})", timeout=300)
        client.stop_channels()
        manager.shutdown_kernel()
    said = (tmp_path / "stderr").read_text()
    assert "a real mistake" in said and "KeyboardInterrupt" not in said
