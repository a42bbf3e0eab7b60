"""JupyterLab as `make lab` starts it: at the start page, and without a word to the network."""

c = get_config()  # noqa: F821

c.LabApp.default_url = "/lab/tree/notebooks/START.md"
c.LabApp.extension_manager = "readonly"  # the default manager lists packages from the network
c.LabApp.news_url = None
c.LabApp.check_for_updates_class = "jupyterlab.handlers.announcements.NeverCheckForUpdate"
c.ServerApp.allow_root = True  # in a container one is root

c.Application.log_level = "WARN"  # its address is shown all the same
