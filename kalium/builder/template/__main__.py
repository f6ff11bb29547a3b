"""Where a function's process begins: the handler is loaded before the first connection is taken."""

import sys

import handler
import watchdog

sys.exit(watchdog.run(handler.handle))
