"""Where a function's process begins: the handler is loaded before the first connection is taken."""

import sys

import handler  # type: ignore[import-not-found]  # each image brings its own
import watchdog  # type: ignore[import-not-found]  # beside this file, which is no package

sys.exit(watchdog.run(handler.handle))
