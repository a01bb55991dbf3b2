"""The versions and the machine behind a number, so that another machine can repeat it."""

import os
import platform
from importlib.metadata import version


def environment() -> dict[str, str | int]:
    """Versions, platform, cores and torch's thread count, as they are now."""
    import torch

    import droplens

    return {
        "droplens": droplens.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }
