from cyflash.cpu._baseline import *  # noqa: F403
