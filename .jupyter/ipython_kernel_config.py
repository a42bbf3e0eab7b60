"""What kernels of this project say in a terminal: errors only, and not that they were stopped.

`make` copies this file into the environment. papermill and JupyterLab interrupt a kernel before
they shut it down, and the kernel would call that an error after every notebook that went well.
"""

import logging

c = get_config()  # noqa: F821  (IPython defines it)
c.IPKernelApp.log_level = "ERROR"  # kernels talk over loopback: no warning about it in every run

STOPPED = ("KeyboardInterrupt caught in kernel", "No such comm target registered: jupyter.widget")
logging.getLogger("IPKernelApp").addFilter(
    lambda record: not record.getMessage().startswith(STOPPED))
