"""At installation: compile the kernels for this machine where it has a compiler; else the first use does."""

import sys
import sysconfig
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Kernels(BuildHookInterface[Any]):
    """Adds the library of kernels to a wheel, which then is one for this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build, or say why not; an installation never fails because of it."""
        sys.path.insert(0, self.root)
        from disttrain.errors import DisttrainError
        from disttrain.kernels.build import install

        try:
            library = install()
        except DisttrainError as error:
            self.app.display_warning(f"no kernels were built, which the first use will try again: {error}")
            return
        if library is not None:
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["artifacts"].append(f"/{library.relative_to(self.root).as_posix()}")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform}"
