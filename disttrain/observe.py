"""What the library says about itself: one logger, silent below warnings until a program configures logging."""

import logging

log = logging.getLogger("disttrain")
